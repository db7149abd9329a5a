"""What the CPU core was built to reach, and whether a run reached it.

One entry a target, as a function of the results. It measures nothing. Next: docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from distil_fast.bench.cases import BF16, FP16, FP32, LOSS_SCALE, OVERHEAD, Case
from distil_fast.bench.results import Results

Value = Callable[[Results], "float | None"]
MIB = 1 << 20


class Target(NamedTuple):
    """A sentence, and a value that is to be at most (or else at least) a limit."""

    text: str
    value: Value
    limit: float
    at_most: bool = True


class Outcome(NamedTuple):
    """A target beside what was measured; None where the run did not measure it."""

    target: Target
    measured: float | None
    met: bool | None


def judge(results: Results) -> list[Outcome]:
    """Every target, measured and judged."""
    outcomes = []
    for target in TARGETS:
        measured = target.value(results)
        met = None
        if measured is not None:
            met = measured <= target.limit if target.at_most else measured >= target.limit
        outcomes.append(Outcome(target, measured, met))
    return outcomes


def of_floor(case: str) -> Value:
    """Time in floors."""

    def value(results: Results) -> float | None:
        row, ms = results.row(case, "ours"), results.ms(case, "ours")
        return ms / row.floor_ms if row and ms else None

    return value


def faster(case: str, than: str) -> Value:
    """How many times faster than eager or compiled torch."""

    def value(results: Results) -> float | None:
        row = results.row(case, "ours")
        return results.times_faster(row, than) if row else None

    return value


def ratio(case: str, to: str, contender: str = "ours", to_contender: str = "ours") -> Value:
    """Time over another time."""

    def value(results: Results) -> float | None:
        ms, other = results.ms(case, contender), results.ms(to, to_contender)
        return ms / other if ms and other else None

    return value


def memory_per_thread(results: Results) -> float | None:
    """MiB a thread beyond the gradient, at the shape that takes most."""
    peaks = [memory.peak_extra_bytes for memory in results.memory]
    return max(peaks) / MIB / results.machine["threads"] if peaks else None


def kl_ce(rows: int, cols: int, dtype: torch.dtype, temperature: float = 2.0, *, inplace: bool = True) -> str:
    """The name of a plain case."""
    return Case("KL+CE", rows, cols, dtype, inplace, temperature).name


def _targets() -> Iterator[Target]:
    main, main_bf16 = kl_ce(512, 30522, FP32), kl_ce(512, 30522, BF16)
    for t in (2.0, 3.7):
        case, fresh, bf16 = (
            kl_ce(512, 30522, FP32, t),
            kl_ce(512, 30522, FP32, t, inplace=False),
            kl_ce(512, 30522, BF16, t),
        )
        yield Target(f"{case}: floors", of_floor(case), 1.5)
        yield Target(f"{case}: floors (the stretch)", of_floor(case), 1.25)
        yield Target(f"{case}: x eager", faster(case, "eager"), 40, at_most=False)
        yield Target(f"{case}: x compiled", faster(case, "compiled"), 12, at_most=False)
        yield Target(f"{fresh}: x eager", faster(fresh, "eager"), 25, at_most=False)
        yield Target(f"{bf16}: x the fp32 time", ratio(bf16, case), 0.75)
        yield Target(f"{bf16}: x eager", faster(bf16, "eager"), 40, at_most=False)
    quarter = Case("KL+CE", 512, 30522, FP32, True, 2.0, grad_output=0.25).name
    yield Target(f"{quarter}: x the plain time", ratio(quarter, main), 2)
    scaled = Case("KL+CE", 512, 30522, FP16, True, 2.0, grad_output=LOSS_SCALE).name
    yield Target(f"{scaled}: x the plain fp32 time", ratio(scaled, main), 2)
    yield Target(f"{scaled}: x the plain bf16 time", ratio(scaled, main_bf16), 2)
    for cols in (128256, 151936):
        for dtype in (FP32, BF16):
            large = kl_ce(128, cols, dtype)
            yield Target(f"{large}: x eager", faster(large, "eager"), 30, at_most=False)
    shifted = Case("KL+CE", 512, 30522, FP32, True, 2.0, shifted=True).name
    yield Target(f"{shifted}: x the contiguous time", ratio(shifted, main), 1.1)
    yield Target(f"{main}: AVX2 over AVX-512", ratio(main, main, "ours avx2", "ours avx512"), 2)
    for case in ("cosine fp32 4096x768", "softmax fp32 512x30522", "softmax backward fp32 512x30522"):
        yield Target(f"{case}: floors", of_floor(case), 1.5)
    call, cross_entropy = (case.name for case in OVERHEAD)
    yield Target(f"{call}: x F.cross_entropy", ratio(call, cross_entropy, "ours", "eager"), 2)
    yield Target("memory beyond the gradient: MiB a thread", memory_per_thread, 2)


TARGETS = tuple(_targets())
