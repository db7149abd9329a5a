"""What only a process of its own can tell: peak memory, and calls whose memory has never been used before.

In a process that has measured other things, freed memory waits for its next use, and both would come out too small.
It knows nothing of the table. Next: loss.py.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from distil_fast.bench import contenders, measure, problems
from distil_fast.bench.cases import Case
from distil_fast.bench.problem import Outcome, Problem

Result = TypeVar("Result")

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5), clear_refs
M_MMAP_THRESHOLD, MAPPED = -3, 1 << 20  # malloc.h: larger blocks leave the process as soon as they are freed
USED_BEFORE = 1.5  # times the memory that first calls take


def fresh(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a function of this package in a new process with as many threads, and returns what it returns."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_threads, torch.get_num_threads(), function, *arguments).result()


def _with_threads(threads: int, function: Callable[..., Result], *arguments: Any) -> Result:
    torch.set_num_threads(threads)
    return function(*arguments)


def peak_extra_bytes(case: Case, names: tuple[str, ...]) -> dict[str, int]:
    """By contender: the most memory that was resident during one call, beyond what was before it.

    The gradient or output counts, unless it is written in place. Call it through `fresh`, distil_fast's names first.
    Empty where the system keeps no peak that can be reset.
    """
    if not CLEAR_REFS.exists():
        return {}
    give_back_what_is_freed()
    problem = problems.make(case)
    return {name: _peak_extra(name, case, problem) for name in names}


def give_back_what_is_freed() -> None:
    """Makes the C library do so; by default it keeps some, depending on what came before."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, MAPPED)


def peak_of(function: Callable[[], object]) -> int:
    """The most bytes that were resident during a call, beyond what was before it. Needs `CLEAR_REFS`."""
    CLEAR_REFS.write_text(RESET_PEAK)
    before = _peak()
    result = function()
    peak = _peak() - before
    del result
    return peak


def _peak_extra(name: str, case: Case, problem: Problem) -> int:
    contender = contenders.build(name, case, problem)
    used: list[Outcome] = []  # kept, so that the measured call cannot use their memory again
    if "compiled" in name:
        contender.prepare()
        used.append(contender.call())  # compiles, which takes memory of its own
    else:
        _call_once_small(name, case)
    contender.prepare()
    return peak_of(contender.call)


def _peak() -> int:
    """The largest resident size since the last reset, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def _call_once_small(name: str, case: Case) -> None:
    """Loads code and starts threads."""
    small = replace(case, rows=8, cols=64)
    contender = contenders.build(name, small, problems.make(small))
    contender.prepare()
    contender.call()


class _Keeping:
    """A contender whose results are all kept: no call finds memory that another one has freed."""

    calls, device = 1, "cpu"

    def __init__(self, contender: measure.Sampled) -> None:
        self.contender = contender
        self.results: list[Outcome] = []

    def prepare(self) -> None:
        self.contender.prepare()

    def call(self) -> None:
        self.results.append(self.contender.call())


def first_calls(case: Case, count: int) -> list[float]:
    """Seconds of calls of "ours" that write to fresh memory each. Call it through `fresh`.

    Memory is touched and given back first: on a virtual machine, pages that no process has ever used cost ten times
    more, and tell about the machine alone.
    """
    _call_once_small("ours", case)
    contender = _Keeping(contenders.build("ours", case, problems.make(case)))
    evict = measure.CacheEvictor()
    _touch(int(USED_BEFORE * count) * case.rows * case.cols * case.dtype.itemsize)
    return [measure.sample(contender, evict) for _ in range(count)]


def _touch(size: int) -> None:
    """Writes to memory in huge pages, where the system has them, and gives it back."""
    with mmap.mmap(-1, size) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory.write(bytes(size))
