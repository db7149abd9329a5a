"""The machine and the software that numbers were measured on, as far as the numbers depend on them.

No names of hosts, users or folders. Next: results.py, which keeps it beside the numbers.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import distil_fast
from distil_fast import _C

DEFAULT_CACHE_BYTES = 32 << 20
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def last_level_cache_bytes(device: str = "cpu") -> int:
    """Size of a GPU's L2, or of the largest cache of the first processor; 32 MiB where the system does not say."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties().L2_cache_size)
    sizes = [_size(path.read_text().strip()) for path in CACHES.glob("index*/size")]
    return max(sizes, default=DEFAULT_CACHE_BYTES)


def _size(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)


def describe() -> dict[str, str | int | float | None]:
    """Processor, memory, software and commit, by name."""
    return {
        "cpu": _line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _C.instruction_set(),
        "last_cache_mib": last_level_cache_bytes() >> 20,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "distil_fast": distil_fast.__version__,
        "commit": _commit(),
        **(_gpu() if torch.cuda.is_available() else {}),
    }


def _gpu() -> dict[str, str | int | float | None]:
    """The GPU of this process, and what drives it."""
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_l2_mib": properties.L2_cache_size >> 20,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "liger_kernel": _version("liger_kernel"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _line(path: str, key: str) -> str | None:
    """The value of the first `key: value` line of a file of the system."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _commit() -> str | None:
    """The commit of the checkout that the package is imported from, "+" after it if files differ; None in a wheel."""
    root = Path(distil_fast.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return f"{commit}+" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()
