"""How much memory a case needs and how much there is, so that what would not fit is refused before anything runs.

The need is an upper estimate: inputs, what making and checking them takes, and the contender that takes most, eager
torch. It knows nothing of time. Next: grid.py and quick.py, whose cases come in all sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from distil_fast.bench.cases import Case

GIB = 1 << 30
BESIDE = GIB // 2  # the process, the copy of memory
LOSS_ARRAYS, MAKING = 16, 12  # arrays of the case's dtype: inputs twice, eager torch; bytes an element: random numbers
LINEAR_ARRAYS = 9  # float32 arrays of logits in eager torch
MEMINFO = Path("/proc/meminfo")
LIMIT, USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def needed_bytes(case: Case) -> int:
    """An upper estimate of what a case takes."""
    elements, size = case.rows * case.cols, case.dtype.itemsize
    if not case.width:
        return BESIDE + elements * (LOSS_ARRAYS * size + MAKING)
    widths = case.width + (case.teacher_width or case.width)
    heads = 2 * (case.rows + case.cols) * widths * (size + 4)
    return BESIDE + heads + elements * LINEAR_ARRAYS * 4


def available_bytes(device: str) -> int:
    """What is free: of the GPU; or of the machine, and of the share of it that a container may use."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = [_kib("MemAvailable") << 10] if MEMINFO.exists() else []
    if LIMIT.exists() and USED.exists() and (limit := LIMIT.read_text().strip()).isdigit():
        free.append(int(limit) - int(USED.read_text()))
    return max(min(free), 0) if free else 4 * GIB


def _kib(name: str) -> int:
    line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def fitting(chosen: Sequence[Case]) -> tuple[list[Case], dict[str, str]]:
    """The cases that fit into the memory that is free, and why each of the others does not, by name."""
    kept: list[Case] = []
    left_out: dict[str, str] = {}
    free = {device: available_bytes(device) for device in {case.device for case in chosen}}
    for case in chosen:
        needed, there = needed_bytes(case), free[case.device]
        if needed <= there:
            kept.append(case)
        else:
            left_out[case.name] = f"it may take {needed / GIB:.1f} GiB, and {there / GIB:.1f} GiB are free"
    return kept, left_out
