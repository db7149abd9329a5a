"""Cases made to order: every combination of vocabularies, rows, dtypes, temperatures, shares of labels and top-k.

It knows neither contenders' code nor time. Next: cases.py, whose own table this stands beside; room.py, which leaves
out what does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from distil_fast.bench.cases import FP32, LINEAR, ON_GPU, PRODUCTS, TORCH, Case

PEERS = {"KL+CE": (), "JSD": ("liger", "trl"), "top-k KL": ()}
LINEAR_PEERS = {"linear KL+CE": ("liger",), "linear JSD": ("liger", "liger triton", "trl")}
GPU_WIDTHS = (2048, 4096)  # of student and teacher


@dataclass(frozen=True)
class Axes:
    """What was asked for; an axis without values has the one of the main case."""

    vocab: Sequence[int] = ()
    rows: Sequence[int] = ()
    dtype: Sequence[torch.dtype] = ()
    temperature: Sequence[float] = ()
    labelled: Sequence[float] = ()
    top_k: Sequence[int] = ()

    def __bool__(self) -> bool:
        return any((self.vocab, self.rows, self.dtype, self.temperature, self.labelled, self.top_k))


def made(suite: str, axes: Axes, device: str) -> list[Case]:
    """The cases of "loss" (KL+CE, JSD, and with top_k the top-k KL alone) or "linear" (KL+CE and JSD of heads).

    Raises:
        ValueError: another suite; a top-k of linear cases, or one larger than a vocabulary.
    """
    if suite not in ("loss", "linear"):
        raise ValueError(f"expected suite loss or linear for cases made to order, got {suite}")
    if suite == "linear" and axes.top_k:
        raise ValueError("expected no top-k for suite linear, whose teacher is hidden states; ask suite loss")
    combinations = product(
        axes.vocab or (30522,),
        axes.rows or (512,),
        axes.dtype or (FP32,),
        axes.temperature or (2.0,),
        axes.labelled or (1.0,),
        axes.top_k or (0,),
    )
    return [case for combination in combinations for case in _at(suite, device, *combination)]


def _at(
    suite: str, device: str, cols: int, rows: int, dtype: torch.dtype, temperature: float, labelled: float, top_k: int
) -> Iterator[Case]:
    if top_k > cols:
        raise ValueError(f"expected a top-k of at most {cols}, the vocabulary, got {top_k}")
    width, teacher_width = GPU_WIDTHS if device == "cuda" else (LINEAR[0].width, 0)
    problems = LINEAR_PEERS if suite == "linear" else PEERS
    for problem, peers in problems.items():
        if suite == "loss" and (problem == "top-k KL") != bool(top_k):
            continue
        contenders = (*(ON_GPU if device == "cuda" and problem == "KL+CE" else TORCH), *peers)
        if suite == "linear":
            contenders = (PRODUCTS, *contenders, *(("ours fast",) if dtype != FP32 else ()))
        yield Case(
            problem,
            rows,
            cols,
            dtype,
            temperature=temperature,
            contenders=contenders,
            device=device,
            width=width if suite == "linear" else 0,
            teacher_width=teacher_width if suite == "linear" else 0,
            labelled=labelled,
            top_k=top_k,
        )
