"""The row kernel's conventions: what is never read, infinities and nan, and values at fault that only the device sees.

Run by test_interpreter.py. Expectations are closed forms in float64. Next: interpreted_softmax.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distil_fast import backends
from tests import oracle
from tests.kernels.interpreter import HALVES, check, row_loss

INF, NAN = math.inf, math.nan


def logits(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    student, teacher = oracle.logit_pair("plain", rows, cols, oracle.generator("conventions", cols))
    return student.to(dtype), teacher.to(dtype)


# ------------------------------------------------------------------------------------------------ not read


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_unused_rows_are_not_read(dtype: torch.dtype, reduction: str) -> None:
    """Row 1 has no soft term: its teacher is nan. Row 2 has neither term: so is its student, and its temperature."""
    student, teacher = logits(4, 40, dtype)
    labels = torch.tensor([3, 5, -100, -100])
    mask = torch.tensor([1.0, 0.0, 0.0, 2.0])
    temperature = torch.tensor([2.0, 2.0, NAN, 1.0])
    clean = student.clone(), teacher.clone()
    teacher[1:3], student[2] = NAN, NAN
    settings: dict[str, Any] = {"soft_mask": mask, "reduction": reduction}
    upstream = torch.ones(4) if reduction == "none" else None
    values, grad, unit = row_loss(
        student, teacher, labels, gradient="inplace", temperature=temperature, upstream=upstream, **settings
    )
    temperature[2] = 1.0
    truth = oracle.exact(*clean, labels, upstream, temperature=temperature, **settings)
    oracle.check_values(values, truth, "unused rows")
    oracle.check_gradient(grad, truth, "unused rows", float(unit))


def test_a_term_of_weight_zero_is_not_read() -> None:
    """Neither by number nor by tensor: teacher and mask of nan, labels out of range."""
    student, teacher = logits(3, 40)
    nothing, wild = torch.full_like(teacher, NAN), torch.tensor([99, -7, 4000])
    labels = torch.tensor([1, 2, 3])
    for zero in (0.0, torch.tensor(0.0)):
        hard, grad, _ = row_loss(student, nothing, labels, soft_weight=zero, soft_mask=torch.full((3,), NAN))
        oracle.check_values(hard, oracle.exact(student, None, labels, soft_weight=0.0), "hard alone")
        assert grad.isfinite().all()
        soft, grad, _ = row_loss(student, teacher, wild, hard_weight=zero)
        oracle.check_values(soft, oracle.exact(student, teacher), "soft alone")
        assert grad.isfinite().all()
        values, grad, _ = row_loss(nothing, nothing, wild, soft_weight=zero, hard_weight=zero)
        assert not any(v.any() for v in values.values())
        assert not grad.any()


# ------------------------------------------------------------------------------------------------ infinities


# Whose masked columns make a divergence infinite.
MASKED = ("both", "teacher", "student")
INFINITE = {"forward_kl": "student", "soft_cross_entropy": "student", "reverse_kl": "teacher"}


def masked(values: Tensor, columns: Tensor) -> Tensor:
    return values.masked_fill(columns, -INF)


@pytest.mark.parametrize("who", MASKED)
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_masked_columns(divergence: str, who: str) -> None:
    """-inf in both: 0, gradient 0. In one: finite, or an infinite loss with or without a gradient (docs/math.md, 4).

    Dtypes take turns: each with every divergence, and with every model.
    """
    dtype = HALVES[(list(oracle.DIVERGENCES).index(divergence) + MASKED.index(who)) % 3]
    student, teacher = logits(2, 101, dtype)
    columns = torch.arange(101) % 3 == 0
    settings = {"divergence": oracle.DIVERGENCES[divergence], "reduction": "sum", "t_squared": False}
    s = student if who == "teacher" else masked(student, columns)
    t = teacher if who == "student" else masked(teacher, columns)
    values, grad, unit = row_loss(s, t, **settings)
    expected, gradient = oracle.closed_form(settings["divergence"], s, t, 2.0)
    infinite = who == INFINITE.get(divergence)
    assert expected.isinf().all() == infinite, "the test's own expectation"
    torch.testing.assert_close(values["soft"].double(), expected.sum(), rtol=4e-6, atol=0)
    final = grad.double() * float(unit)
    if divergence == "reverse_kl" and infinite:
        assert final.isnan().any(-1).all()
        return
    assert (final[gradient == 0] == 0).all()
    relative = {torch.float32: 4e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    assert ((final - gradient).norm(dim=-1) <= relative * gradient.norm(dim=-1)).all()


@pytest.mark.parametrize("bad", [-INF, INF, NAN], ids=["wholly -inf", "+inf", "nan"])
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_a_row_without_a_distribution_is_nan_alone(where: str, bad: float) -> None:
    student, teacher = logits(3, 40)
    labels = torch.tensor([1, 2, 3])
    target = student if where == "student" else teacher
    target[1, slice(None) if bad == -INF else 7] = bad
    ones = torch.ones(3)
    values, grad, _ = row_loss(student, teacher, labels, reduction="none", upstream=ones)
    assert values["loss"].isnan().tolist() == [False, True, False]
    assert grad.isnan().any(-1).tolist() == [False, True, False]
    clean = logits(3, 40)
    truth = oracle.exact(*clean, labels, ones, reduction="none")
    for row in (0, 2):
        assert (grad[row].double() - truth.grad[row]).norm() <= 3e-6 * truth.grad[row].norm()


def test_labels_with_a_masked_logit() -> None:
    """Infinite loss, and the gradient of any other label."""
    student, _ = logits(2, 40)
    student[:, :10] = -INF
    values, grad, _ = row_loss(student, None, torch.tensor([0, 12]), reduction="none", upstream=torch.ones(2))
    assert values["hard"][0] == INF
    assert values["hard"][1].isfinite()
    expected = student.double().softmax(-1)
    expected[[0, 1], [0, 12]] -= 1.0
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-9)


def test_huge_logits_and_the_lowest_number_as_a_mask() -> None:
    student, teacher = logits(2, 40)
    lowest = torch.finfo(torch.float32).min
    student[:, 20:] = lowest
    teacher[:, 20:] = lowest
    values, grad, _ = row_loss(student, teacher, temperature=1.0, reduction="sum")
    expected, gradient = oracle.closed_form("forward_kl", student[:, :20], teacher[:, :20], 1.0)
    torch.testing.assert_close(values["soft"].double(), expected.sum(), rtol=4e-6, atol=0)
    torch.testing.assert_close(grad[:, :20].double(), gradient, rtol=1e-4, atol=1e-8)
    assert not grad[:, 20:].any()
    check(1e4 * logits(2, 40)[0], 1e4 * logits(2, 40)[1])


# ------------------------------------------------------------------------------------------------ at fault

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "label too large": ({"labels": torch.tensor([1, 40, 41, 2])}, "labels: expected 0 <= label < 40 .*got 40 in row 1"),
    "label negative": ({"labels": torch.tensor([1, -1, -5, 2])}, "labels: .*got -1 in row 1"),
    "label far outside": ({"labels": torch.tensor([1, 2**62, -(2**62), 2])}, "labels: .*in row 1"),
    "weight negative": ({"soft_mask": torch.tensor([1.0, -2.0, -1.0, 1.0])}, r"soft_mask: .*got -2\.0 in row 1"),
    "weight nan": ({"soft_mask": torch.tensor([1.0, NAN, INF, 1.0])}, "soft_mask: .*got nan in row 1"),
    "temperature": ({"temperature": torch.tensor([1.0, 0.0, NAN, 2.0])}, r"temperature: .*got 0\.0 in row 1"),
    "temperature extreme": ({"temperature": torch.tensor([1.0, 1e16, -1.0, 2.0])}, "temperature: .*in row 1"),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_rows_at_fault(fault: str, dtype: torch.dtype) -> None:
    """Rows 1 and 2: nan for a loss and a gradient of exactly 0. The others are as if those two were not there."""
    student, teacher = logits(4, 40, dtype)
    settings = {"labels": torch.tensor([1, 5, 6, 2]), "temperature": 2.0} | FAULTS[fault][0]
    labels = settings.pop("labels")
    values, _, _ = row_loss(student, teacher, labels, reduction="none", gradient="no", **settings)
    assert values["loss"].isnan().tolist() == [False, True, True, False]
    values, grad, unit = row_loss(student, teacher, labels, soft_count=4.0, hard_count=4.0, **settings)
    assert values["loss"].isnan()
    assert not grad[1:3].any()
    rest = [0, 3]
    settings = {k: v[rest] if isinstance(v, Tensor) else v for k, v in settings.items()}
    truth = oracle.exact(student[rest], teacher[rest], labels[rest], soft_count=4.0, hard_count=4.0, **settings)
    oracle.check_gradient(grad[rest], truth, fault, float(unit))


def test_one_term_alone_at_fault() -> None:
    student, teacher = logits(4, 40)
    at_fault = [False, True, True, False]
    hard, _, _ = row_loss(student, None, torch.tensor([1, 40, -1, 2]), reduction="none", gradient="no")
    assert hard["loss"].isnan().tolist() == hard["hard"].isnan().tolist() == at_fault
    assert not hard["soft"].any()
    mask = torch.tensor([1.0, -1.0, INF, 1.0])
    soft, _, _ = row_loss(student, teacher, soft_mask=mask, reduction="none", gradient="no")
    assert soft["loss"].isnan().tolist() == soft["soft"].isnan().tolist() == at_fault
    assert not soft["hard"].any()


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checking_mode_raises(fault: str) -> None:
    student, teacher = logits(4, 40)
    settings, message = FAULTS[fault]
    settings = {"labels": torch.tensor([1, 5, 6, 2])} | settings
    labels = settings.pop("labels")
    with backends.checked(), pytest.raises(ValueError, match=message):
        row_loss(student, teacher, labels, **settings)


def test_the_checking_mode_lets_good_values_pass() -> None:
    student, teacher = logits(4, 40)
    with backends.checked():
        check(student, teacher, torch.tensor([1, -100, 6, 2]), soft_mask=torch.tensor([1.0, 0.0, 1.0, 2.0]))


def test_unused_rows_cannot_be_at_fault() -> None:
    student, teacher = logits(2, 40)
    mask, temperature = torch.tensor([1.0, 0.0]), torch.tensor([2.0, NAN])
    with backends.checked():
        values, grad, _ = row_loss(student, teacher, soft_mask=mask, temperature=temperature)
    assert values["loss"].isfinite()
    assert grad.isfinite().all()
