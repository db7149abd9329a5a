"""How things are timed: in turn, warm, with cold caches, and beside a copy of memory, on a CPU or a GPU.

Everything that is compared is sampled in the same rounds, so that a slow minute of the machine falls on all alike; what
is slow itself takes part in fewer of them. It knows nothing of losses. Next: suite.py.
"""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from distil_fast.bench import machine


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds of warm-up per group, seconds of samples per contender within two bounds."""

    warm_up: float
    budget: float
    fewest: int
    most: int


TRIALS = 9  # of each way to copy
COPIED_ON_GPU = 1 << 30  # bytes
HEAD_START = 2_000_000  # cycles of a GPU, about a millisecond
FULL = Effort(warm_up=2.0, budget=1.5, fewest=30, most=60)
STEPS = Effort(warm_up=2.0, budget=1.5, fewest=7, most=60)  # of training, which take seconds each
QUICK = Effort(warm_up=0.5, budget=0.5, fewest=3, most=20)
NOISY_SPREAD, NOISY_DRIFT = 0.25, 0.15


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: quantiles over the samples."""

    p20: float
    p50: float
    p80: float
    samples: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Timing:
        ordered = sorted(1e3 * s for s in seconds)
        last = len(ordered) - 1
        return Timing(ordered[round(0.2 * last)], statistics.median(ordered), ordered[round(0.8 * last)], len(ordered))


@dataclass(frozen=True)
class Canary:
    """How steady the machine was, told by the copy of memory that ran beside everything, from the first case to the
    last. `spread`: how much longer its slow times (p80) were than its fast ones (p20); `drift`: how much longer it
    took in the last fifth of the run than in the first (negative: less long)."""

    spread: float
    drift: float

    @staticmethod
    def of(seconds: Sequence[float]) -> Canary:
        """From the times of all copies, in the order in which they were made."""
        timing, fifth = Timing.of(seconds), max(len(seconds) // 5, 1)
        begin, end = statistics.median(seconds[:fifth]), statistics.median(seconds[-fifth:])
        return Canary(timing.p80 / timing.p20 - 1.0, end / begin - 1.0)

    @property
    def noisy(self) -> bool:
        """Whether ratios between cases, or between runs, say little."""
        return self.spread > NOISY_SPREAD or abs(self.drift) > NOISY_DRIFT


class Sampled(Protocol):
    """What can be timed. One sample is `calls` calls; where that is 1, the caches are emptied before it."""

    @property
    def calls(self) -> int: ...
    @property
    def device(self) -> str: ...
    def prepare(self) -> None: ...
    def call(self) -> Any: ...


class CacheEvictor:
    """Empties the caches by reading twice what the last of them holds; reading leaves no write-back behind."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.memory = torch.ones(2 * machine.last_level_cache_bytes(device) // 4, device=device)

    def __call__(self) -> None:
        self.memory.sum()


def sample(contender: Sampled, evict: Callable[[], object]) -> float:
    """Seconds of one call. What it returns is freed after the clock has stopped."""
    contender.prepare()
    if contender.calls == 1:
        evict()
    clock = _gpu_seconds if contender.device == "cuda" else _seconds
    return clock(contender) / contender.calls


def _seconds(contender: Sampled) -> float:
    start = time.perf_counter()
    for _ in range(contender.calls):
        result = contender.call()
    seconds = time.perf_counter() - start
    del result
    return seconds


def _gpu_seconds(contender: Sampled) -> float:
    """By the device's own clock. It is kept busy while the calls are queued, so that it never waits for Python."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    for _ in range(contender.calls):
        result = contender.call()
    end.record()
    end.synchronize()
    del result
    return 1e-3 * start.elapsed_time(end)


def in_turn(contenders: Sequence[Sampled], effort: Effort, evict: Callable[[], object]) -> list[list[float]]:
    """The samples of each contender in seconds a call, taken in rounds in which each comes up at most once."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        last = _warm_up(contenders, effort, evict)
        counts = [
            max(effort.fewest, min(effort.most, int(effort.budget / (seconds * contender.calls))))
            for contender, seconds in zip(contenders, last, strict=True)
        ]
        samples: list[list[float]] = [[] for _ in contenders]
        for number in schedule(counts):
            samples[number].append(sample(contenders[number], evict))
        return samples
    finally:
        if collecting:
            gc.enable()


def _warm_up(contenders: Sequence[Sampled], effort: Effort, evict: Callable[[], object]) -> list[float]:
    """Calls all in turn, at least twice and for `warm_up` seconds; returns what each took the last time."""
    start = time.perf_counter()
    rounds = 0
    while rounds < 2 or time.perf_counter() - start < effort.warm_up:
        last = [sample(contender, evict) for contender in contenders]
        rounds += 1
    return last


def schedule(counts: Sequence[int]) -> list[int]:
    """Whose turn it is: number i comes up counts[i] times, evenly spread over rounds of an order that changes, so that
    what one leaves behind (freed memory, a warm core) does not always fall on the same next one."""
    order = random.Random(0)
    rounds = max(counts, default=0)
    turns: list[int] = []
    for r in range(rounds):
        taking_part = [i for i, count in enumerate(counts) if (r + 1) * count // rounds > r * count // rounds]
        turns += order.sample(taking_part, len(taking_part))
    return turns


class Copy:
    """The fastest copy of memory that torch or the C library make with all threads: the yardstick of every case.

    Both arrays together are eight times the last cache of a CPU, 2 GiB on a GPU. The C library streams such sizes past
    the caches; torch's copy_ reads the destination before it overwrites it on some processors.
    """

    calls = 1

    def __init__(self, evict: CacheEvictor) -> None:
        self.device = evict.device
        self.bytes = COPIED_ON_GPU if self.device == "cuda" else 4 * machine.last_level_cache_bytes()
        self.source, self.destination = (
            torch.ones(self.bytes, dtype=torch.uint8, device=self.device) for _ in range(2)
        )
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads)
        methods: dict[str, Callable[[], object]] = {"torch copy_": self._copy}
        if self.device == "cpu":
            methods["memmove on all threads"] = self._memmove
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(TRIALS):
            for name, self.call in methods.items():
                seconds[name].append(sample(self, evict))
        self.method = min(seconds, key=lambda name: statistics.median(seconds[name]))
        self.call = methods[self.method]

    def prepare(self) -> None:
        pass

    def gb_per_s(self, seconds: float) -> float:
        """Bytes read and written over the time of a copy."""
        return 2e-9 * self.bytes / seconds

    def _copy(self) -> None:
        self.destination.copy_(self.source)

    def _memmove(self) -> None:
        share = self.bytes // self.threads
        halves = [
            self.pool.submit(
                ctypes.memmove, self.destination.data_ptr() + i * share, self.source.data_ptr() + i * share, share
            )
            for i in range(self.threads)
        ]
        for half in halves:
            half.result()
