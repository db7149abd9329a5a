"""distil_fast.reference against torch's own losses and closed forms: the oracle's oracle.

All in float64, to 1e-12. Knows no kernel. Next: oracle.py, which builds on it.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from distil_fast import reference
from tests import oracle

ROWS, SIZE = 6, 11
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}


def pair(size: int = SIZE) -> tuple[Tensor, Tensor]:
    return oracle.logit_pair("plain", ROWS, size, oracle.generator("reference"))


LABELS = torch.tensor([3, -100, 0, 10, 3, -100])
MASK = torch.tensor([True, False, True, True, False, True])
WEIGHTS = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.7])
def test_forward_kl_is_torchs(temperature: float) -> None:
    student, teacher = pair()
    expected = F.kl_div(
        F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1), reduction="batchmean"
    )
    loss = reference.distillation_loss(student, teacher, temperature=temperature).loss
    torch.testing.assert_close(loss, expected * temperature**2, **EXACT)
    loss = reference.divergence_loss(student, teacher, temperature=temperature)
    torch.testing.assert_close(loss, expected, **EXACT)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_is_torchs(label_smoothing: float, reduction: str) -> None:
    logits = pair()[0].requires_grad_()
    ours = reference.cross_entropy(logits, LABELS, label_smoothing=label_smoothing, reduction=reduction)
    theirs = F.cross_entropy(logits, LABELS, label_smoothing=label_smoothing, reduction=reduction)
    torch.testing.assert_close(ours, theirs, **EXACT)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, **EXACT)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.7, 0.5])
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES | oracle.EXTREMES)
def test_divergences_are_their_closed_forms(divergence: str, temperature: float) -> None:
    student, teacher = pair()
    kind = (oracle.DIVERGENCES | oracle.EXTREMES)[divergence]
    x = student.clone().requires_grad_()
    rows = reference.divergence_loss(x, teacher, divergence=kind, temperature=temperature, reduction="none")
    value, gradient = oracle.closed_form(kind, student, teacher, temperature)
    torch.testing.assert_close(rows.detach(), value, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(rows.sum(), x)[0], gradient, rtol=1e-11, atol=1e-13)


def test_jsd_is_the_mean_of_two_kls_to_the_mixture() -> None:
    student, teacher = pair()
    p, q = teacher.softmax(-1), student.softmax(-1)
    for beta in (0.1, 0.5, 0.9):
        m = beta * p + (1 - beta) * q
        expected = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
        ours = reference.divergence_loss(student, teacher, divergence=reference.JSD(beta), reduction="none")
        torch.testing.assert_close(ours, expected, **EXACT)
        swapped = reference.divergence_loss(teacher, student, divergence=reference.JSD(1 - beta), reduction="none")
        torch.testing.assert_close(ours, swapped, **EXACT)


def test_kl_turns_round() -> None:
    student, teacher = pair()
    forward = reference.divergence_loss(student, teacher, divergence="forward_kl", reduction="none")
    reverse = reference.divergence_loss(teacher, student, divergence="reverse_kl", reduction="none")
    torch.testing.assert_close(forward, reverse, **EXACT)
    assert not torch.allclose(forward, reference.divergence_loss(student, teacher, divergence="reverse_kl"))


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5, 1.5, math.nan])
def test_jsd_refuses_its_ends_and_names_the_kls(beta: float) -> None:
    with pytest.raises(ValueError, match=r"forward_kl.*reverse_kl"):
        reference.JSD(beta)


def rows_by_hand(student: Tensor, teacher: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """T^2 KL(p || q) and cross-entropy of each row, one row at a time."""
    soft = [
        t * t * oracle.closed_form("forward_kl", s[None], k[None], float(t))[0][0]
        for s, k, t in zip(student, teacher, temperature, strict=True)
    ]
    hard = [-s.log_softmax(-1)[y] if y >= 0 else s.new_zeros(()) for s, y in zip(student, LABELS, strict=True)]
    return torch.stack(soft), torch.stack(hard)


@pytest.mark.parametrize("mask", [None, MASK, WEIGHTS], ids=["all", "bool", "weights"])
def test_weights_masks_counts_and_reductions(mask: Tensor | None) -> None:
    student, teacher = pair()
    temperature = torch.tensor([0.5, 1.0, 2.0, 3.7, 10.0, 2.0], dtype=torch.float64)
    soft, hard = rows_by_hand(student, teacher, temperature)
    weights = torch.ones(ROWS, dtype=torch.float64) if mask is None else mask.double()
    soft, labels = soft * weights, int((LABELS >= 0).sum())
    cases: list[tuple[dict[str, Any], Tensor, Tensor]] = [
        ({}, soft.sum() / weights.sum(), hard.sum() / labels),
        ({"soft_count": 9, "hard_count": torch.tensor(2.5)}, soft.sum() / 9, hard.sum() / 2.5),
        ({"reduction": "sum"}, soft.sum(), hard.sum()),
        ({"reduction": "none"}, soft, hard),
        ({"soft_count": 0, "hard_count": 0.0}, soft.sum() * 0, hard.sum() * 0),
    ]
    for settings, soft_term, hard_term in cases:
        terms = reference.distillation_loss(
            student,
            teacher,
            LABELS,
            temperature=temperature,
            soft_mask=mask,
            soft_weight=0.3,
            hard_weight=2.0,
            **settings,
        )
        torch.testing.assert_close(terms.soft, soft_term, **EXACT)
        torch.testing.assert_close(terms.hard, hard_term, **EXACT)
        torch.testing.assert_close(terms.loss, 0.3 * soft_term + 2.0 * hard_term, **EXACT)


def test_unused_rows_reach_nothing() -> None:
    student, teacher = pair()
    student[5], teacher[5], teacher[1] = math.nan, math.inf, math.nan
    labels = torch.where(torch.arange(ROWS) == 1, 4, LABELS)  # row 1: hard term alone; row 5: neither
    student.requires_grad_()
    terms = reference.distillation_loss(student, teacher, labels, soft_mask=torch.arange(ROWS) % 4 != 1)
    (grad,) = torch.autograd.grad(terms.loss, student)
    assert all(value.isfinite() for value in terms)
    assert grad[:5].abs().sum(-1).min() > 0
    assert not grad[5].any()


def test_options_are_what_a_caller_would_write_by_hand() -> None:
    """Logit scale, softcap, a cut vocabulary, class weights, z-loss, and teachers that give (log-)probabilities."""
    student, teacher = pair()
    student.requires_grad_()
    weights = torch.linspace(0.0, 2.0, 9, dtype=torch.float64)
    labels = LABELS.clamp(max=8)
    y = 3.0 * torch.tanh(0.7 * student[:, :9] / 3.0)
    log_p = (5.0 * torch.tanh(1.5 * teacher[:, :9] / 5.0) / 2.0).log_softmax(-1)
    kl = F.kl_div((y / 2.0).log_softmax(-1), log_p, reduction="none", log_target=True).sum(-1)
    valid = labels >= 0
    penalty = (weights[labels[valid]] * y.logsumexp(-1)[valid].square()).sum() / weights[labels[valid]].sum()
    expected = 4.0 * kl.mean() + F.cross_entropy(y, labels, weight=weights) + 0.1 * penalty
    common: dict[str, Any] = {
        "class_weights": weights,
        "z_loss": 0.1,
        "student_logit_scale": 0.7,
        "student_softcap": 3.0,
    }
    transform: dict[str, Any] = {"teacher_logit_scale": 1.5, "teacher_softcap": 5.0, "vocab_size": 9}
    wanted = torch.autograd.grad(expected, student, retain_graph=True)[0]
    for given, settings in (
        (teacher, transform),
        (log_p, {"teacher_form": "log_probs", "vocab_size": 9}),
        (0.5 * log_p.exp(), {"teacher_form": "probs", "vocab_size": 9}),  # rows are normalised
    ):
        loss = reference.distillation_loss(student, given, labels, **common, **settings).loss
        torch.testing.assert_close(loss, expected, **EXACT)
        grad = torch.autograd.grad(loss, student)[0]
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-14)
        assert (grad[:, 9:] == 0).all()
        truth = oracle.exact(student, given, labels, **common, **settings)
        torch.testing.assert_close(truth.grad, wanted, rtol=1e-10, atol=1e-14)


def test_without_valid_rows_the_terms_are_zero() -> None:
    student, teacher = pair()
    student.requires_grad_()
    nothing = torch.zeros(ROWS, dtype=torch.bool)
    terms = reference.distillation_loss(student, teacher, LABELS * 0 - 100, soft_mask=nothing)
    assert [value.item() for value in terms] == [0.0, 0.0, 0.0]
    assert not torch.autograd.grad(terms.loss, student)[0].any()


def test_softmax_is_torchs() -> None:
    logits = pair()[0]
    for temperature in (1.0, 3.7, torch.arange(1.0, ROWS + 1)):
        by = temperature if isinstance(temperature, float) else temperature.double().unsqueeze(-1)
        torch.testing.assert_close(reference.softmax(logits, temperature), F.softmax(logits / by, -1), **EXACT)
        torch.testing.assert_close(reference.log_softmax(logits, temperature), F.log_softmax(logits / by, -1), **EXACT)


def test_cosine_loss_is_torchs() -> None:
    student, teacher = pair(50)
    student.requires_grad_()
    ours, theirs = (
        reference.cosine_loss(student, teacher, MASK),
        F.cosine_embedding_loss(student[MASK], teacher[MASK], torch.ones(int(MASK.sum()), dtype=torch.float64)),
    )
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (ours, theirs)), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("restrict", [False, True])
def test_triple_loss_is_the_sum_of_distilberts_three(restrict: bool) -> None:
    """As the authors' training code has it: batchmean KL over selected tokens, CE over labels, cosine over tokens."""
    student, teacher = pair()
    g = oracle.generator("hidden")
    hidden, teacher_hidden = (torch.randn(ROWS, 5, generator=g, dtype=torch.float64) for _ in range(2))
    attention = torch.tensor([1, 1, 1, 1, 1, 0])
    on = (LABELS >= 0) if restrict else attention.bool()
    temperature = 2.0
    ce = temperature**2 * F.kl_div(
        F.log_softmax(student[on] / temperature, -1), F.softmax(teacher[on] / temperature, -1), reduction="batchmean"
    )
    mlm = F.cross_entropy(student, LABELS)
    kept = attention.bool()
    cos = F.cosine_embedding_loss(hidden[kept], teacher_hidden[kept], torch.ones(5, dtype=torch.float64))
    terms = reference.triple_loss(
        student, teacher, LABELS, hidden, teacher_hidden, attention, restrict_ce_to_mask=restrict
    )
    torch.testing.assert_close(terms.ce, ce, **EXACT)
    torch.testing.assert_close(terms.mlm, mlm, **EXACT)
    torch.testing.assert_close(terms.cos, cos, **EXACT)
    torch.testing.assert_close(terms.loss, 5.0 * ce + 2.0 * mlm + 1.0 * cos, **EXACT)


def test_extremes_stay_exact() -> None:
    """p -> q, and logits so far apart that probabilities underflow: where a formula with log(p) alone would fail."""
    teacher = pair(300)[1]
    student = teacher + 1e-6 * pair(300)[0]
    value = reference.divergence_loss(student, teacher, reduction="none")
    d = student - teacher
    p = teacher.softmax(-1)
    second_order = 0.5 * ((p * d * d).sum(-1) - (p * d).sum(-1) ** 2)
    torch.testing.assert_close(value, second_order, rtol=1e-3, atol=0)
    far = torch.tensor([[0.0, -3000.0]], dtype=torch.float64), torch.tensor([[-3000.0, 0.0]], dtype=torch.float64)
    for name in ("forward_kl", "reverse_kl"):
        torch.testing.assert_close(reference.divergence_loss(*far, divergence=name).item(), 3000.0)
    torch.testing.assert_close(reference.divergence_loss(*far, divergence="jsd").item(), math.log(2))
