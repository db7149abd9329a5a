"""The table of cases: what is computed, on which shapes, and which contenders compute it.

A new row of the benchmark is a new entry here. It knows neither how a case is computed nor how it is timed.
Next: problems.py for what a case computes, contenders.py for who computes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPE_NAMES = {FP32: "fp32", FP16: "fp16", BF16: "bf16"}
LOSS_SCALE = 65536.0  # where torch.amp.GradScaler begins

TORCH = ("eager", "compiled", "ours")
AND_COMPILED = (*TORCH, "ours compiled")
IN_FLOAT32 = ("eager", "eager float32", "compiled float32", "ours")
INSTRUCTION_SETS = ("ours avx512_bf16", "ours avx512", "ours avx2", "ours portable")


@dataclass(frozen=True)
class Case:
    """One computation on one shape.

    Cases of one group are timed in turn with each other, because their times are compared. `calls` is how many calls
    one sample times: more than one where a call takes microseconds, which then also finds its data in cache.
    Linear problems have a `width`, of the hidden states, and a `teacher_width` where it differs.
    `first_calls` asks for a further row: calls that get memory which the process has never used before. `graph`: on a
    GPU, the call is captured in a graph once, and replayed. `labelled`: the share of rows that take part in the loss;
    the others have no label and no place in the divergence. `top_k`: of the teacher's columns, where it has them alone.
    """

    problem: str
    rows: int
    cols: int
    dtype: torch.dtype = FP32
    inplace: bool = False
    temperature: float | None = None
    grad_output: float = 1.0
    shifted: bool = False  # the rows are logits[:, :-1] of logits [4, rows / 4 + 1, cols]
    calls: int = 1
    contenders: tuple[str, ...] = TORCH
    group: str = ""
    first_calls: bool = False
    quick: bool = False
    device: str = "cpu"
    graph: bool = False
    width: int = 0
    teacher_width: int = 0
    labelled: float = 1.0
    top_k: int = 0

    @property
    def name(self) -> str:
        """What tells this case from every other."""
        parts = [self.problem, DTYPE_NAMES[self.dtype], f"{self.rows}x{self.cols}"]
        if self.top_k:
            parts.append(f"k={self.top_k}")
        if self.width:
            parts.append(f"H={self.width}" + (f"/{self.teacher_width}" if self.teacher_width else ""))
        elif self.temperature is not None:
            parts.append("in place" if self.inplace else "fresh")
        if self.temperature is not None:
            parts.append(f"T={self.temperature:g}")
        if self.labelled != 1.0:
            parts.append(f"labelled={self.labelled:.0%}")
        if self.grad_output != 1.0:
            parts.append(f"grad_output={self.grad_output:g}")
        if self.shifted:
            parts.append("logits[:, :-1]")
        if self.graph:
            parts.append("graph")
        return " ".join(parts)


def _divergences(rows: int, cols: int, dtype: torch.dtype, **options: Any) -> tuple[Case, ...]:
    """The divergences that other trainers have losses of, at their temperature of 1."""

    def case(problem: str, *others: str, **more: Any) -> Case:
        return Case(problem, rows, cols, dtype, contenders=("eager", "compiled", *others, "ours"), **more, **options)

    return (
        case("JSD", "liger", "trl"),
        case("soft CE", "torchtune", "torchtune chunked"),
        case("reverse KL", "liger", "trl", "torchtune", "torchtune chunked"),
        case("KL", "liger", "trl", temperature=2.0),
    )


_CALL = "call overhead"
_AT_2, _AT_37 = "512x30522 T=2", "512x30522 T=3.7"
_MAIN = (512, 30522)

LOSS: tuple[Case, ...] = (
    Case("KL+CE", *_MAIN, FP32, True, 2.0, contenders=(*AND_COMPILED, *INSTRUCTION_SETS[1:]), group=_AT_2, quick=True),
    Case("KL+CE", *_MAIN, FP32, False, 2.0, contenders=AND_COMPILED, group=_AT_2, first_calls=True, quick=True),
    Case("KL+CE", *_MAIN, FP32, True, 2.0, grad_output=0.25, group=_AT_2),
    Case("KL+CE", *_MAIN, FP16, True, 2.0, grad_output=LOSS_SCALE, contenders=IN_FLOAT32, group=_AT_2),
    Case("KL+CE", *_MAIN, FP32, True, 2.0, shifted=True, group=_AT_2),
    Case("KL+CE", *_MAIN, BF16, True, 2.0, contenders=(*AND_COMPILED, *INSTRUCTION_SETS), group=_AT_2, quick=True),
    Case("KL+CE", *_MAIN, FP32, True, 3.7, group=_AT_37),
    Case("KL+CE", *_MAIN, FP32, False, 3.7, group=_AT_37),
    Case("KL+CE", *_MAIN, BF16, True, 3.7, group=_AT_37),
    Case("KL+CE", 128, 128256, FP32, True, 2.0),
    Case("KL+CE", 128, 128256, BF16, True, 2.0),
    Case("KL+CE", 128, 151936, FP32, True, 2.0),
    Case("KL+CE", 128, 151936, BF16, True, 2.0),
    Case("softmax", *_MAIN),
    Case("softmax backward", *_MAIN),
    Case("cosine", 4096, 768),
    *(case for dtype in (FP32, BF16) for case in _divergences(*_MAIN, dtype)),
    Case("top-k KL", *_MAIN, FP32, temperature=2.0, top_k=64),
    Case("KL+CE", *_MAIN, FP32, temperature=2.0, labelled=0.15),
)

OVERHEAD: tuple[Case, ...] = (
    Case("KL+CE", 4, 16, FP32, False, 2.0, calls=200, contenders=AND_COMPILED, group=_CALL, quick=True),
    Case("CE", 4, 16, calls=200, group=_CALL, quick=True),
)

# hidden states of 8 x 512 tokens, all of them real or four of five; attention maps of 12 heads over 8 x 128 tokens
HIDDEN: tuple[Case, ...] = tuple(
    case
    for dtype in (FP32, BF16)
    for case in (
        Case("cosine", 4096, 768, dtype, quick=True),
        Case("cosine", 4096, 768, dtype, labelled=0.8),
        Case("MSE", 4096, 768, dtype, quick=True),
        Case("MSE", 4096, 768, dtype, labelled=0.8),
        Case("attention KL", 12288, 128, dtype, quick=True),
    )
)

# peak memory alone, not timed: in place, where all that is used is beyond the gradient
MEMORY: tuple[Case, ...] = tuple(
    Case("KL+CE", rows, cols, dtype, True, 2.0, contenders=("ours",))
    for rows, cols, dtype in ((64, 30522, FP32), (64, 151936, FP32), (512, 151936, FP32), (512, 151936, BF16))
)

PRODUCTS = "products"  # the four matrix products of the heads alone: the yardstick of linear cases
WITH_HEADS = (PRODUCTS, "eager", "compiled", "liger", "ours")
HEAD_PEERS = {
    "linear KL": ("liger", "liger triton", "trl", "fla"),
    "linear JSD": ("liger", "liger triton", "trl"),
    "linear CE": ("liger triton", "fla", "cut-cross-entropy", "quack"),
}
GPU_ROWS = 8192
VOCABULARIES = (30522, 32000, 50257, 128256, 151936, 256000)


def _heads(rows: int, cols: int, dtype: torch.dtype, **options: Any) -> tuple[Case, ...]:
    """The fused heads that other libraries have, at a temperature of 1."""
    fast = ("ours fast",) if dtype != FP32 else ()
    return tuple(
        Case(problem, rows, cols, dtype, contenders=(PRODUCTS, "eager", "compiled", *peers, "ours", *fast), **options)
        for problem, peers in HEAD_PEERS.items()
    )


LINEAR: tuple[Case, ...] = (
    *(
        Case("linear KL+CE", 1024, 30522, dtype, contenders=contenders, width=width, quick=width == 384)
        for width in (384, 768)
        for dtype, contenders in ((FP32, WITH_HEADS), (BF16, (*WITH_HEADS, "ours fast")))
    ),
    *(
        Case("linear KL+CE", 512, cols, FP32, contenders=WITH_HEADS, width=384, quick=True)
        for cols in (30522, 50257, 128256, 151936)
    ),
    *(case for dtype in (FP32, BF16) for case in _heads(512, 30522, dtype, width=384)),
)
ON_GPU = ("eager", "compiled", "liger", "ours", "ours cuda", "ours triton")


def _gpu() -> Iterator[Case]:
    def case(problem: str, cols: int, dtype: torch.dtype = BF16, rows: int = GPU_ROWS, **options: Any) -> Case:
        return Case(problem, rows, cols, dtype, **{"contenders": ON_GPU, "device": "cuda", **options})

    for cols in VOCABULARIES:
        for temperature in (2.0, 3.7):
            traced = ("ours compiled",) if cols == VOCABULARIES[0] else ()
            contenders = (*ON_GPU, *traced)
            yield case("KL+CE", cols, temperature=temperature, contenders=contenders, quick=bool(traced))
    for cols in (30522, 128256):
        yield case("KL+CE", cols, FP32, temperature=2.0)
        yield case("KL+CE", cols, temperature=2.0, inplace=True)
        yield case("KL+CE value", cols, temperature=2.0)
        yield case("CE", cols, contenders=(*ON_GPU, "quack"))
        yield case("softmax", cols)
        yield case("softmax backward", cols)
    yield case("KL+CE", 30522, temperature=2.0, grad_output=0.25)
    yield case("KL+CE", 30522, FP16, temperature=2.0, grad_output=LOSS_SCALE)
    yield case("cosine", 768)
    for cols in (30522, 128256):
        yield from _divergences(GPU_ROWS, cols, BF16, device="cuda")
        yield from _heads(GPU_ROWS, cols, BF16, width=2048, teacher_width=4096, device="cuda")
    for rows in (4096, GPU_ROWS):
        contenders = (*WITH_HEADS, "ours fast")
        yield case("linear KL+CE", 128256, rows=rows, contenders=contenders, width=2048, teacher_width=4096)
    yield case("KL+CE", 30522, rows=32, temperature=2.0, graph=True, quick=True)


GPU = tuple(_gpu())

SUITES: dict[str, tuple[Case, ...]] = {
    "loss": (*LOSS, *OVERHEAD),
    "linear": LINEAR,
    "hidden": HIDDEN,
    "overhead": OVERHEAD,
    "gpu": GPU,
}


def on_device(suite: str, device: str) -> Sequence[Case]:
    """The cases of a suite on a device. Those of "loss" and "linear" on a GPU are GPU's, of its sizes."""
    if device == "cpu" or suite == "gpu":
        return SUITES[suite]
    if suite in ("hidden", "overhead"):
        return tuple(replace(case, device=device) for case in SUITES[suite])
    return tuple(case for case in GPU if bool(case.width) == (suite == "linear"))


QUICK = "quick"  # the suite of a newcomer: quick.py


class Selectable(Protocol):
    """What every case has, of a loss or of training."""

    @property
    def name(self) -> str: ...
    @property
    def quick(self) -> bool: ...


AnyCase = TypeVar("AnyCase", bound=Selectable)


def select(cases: Sequence[AnyCase], *, quick: bool = False, containing: str = "") -> list[AnyCase]:
    """The cases of the quick run, or all, whose name contains a text."""
    return [case for case in cases if (case.quick or not quick) and containing in case.name]


def groups(cases: Sequence[Case]) -> list[list[Case]]:
    """The cases that are timed in turn with each other; a case without a group is one by itself."""
    by_group: dict[str, list[Case]] = {}
    for case in cases:
        by_group.setdefault(case.group or case.name, []).append(case)
    return list(by_group.values())
