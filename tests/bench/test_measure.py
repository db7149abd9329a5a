"""The clock: what is timed and what is not, whose turn it is, and what a median is of. The clock is a fake one."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from distil_fast.bench import measure
from distil_fast.bench.measure import Effort, Timing

EFFORT = Effort(warm_up=1.0, budget=1.0, fewest=3, most=20)


class Clock:
    """Time that passes only where someone says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def work(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.log.append(name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)
    return clock


class Fake:
    """A contender that takes as long as it is told."""

    device = "cpu"

    def __init__(self, clock: Clock, name: str, seconds: float, calls: int = 1) -> None:
        self.clock, self.name, self.seconds, self.calls = clock, name, seconds, calls

    def prepare(self) -> None:
        self.clock.work("prepare", 100.0)

    def call(self) -> None:
        self.clock.work(self.name, self.seconds)


def evict(clock: Clock) -> Callable[[], None]:
    return lambda: clock.work("evict", 1000.0)


def test_only_the_call_is_timed(clock: Clock) -> None:
    assert measure.sample(Fake(clock, "a", 0.25), evict(clock)) == 0.25
    assert clock.log == ["prepare", "evict", "a"]


def test_a_gpu_is_timed_by_its_own_clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two events, with a head start for the queue before the first."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock.now

        def synchronize(self) -> None:
            clock.work("synchronize", 7.0)

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: clock.work("head start", cycles))
    contender = Fake(clock, "a", 0.25)
    contender.device = "cuda"
    assert measure.sample(contender, evict(clock)) == pytest.approx(0.25)
    assert clock.log == ["prepare", "evict", "head start", "a", "synchronize"]


def test_many_calls_are_averaged_and_keep_their_caches(clock: Clock) -> None:
    assert measure.sample(Fake(clock, "a", 0.25, calls=4), evict(clock)) == 0.25
    assert clock.log == ["prepare", "a", "a", "a", "a"]


def test_slow_contenders_get_the_fewest_samples_and_fast_ones_the_most(clock: Clock) -> None:
    fakes = [Fake(clock, "slow", 2.0), Fake(clock, "middle", 0.125), Fake(clock, "fast", 0.001)]
    slow, middle, fast = measure.in_turn(fakes, EFFORT, evict(clock))
    assert [len(slow), len(middle), len(fast)] == [EFFORT.fewest, 8, EFFORT.most]
    assert set(slow) == {2.0}
    assert middle == pytest.approx([0.125] * 8)


def test_warm_up_calls_everyone_twice_and_lasts(clock: Clock) -> None:
    measure.in_turn([Fake(clock, "a", 0.001), Fake(clock, "b", 0.001)], EFFORT, lambda: clock.work("evict", 0.0))
    assert [name for name in clock.log if name in "ab"][:4] == ["a", "b", "a", "b"]
    assert Counter(clock.log)["a"] == 2 + EFFORT.most


def test_turns_are_spread_evenly() -> None:
    counts = [30, 10, 3]
    turns = measure.schedule(counts)
    assert [turns.count(i) for i in range(3)] == counts
    for i, count in enumerate(counts):  # each third of the run has its third of the samples
        third = len(turns) // 3
        for part in range(3):
            assert abs(turns[part * third : (part + 1) * third].count(i) - count / 3) <= 1
    neighbours = set(itertools.pairwise(turns))
    assert {(0, 1), (1, 0)} <= neighbours  # nobody always follows the same one


def test_no_turns_without_contenders() -> None:
    assert measure.schedule([]) == []


def test_quantiles() -> None:
    timing = Timing.of([0.001 * n for n in range(1, 12)])
    assert (timing.p20, timing.p50, timing.p80) == pytest.approx((3.0, 6.0, 9.0))
    assert timing.samples == 11


def test_copy_moves_every_byte_and_counts_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.machine, "last_level_cache_bytes", lambda device="cpu": 1 << 16)
    copy = measure.Copy(measure.CacheEvictor())
    assert copy.bytes == 1 << 18
    assert copy.gb_per_s(seconds=1e-3) == pytest.approx(2 * (1 << 18) / 1e6)
    for move in (copy._copy, copy._memmove):
        copy.source.random_()
        copy.destination.zero_()
        move()
        assert bool((copy.destination == copy.source).all()), move.__name__
