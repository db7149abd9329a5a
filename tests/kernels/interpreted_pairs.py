"""Squared distance and KL of probabilities in the interpreter: the CPU's own tests, on the Triton kernels.

Run by test_interpreter.py. What is imported here is collected here, and a fixture puts the Triton backend in the native
core's place. Left out is what is about the CPU itself: threads, float64, instruction sets. Next: kernels/pairs.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distil_fast import backends
from distil_fast.backends import native
from distil_fast.backends import triton as backend
from tests import test_pairs
from tests.kernels.interpreter import HALVES, MIXES, Guarded
from tests.test_pairs import (  # noqa: F401
    test_entries_masked_in_both_count_nothing,
    test_exact_as_the_student_meets_the_teacher,
    test_rows_that_are_not_normalised,
    test_tiny_probabilities,
    test_unused_rows_reach_nothing,
    test_what_is_no_probability,
    test_where_a_probability_is_zero,
)

kinds = pytest.mark.parametrize("kind", test_pairs.KINDS)


@pytest.fixture
def instruction_set() -> str:
    return "Triton's interpreter"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "pair_loss", backend.pair_loss)


@kinds
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(d).removeprefix("torch.") for d in mix))
def test_values_and_gradients(
    mix: tuple[torch.dtype, torch.dtype], kind: str, monkeypatch: pytest.MonkeyPatch, instruction_set: str
) -> None:
    monkeypatch.setattr(test_pairs, "SIZES", [1, 2, 33, 2500])
    test_pairs.test_pair_values_and_gradients(instruction_set, mix, kind)


@kinds
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_same_in_both(instruction_set: str, kind: str, dtype: torch.dtype) -> None:
    test_pairs.test_the_same_in_both(instruction_set, kind, dtype)


@kinds
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mask", ["bool", "weights"])
def test_masks_and_reductions(mask: str, reduction: str, dtype: torch.dtype, kind: str) -> None:
    test_pairs.test_masks_and_reductions(mask, reduction, dtype, kind)


@kinds
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_bad_row_is_bad_alone(instruction_set: str, value: float, kind: str) -> None:
    test_pairs.test_a_bad_row_is_bad_alone(instruction_set, 20, value, torch.bfloat16, kind)


@kinds
def test_units(instruction_set: str, kind: str) -> None:
    test_pairs.test_fp16_units_hold_large_gradients(instruction_set, kind)


LAYOUTS: list[dict[str, int]] = [{}, {"offset": 3, "gap": 5}, {"gap": 8, "outer_gap": 16}, {"offset": 8, "gap": 1}]


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(kind: str, dtype: torch.dtype) -> None:
    """Rows that begin anywhere in a sea of nan, which shows what is read or written outside of them."""
    values = [x.to(dtype).view(2, 2, 77) for x in test_pairs.pair_of(kind, 77)]
    expected: tuple[Tensor, Tensor, float] | None = None
    for s_layout in LAYOUTS:
        for t_layout in LAYOUTS:
            student, teacher = Guarded(values[0], **s_layout), Guarded(values[1], **t_layout)
            found = test_pairs.stored(kind, student.rows, teacher.rows)
            student.check()
            teacher.check()
            expected = expected or found
            torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
            assert torch.equal(found[1], expected[1])


@kinds
def test_counts_and_faults(kind: str) -> None:
    student, teacher = (x.float() for x in test_pairs.pair_of(kind, 40, rows=3))

    def call(mask: Tensor | None, count: Any, **how: Any) -> Any:
        return backend.pair_loss(student, teacher, mask, 1.0, count, kind, 0.5, "mean", **how)

    assert call(None, 6.0)[0].item() == pytest.approx(call(None, -1.0)[0].item() / 2)
    for zero in (0, torch.tensor(0)):
        loss, term, grad, _ = call(None, zero, gradient=True)
        assert loss == term == 0
        assert not grad.any()
    bad = torch.tensor([1.0, -1.0, 1.0])
    loss, _, grad, _ = call(bad, -1.0, gradient=True)
    assert math.isnan(loss)
    assert grad.any(-1).tolist() == [True, False, True]
    with backends.checked(), pytest.raises(ValueError, match=r"mask: .*got -1\.0 in row 1"):
        call(bad, -1.0)
    nothing = torch.empty(0, 40)
    assert backend.pair_loss(nothing, nothing.clone(), None, 1.0, -1.0, kind, 1.0, "mean", gradient=True)[0] == 0
