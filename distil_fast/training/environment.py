"""What `distil-fast env` shows: versions, devices, who serves each of them and why, threads, extras, the cache.

It needs none of the extras that it reports on, so it can say which are missing; only its table is rich's. No names of
hosts or users. Next: backends/__init__.py, which decides who serves.
"""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

import distil_fast
from distil_fast.backends import module, serving
from distil_fast.training.cache import cache_folder

if TYPE_CHECKING:
    from rich.table import Table

DTYPES = (torch.float32, torch.bfloat16)  # one each of the full and the half precisions
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "triton")


class Device(NamedTuple):
    name: str  # as torch has it, "cuda:0"
    model: str  # of the processor or the GPU
    memory_gib: float | None
    backends: dict[str, tuple[str, str]]  # of a dtype: who serves it, and why


class Environment(NamedTuple):
    """`_asdict` of it, devices included, is plain JSON data."""

    versions: dict[str, str]  # "not installed" for what is not there
    system: str
    threads: int  # of torch, which the kernels follow
    cores: int  # that this process may use
    instruction_set: str  # of the compiled CPU kernels, or why there are none
    devices: list[Device]
    extras: dict[str, list[str]]  # of an extra of the package: the requirements that are missing
    cache: str  # folder for tokenised text and fitted heads

    def as_dict(self) -> dict[str, object]:
        return self._asdict() | {"devices": [device._asdict() for device in self.devices]}


def environment() -> Environment:
    """Look at everything; a part that cannot be looked at says so instead of raising."""
    versions = {"distil_fast": distil_fast.__version__, "python": platform.python_version()}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Environment(
        versions=versions | {name: _version(name) or "not installed" for name in PACKAGES},
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        threads=torch.get_num_threads(),
        cores=cores,
        instruction_set=_instruction_set(),
        devices=_devices(),
        extras=missing_extras(),
        cache=str(cache_folder()),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _instruction_set() -> str:
    can, why = module("native").available(torch.device("cpu"), torch.float32)
    return why if can else f"none: {why}"


def _devices() -> list[Device]:
    found = [Device("cpu", _processor(), _memory_gib(), _backends("cpu"))]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        name = f"cuda:{index}"
        memory = round(properties.total_memory / 2**30, 1)
        found.append(Device(name, properties.name, memory, _backends(name)))
    return found


def _backends(device: str) -> dict[str, tuple[str, str]]:
    found = {}
    for dtype in DTYPES:
        try:
            name, why = serving(device, dtype)
        except ValueError as error:  # DISTIL_FAST_BACKEND names one that cannot
            name, why = "none", str(error)
        found[str(dtype).removeprefix("torch.")] = name, why
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def missing_extras() -> dict[str, list[str]]:
    """For each extra of the package, its requirements that are not installed; versions are not compared."""
    missing: dict[str, list[str]] = {}
    for requirement in metadata.requires("distil-fast") or []:
        found = re.match(r"([A-Za-z0-9._-]+).*extra == ['\"]([^'\"]+)['\"]", requirement)
        if found is None or found[1] == "distil-fast":  # needed always, or an extra that names others
            continue
        name, extra = found.groups()
        missing.setdefault(extra, []).extend([] if _version(name) else [name])
    return missing


def table(found: Environment) -> Table:
    """The same for the screen."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")
    rows: list[tuple[str, str]] = []
    for name, version in found.versions.items():
        rows.append((name, version))
    rows.append(("system", found.system))
    rows.append(("threads", f"{found.threads} on {found.cores} cores"))
    rows.append(("CPU kernels", found.instruction_set))
    for device in found.devices:
        memory = "" if device.memory_gib is None else f", {device.memory_gib:g} GiB"
        rows.append((device.name, device.model + memory))
        for dtype, (name, why) in device.backends.items():
            rows.append((f"  {dtype}", f"{name}: {why}"))
    for extra, names in found.extras.items():
        remedy = f"missing {', '.join(names)}: pip install 'distil-fast[{extra}]'"
        rows.append((f"extra {extra}", remedy if names else "installed"))
    rows.append(("cache", found.cache))
    for name, words in rows:
        shown.add_row(name, Text(words))  # as it is: rich would take the [brackets] for its own
    return shown
