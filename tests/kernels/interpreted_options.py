"""The row kernel's options against the fp64 oracle: forms of teacher, softcaps and scales, z-loss, class weights.

Run by test_interpreter.py. Values at fault have closed expectations: nan for their rows, a gradient of 0, and an error
in the checking mode. Next: interpreted_conventions.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distil_fast import backends
from tests import oracle
from tests.kernels.interpreted_row_loss import case, name_of
from tests.kernels.interpreter import HALVES, MIXES, Guarded, check, row_loss

INF, NAN = math.inf, math.nan
FORMS = ("log_probs", "probs")
CAPPED: dict[str, Any] = {"student_softcap": 5.0, "teacher_softcap": 30.0, "teacher_logit_scale": 2.0}
SCALED: dict[str, Any] = {"student_logit_scale": 0.37, "teacher_logit_scale": 1.7}
EVERYTHING: dict[str, Any] = {
    "student_logit_scale": 1.5, "student_softcap": 8.0, "z_loss": 1e-2, "soft_weight": -0.5, "hard_weight": 2.0,
    "temperature": torch.tensor([1.0, 2.0, 0.7, 3.7]), "soft_mask": torch.tensor([0.5, 2.0, 0.0, 1.5]),
}  # fmt: skip


def given_as(form: str, logits: Tensor, temperature: Tensor | float, dtype: torch.dtype) -> Tensor:
    """A teacher's distribution at the temperature, as `form` has it."""
    by = torch.as_tensor(temperature).double()
    log_probs = (logits.double() / (by.unsqueeze(-1) if by.dim() else by)).log_softmax(-1)
    return (log_probs if form == "log_probs" else log_probs.exp()).to(dtype)


# ------------------------------------------------------------------------------------------------ the teacher's form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_a_teacher_by_its_probabilities(divergence: str, form: str) -> None:
    turn = list(oracle.DIVERGENCES).index(divergence)
    mix, temperature = MIXES[turn % 9], (2.0, 1.0, 3.7)[turn % 3]
    student, teacher, labels = case(("plain", "close")[turn % 2], (2, (17, 300)[turn % 2]), mix, turn)
    given = given_as(form, teacher, temperature, mix[1])
    settings = {"divergence": oracle.DIVERGENCES[divergence], "temperature": temperature, "teacher_form": form}
    check(student, given, labels, form, **settings)


@pytest.mark.parametrize("form", FORMS)
def test_probabilities_that_do_not_sum_to_one_are_normalised(form: str) -> None:
    student, teacher, labels = case("plain", (2, 60), MIXES[0])
    half = given_as(form, teacher, 2.0, torch.float32)[:, :40].contiguous()
    check(student[:, :40].contiguous(), half, labels.clamp(max=39), form, teacher_form=form)


@pytest.mark.parametrize("form", FORMS)
def test_a_probability_of_zero_is_a_masked_column(form: str) -> None:
    student, teacher, _ = case("plain", (2, 40), MIXES[0])
    teacher[:, ::3] = -INF
    given = given_as(form, teacher, 2.0, torch.float32)
    student[:, ::3] = -INF
    values, grad, _ = row_loss(student, given, teacher_form=form, reduction="sum", t_squared=False)
    expected, gradient = oracle.closed_form("forward_kl", student, teacher, 2.0)
    torch.testing.assert_close(values["soft"].double(), expected.sum(), rtol=4e-6, atol=0)
    torch.testing.assert_close(grad.double(), gradient, rtol=2e-4, atol=1e-9)
    assert not grad[:, ::3].any()


# ------------------------------------------------------------------------------------------------ transforms


@pytest.mark.parametrize("mix", [MIXES[0], MIXES[4], MIXES[7]], ids=name_of)
@pytest.mark.parametrize("transform", [CAPPED, SCALED], ids=["capped", "scaled"])
def test_transforms(transform: dict[str, Any], mix: tuple[torch.dtype, torch.dtype]) -> None:
    for kind, divergence in (("plain", "reverse_kl"), ("far", "jsd"), ("close", "forward_kl")):
        student, teacher, labels = case(kind, (2, 100), mix)
        check(student, teacher, labels, kind, divergence=divergence, label_smoothing=0.1, **transform)
        check(student, teacher, labels, kind, divergence=divergence, gradient="inplace", temperature=1.0, **transform)


def test_a_cap_of_small_logits_keeps_their_digits() -> None:
    """tanh(x) of 1e-5, and a cap that is never felt, where (1 - e) / (1 + e) would have no digits left."""
    student, teacher, labels = case("plain", (2, 300), MIXES[0])
    check(1e-3 * student, 1e-3 * teacher, labels, student_softcap=50.0, teacher_softcap=50.0, temperature=1e-2)


def test_a_cap_that_saturates_leaves_a_gradient() -> None:
    """1 - tanh(z)^2 of z = 12 is 1e-10: as a subtraction, it would be 0."""
    student, _, labels = case("plain", (2, 50), MIXES[0])
    student[:, 3], labels[:] = 60.0, 3
    _, grad, _ = row_loss(student, None, labels, student_softcap=5.0)
    truth = oracle.exact(student, None, labels, student_softcap=5.0)
    torch.testing.assert_close(grad[:, 3].double(), truth.grad[:, 3], rtol=1e-5, atol=0)


def test_a_masked_column_stays_masked_under_a_cap() -> None:
    student, teacher, labels = case("plain", (2, 40), MIXES[0])
    student[:, :10], teacher[:, :10] = -INF, -INF
    labels[0] = 12
    truth = oracle.exact(student[:, 10:], teacher[:, 10:], labels - 10, ignore_index=-110, **CAPPED)
    values, grad, _ = row_loss(student, teacher, labels, **CAPPED)
    oracle.check_values(values, truth, "masked")
    oracle.check_gradient(grad[:, 10:], truth, "masked")
    assert not grad[:, :10].any()


# ------------------------------------------------------------------------------------------------ the hard term


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_class_weights(reduction: str, dtype: torch.dtype) -> None:
    """One label has no weight: its row is not used."""
    student, teacher, labels = case("plain", (4, 50), (dtype, dtype))
    weights = torch.rand(50, generator=oracle.generator("weights")).to(dtype)
    weights[labels[2]] = 0.0
    upstream = torch.tensor([1.0, -2.0, 0.25, 0.5]) if reduction == "none" else None
    check(student, teacher, labels, class_weights=weights, reduction=reduction, upstream=upstream, hard_weight=0.7)
    check(student, None, labels, class_weights=weights, reduction=reduction, upstream=upstream)
    if reduction == "mean":
        check(student, None, labels, class_weights=weights, hard_count=3.0)


@pytest.mark.parametrize("mix", [MIXES[0], MIXES[4]], ids=name_of)
def test_z_loss(mix: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher, labels = case("plain", (2, 300), mix)
    for z_loss, smoothing, temperature in ((1e-4, 0.0, 2.0), (0.1, 0.1, 1.0), (1.0, 0.0, 3.7)):
        check(student, teacher, labels, z_loss=z_loss, label_smoothing=smoothing, temperature=temperature)
    student[:, 7], labels[:] = 20.0, 7
    check(student, None, labels, z_loss=1e-3)


@pytest.mark.parametrize("mix", [MIXES[0], MIXES[8]], ids=name_of)
@pytest.mark.parametrize("form", FORMS)
def test_everything_at_once(form: str, mix: tuple[torch.dtype, torch.dtype]) -> None:
    """Between canaries, with columns that take no part."""
    student, teacher, labels = case("plain", (4, 101), mix)
    given = given_as(form, teacher[:, :97], EVERYTHING["temperature"], mix[1])
    s, t = Guarded(student, gap=3), Guarded(torch.nn.functional.pad(given, (0, 4), value=NAN), offset=1)
    settings = EVERYTHING | {"teacher_form": form, "class_weights": torch.arange(97.0), "vocab_size": 97}
    _, grad, _ = check(s.rows, t.rows.clone(), labels.clamp(max=96), gradient="inplace", **settings)
    assert not grad[:, 97:].any()
    s.check()
    t.check()


# ------------------------------------------------------------------------------------------------ at fault


def bad_teacher(form: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of five rows the second sums to too much, the third has no number; the fourth is above 1 as rounding may go."""
    student, teacher, _ = case("plain", (5, 40), (torch.float32, torch.float32))
    probs = given_as("probs", teacher, 2.0, torch.float64)
    probs[1] *= 1.1 if dtype.itemsize == 2 else 1.02
    probs[3] *= 1.008 if dtype.itemsize == 2 else 1.0008
    given = probs.log() if form == "log_probs" else probs
    given[2, 7] = NAN if form == "log_probs" else -0.1
    return student, given.to(dtype), torch.tensor([3, 4, 5, 6, -100])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_probabilities_above_one(form: str, dtype: torch.dtype) -> None:
    student, given, labels = bad_teacher(form, dtype)
    ones, mask = torch.ones(5), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    settings: dict[str, Any] = {"teacher_form": form, "reduction": "none", "soft_mask": mask}
    given[4] = NAN  # not used
    values, grad, _ = row_loss(student, given, labels, upstream=ones, **settings)
    for value in values.values():
        assert value.isnan().tolist() == [False, True, True, False, False]
    assert not grad[1:3].any()
    good = torch.tensor([0, 3])
    clean = oracle.exact(student[good], given[good], labels[good], ones[good], **settings | {"soft_mask": mask[good]})
    oracle.check_gradient(grad[good], clean, "the rows beside")
    reduced, grad, _ = row_loss(student, given, labels, **settings | {"reduction": "mean"})
    assert reduced["loss"].isnan()
    assert not grad[1:3].any()
    with backends.checked(), pytest.raises(ValueError, match=r"teacher_logits: .* a sum of 1\..* in row 1"):
        row_loss(student, given, labels, **settings)
    with backends.checked():
        row_loss(student[good], given[good], labels[good], teacher_form=form)
        row_loss(student, given, labels, soft_weight=0.0, teacher_form=form)


def test_weights_of_classes_at_fault() -> None:
    """Those of the labels there are: the row of a bad one is nan, and the first such class is named."""
    student, teacher, labels = case("plain", (4, 40), MIXES[0])
    labels = torch.tensor([30, -100, 20, 10])
    weights = torch.ones(40)
    weights[20], weights[30], weights[5] = -1.0, NAN, INF
    values, grad, _ = row_loss(student, teacher, labels, class_weights=weights, reduction="none", gradient="no")
    assert values["loss"].isnan().tolist() == values["hard"].isnan().tolist() == [True, False, True, False]
    _, grad, _ = row_loss(student, teacher, labels, class_weights=weights)
    assert not grad[[0, 2]].any()
    assert grad[[1, 3]].isfinite().all()
    with backends.checked(), pytest.raises(ValueError, match=r"class_weights: .*got -1\.0 for class 20"):
        row_loss(student, teacher, labels, class_weights=weights)
