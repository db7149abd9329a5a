"""The row loss with a top-k teacher against its fp64 definition: divergences x tails x dtypes x instruction sets, ragged
rows, every argument, and what is refused.

Autograd's and the compiler's side is test_ops.py's and test_compile.py's, memory's test_row_loss_memory.py's. Next:
topk.py, which has the cases and their bounds.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests import oracle, topk

HALVES = (torch.float32, torch.bfloat16, torch.float16)


@cache  # one truth for all instruction sets
def matrix(divergence: str, dtypes: tuple[torch.dtype, ...]) -> list[topk.Case]:
    return topk.cases(oracle.DIVERGENCES[divergence], dtypes)


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_matrix(instruction_set: str, divergence: str) -> None:
    for where, student, teacher, labels, settings, truth in matrix(divergence, HALVES):
        topk.by_backend(student, teacher, labels, **settings).check(truth, f"{instruction_set} {where}")


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_matrix_in_double_precision(divergence: str) -> None:
    for where, student, teacher, labels, settings, truth in matrix(divergence, (torch.float64,)):
        topk.by_backend(student, teacher, labels, **settings).check(truth, where)
