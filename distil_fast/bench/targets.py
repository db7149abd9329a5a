"""What the kernels were built to reach, on a CPU with AVX-512 and on an H200, and whether a run reached it.

One entry a target, as a function of the results. It measures nothing. Next: docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from distil_fast.bench import train_cases
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


def fact(case: str, contender: str, name: str, unit: float = 1.0) -> Value:
    """A number of a contender that is no time."""

    def value(results: Results) -> float | None:
        row = results.row(case, contender)
        return row.facts[name] / unit if row and name in row.facts else None

    return value


def peak_ratio(case: str, contender: str, to: str) -> Value:
    """Peak memory over another's."""

    def value(results: Results) -> float | None:
        row, other = results.row(case, contender), results.row(case, to)
        if not row or not other or row.peak_extra_bytes is None or not other.peak_extra_bytes:
            return None
        return row.peak_extra_bytes / other.peak_extra_bytes

    return value


def _train_targets() -> Iterator[Target]:
    original, eager, compiled, ours = train_cases.ORIGINAL, train_cases.EAGER, train_cases.COMPILED, train_cases.OURS
    masked = ours + train_cases.MASKED
    wanted = (  # who, faster than whom, on a CPU, on an H200
        (ours, original, 3, 2),
        (masked, original, 6.5, 3),
        (ours, eager, 1.5, 1.4),
        (ours, compiled, 1.1, 1.05),
    )
    for case in (train_cases.TRAIN[0], train_cases.TRAIN_GPU[0]):
        on_gpu = case.device == "cuda"
        for who, than, cpu, gpu in wanted:
            faster_than = ratio(case.name, case.name, than, who)
            yield Target(f"{case.name}: {who}, x {than}", faster_than, gpu if on_gpu else cpu, at_most=False)
        for who in (ours, masked):
            yield Target(f"{case.name}: {who}, host syncs", fact(case.name, who, train_cases.SYNCS), 0)
        if on_gpu:
            yield Target(f"{case.name}: peak memory of the original's", peak_ratio(case.name, ours, original), 0.5)
    base, student, encoder = train_cases.BERT_BASE, train_cases.DISTILBERT, train_cases.ENCODERS[0].name
    for who, limit in ((base, 109.49), (student, 66.37)):
        yield Target(f"{who}: million parameters", fact(encoder, who, train_cases.PARAMETERS, 1e6), limit)
    for sentence in train_cases.ENCODERS:
        times = ratio(sentence.name, sentence.name, base, student)
        yield Target(f"{sentence.name}: {student}, x {base}", times, 1.6, at_most=False)


TARGETS = (*_targets(), *_gpu_targets(), *_train_targets())
