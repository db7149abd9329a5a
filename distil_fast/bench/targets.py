"""What the kernels were built to reach, on a CPU with AVX-512 and on an H200, and whether a run reached it.

One entry a target, as a function of the results. It measures nothing. Next: docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from distil_fast.bench.cases import BF16, FP16, FP32, GPU_ROWS, LOSS_SCALE, OVERHEAD, VOCABULARIES, Case
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


def of_floor(case: str, contender: str = "ours") -> Value:
    """Time in floors."""

    def value(results: Results) -> float | None:
        row, ms = results.row(case, contender), results.ms(case, contender)
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


def milliseconds(case: str) -> Value:
    """Time."""
    return lambda results: results.ms(case, "ours")


def beyond_gradient(case: Case) -> Value:
    """MiB of peak memory beyond inputs and gradient."""

    def value(results: Results) -> float | None:
        row = results.row(case.name, "ours")
        if row is None or row.peak_extra_bytes is None:
            return None
        return (row.peak_extra_bytes - case.rows * case.cols * case.dtype.itemsize) / MIB

    return value


def _gpu_targets() -> Iterator[Target]:
    def case(
        problem: str, cols: int, dtype: torch.dtype = BF16, t: float | None = 2.0, rows: int = GPU_ROWS, **options: Any
    ) -> Case:
        return Case(problem, rows, cols, dtype, temperature=t, **options)

    for cols in VOCABULARIES:
        at_2, at_37 = (case("KL+CE", cols, t=t) for t in (2.0, 3.7))
        for at in (at_2, at_37):
            yield Target(f"{at.name}, CUDA: floors", of_floor(at.name, "ours cuda"), 1 / 0.85)
            yield Target(f"{at.name}, CUDA: floors (the stretch)", of_floor(at.name, "ours cuda"), 1 / 0.92)
            for than, limit in (("eager", 8), ("compiled", 2.5), ("liger", 5)):
                yield Target(f"{at.name}: x {than}", faster(at.name, than), limit, at_most=False)
            yield Target(f"{at.name}: MiB beyond the gradient", beyond_gradient(at), 1)
        yield Target(f"{at_37.name}: x the time at T=2", ratio(at_37.name, at_2.name, "ours cuda", "ours cuda"), 1.15)
        if cols <= 128256:
            limit = 2 if cols == 128256 else 1 / 0.75
            yield Target(f"{at_2.name}, Triton: floors", of_floor(at_2.name, "ours triton"), limit)
    for cols in (30522, 128256):
        full = case("KL+CE", cols, FP32).name
        yield Target(f"{full}: floors", of_floor(full), 1 / 0.92)
        for problem, t in (
            ("KL+CE value", 2.0),
            ("KL", 2.0),
            ("CE", None),
            ("softmax", None),
            ("softmax backward", None),
        ):
            name = case(problem, cols, t=t).name
            yield Target(f"{name}: floors", of_floor(name), 1 / 0.85)
    cosine = case("cosine", 768, t=None).name
    yield Target(f"{cosine}: floors", of_floor(cosine), 1 / 0.85)
    plain = case("KL+CE", 30522).name
    for other in (case("KL+CE", 30522, grad_output=0.25), case("KL+CE", 30522, FP16, grad_output=LOSS_SCALE)):
        yield Target(f"{other.name}: x the plain time", ratio(other.name, plain), 1.8)
    small = case("KL+CE", 30522, rows=32, graph=True).name
    yield Target(f"{small}: ms", milliseconds(small), 0.015)


TARGETS = (*_targets(), *_gpu_targets())
