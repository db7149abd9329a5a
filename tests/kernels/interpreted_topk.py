"""The kernel for top-k teachers against its fp64 definition: divergences x tails x dtypes, ragged rows, and faults.

Run by test_interpreter.py. The cases and their bounds are tests/topk.py's. Next: interpreted_options.py.
"""

from __future__ import annotations

import math

import pytest

from distil_fast.backends import triton as backend
from tests import oracle, topk
from tests.kernels.interpreter import HALVES

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_matrix_in_turns(divergence: str) -> None:
    turn = list(oracle.DIVERGENCES).index(divergence)
    for where, student, teacher, labels, settings, truth in topk.cases(oracle.DIVERGENCES[divergence], HALVES)[
        turn % 3 :: 3
    ]:
        topk.by_backend(student, teacher, labels, backend=backend, **settings).check(truth, where)
