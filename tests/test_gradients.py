"""Gradients against finite differences: gradcheck of every function in fp64, and differences of the fp32 losses.

Here no oracle takes part, so a mistake that the reference shared would show. Next: test_reference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import distil_fast
from tests import oracle

ROWS, SIZE = 4, 7


def doubles(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TEACHER = doubles(ROWS, SIZE, seed=1)
LABELS = torch.tensor([0, -100, SIZE - 1, 3])
MASK = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
TEMPERATURES = torch.tensor([0.5, 1.0, 2.0, 3.7], dtype=torch.float64)


class _Anew(torch.autograd.Function):
    """Calls the loss again for each backward: a stored gradient serves one, and gradcheck asks for many."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.function, ctx.x = function, x
        return function(x.detach()).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            return None, torch.autograd.grad(ctx.function(x), x, grads[0])[0]


def assert_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    assert gradcheck(lambda x: _Anew.apply(function, x), x.clone().requires_grad_(), eps=1e-6, atol=1e-8, rtol=1e-6)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "T = 1": {"temperature": 1.0},
    "per row": {"temperature": TEMPERATURES, "soft_mask": MASK},
    "weights": {"soft_weight": 0.3, "hard_weight": 2.0, "t_squared": False, "temperature": 3.7},
    "counts": {"soft_count": 7, "hard_count": 2.5, "label_smoothing": 0.2},
    "hard": {"soft_weight": 0.0},
    "soft": {"hard_weight": 0.0},
    "softcaps": {"student_softcap": 2.0, "teacher_softcap": 3.0, "teacher_logit_scale": 1.5},
    "scale": {"student_logit_scale": 0.7, "z_loss": 0.05, "vocab_size": 6},
    "class weights": {"class_weights": torch.linspace(0.0, 2.0, SIZE), "z_loss": 0.1, "student_softcap": 4.0},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_distillation_loss(divergence: str, settings: str, reduction: str) -> None:
    if settings == "counts" and reduction != "mean":
        pytest.skip("counts are denominators, and only a mean has one")
    arguments: dict[str, Any] = SETTINGS[settings] | {
        "divergence": oracle.DIVERGENCES[divergence],
        "reduction": reduction,
    }
    labels = LABELS.clamp(max=5) if settings == "scale" else LABELS
    assert_gradient(
        lambda x: distil_fast.distillation_loss(x, TEACHER, labels, **arguments).loss, doubles(ROWS, SIZE, seed=2)
    )


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
@pytest.mark.parametrize("form", [distil_fast.LogProbs, distil_fast.Probs])
def test_forms_of_teacher(form: Any, divergence: str) -> None:
    log_probs = TEACHER.log_softmax(-1)
    teacher = form(log_probs if form is distil_fast.LogProbs else log_probs.exp())
    settings: dict[str, Any] = {"divergence": oracle.DIVERGENCES[divergence], "temperature": TEMPERATURES}
    assert_gradient(
        lambda x: distil_fast.distillation_loss(x, teacher, student_softcap=3.0, **settings).loss,
        doubles(ROWS, SIZE, seed=11),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_of_one_term(reduction: str) -> None:
    x = doubles(ROWS, SIZE, seed=3)
    assert_gradient(
        lambda x: distil_fast.divergence_loss(x, TEACHER, temperature=TEMPERATURES, mask=MASK, reduction=reduction), x
    )
    assert_gradient(lambda x: distil_fast.cross_entropy(x, LABELS, label_smoothing=0.1, reduction=reduction), x)


@pytest.mark.parametrize("temperature", [1.0, 3.7, TEMPERATURES], ids=["1", "3.7", "per row"])
@pytest.mark.parametrize("function", [distil_fast.softmax, distil_fast.log_softmax])
def test_softmax(function: Callable[..., Tensor], temperature: float | Tensor) -> None:
    x = doubles(ROWS, SIZE, seed=4).requires_grad_()
    assert gradcheck(lambda x: function(x, temperature), x, eps=1e-6, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mask", [None, MASK, MASK > 0.7], ids=["all", "weights", "bool"])
def test_cosine_loss(mask: Tensor | None, reduction: str) -> None:
    teacher = doubles(ROWS, SIZE, seed=5)
    assert_gradient(
        lambda x: distil_fast.cosine_loss(x, teacher, mask, reduction=reduction), doubles(ROWS, SIZE, seed=6)
    )


def test_triple_loss() -> None:
    logits, hidden = doubles(2, 3, SIZE, seed=7), doubles(2, 3, 5, seed=8)
    teacher_logits, teacher_hidden = doubles(2, 3, SIZE, seed=9), doubles(2, 3, 5, seed=10)
    labels, attention = torch.tensor([[1, -100, 6], [-100, 2, -100]]), torch.tensor([[1, 1, 1], [1, 1, 0]])

    def loss(logits: Tensor, hidden: Tensor) -> Tensor:
        return distil_fast.triple_loss(logits, teacher_logits, labels, hidden, teacher_hidden, attention).loss

    assert_gradient(lambda x: loss(x, hidden), logits)
    assert_gradient(lambda x: loss(logits, x), hidden)


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_fp32_loss_moves_by_what_its_gradient_says(instruction_set: str, divergence: str) -> None:
    """A central difference along the gradient; the step is large enough for fp32 to see it in a sum of rows."""
    g = oracle.generator("differences")
    student, teacher = (3 * torch.randn(16, 501, generator=g) for _ in range(2))
    labels = torch.randint(0, 501, (16,), generator=g)

    def loss(x: Tensor) -> Tensor:
        return distil_fast.distillation_loss(
            x, teacher, labels, divergence=oracle.DIVERGENCES[divergence], reduction="none"
        ).loss.double()

    x = student.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x).sum(), x)
    step = 1e-2 * grad / grad.norm(dim=-1, keepdim=True)
    difference = (loss(student + step) - loss(student - step)).sum()
    expected = (grad.double() * 2 * step.double()).sum()
    assert difference.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_a_constant_added_to_the_logits_changes_nothing(instruction_set: str, divergence: str) -> None:
    """So each row of the gradient sums to 0: what the projection is there for. NeMo Automodel #2428 had lost it."""
    student, teacher = (x.float() for x in oracle.logit_pair("plain", 5, 5003, oracle.generator("sum")))
    labels = torch.tensor([0, 17, 2048, 5002, -100])
    for temperature in (1.0, 2.0, 3.7):
        x = student.clone().requires_grad_()
        terms = distil_fast.distillation_loss(
            x, teacher, labels, divergence=oracle.DIVERGENCES[divergence], temperature=temperature, reduction="sum"
        )
        (grad,) = torch.autograd.grad(terms.loss, x)
        assert (grad.double().sum(-1).abs() <= 2e-6 * grad.double().abs().sum(-1)).all()
