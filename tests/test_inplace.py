"""In place: the gradient takes the logits' memory, which autograd must know, and nothing else changes.

What is refused is in test_checks.py, traced code in test_compile.py. Next: test_ops.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import distil_fast
from tests.batch import assert_identical, error, make_batch, run

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SETTINGS: dict[str, dict[str, Any]] = {
    "both terms": {},
    "sum": {"reduction": "sum"},
    "jsd": {"divergence": "jsd", "temperature": 3.7, "label_smoothing": 0.1},
    "hard alone": {"soft_weight": 0.0},
    "soft alone": {"hard_weight": 0.0, "temperature": 1.0},
    "counts": {"soft_count": 1000.0, "hard_count": 3.0},
}


def logits_and_rest(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    b = make_batch(3, 5, dtype=dtype)
    return b.student_logits.detach(), b.teacher_logits, b.labels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_values_and_gradient_are_the_same_bit_for_bit(settings: dict[str, Any], dtype: torch.dtype) -> None:
    def loss(b: Any, inplace: bool) -> tuple[Tensor, ...]:
        logits = b.student_logits * 1.0
        return distil_fast.distillation_loss(
            logits, b.teacher_logits, b.labels, soft_mask=b.token_weights, inplace=inplace, **settings
        )

    b = make_batch(3, 5, dtype=dtype)
    assert_identical(run(lambda b: loss(b, True), b), run(lambda b: loss(b, False), b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_lies_where_the_logits_were(dtype: torch.dtype) -> None:
    student, teacher, labels = logits_and_rest(dtype)
    inner = student.clone().requires_grad_() * 1.0
    address, seen = inner.data_ptr(), []
    inner.register_hook(lambda g: seen.append((g.data_ptr(), g.clone())))
    distil_fast.distillation_loss(inner, teacher, labels, inplace=True).loss.backward()
    assert seen[0][0] == address
    assert torch.equal(seen[0][1], inner.detach())
    assert not torch.equal(inner.detach(), student)


def test_a_leafs_grad_shares_its_memory() -> None:
    student, teacher, labels = logits_and_rest()
    leaf, apart = student.clone().requires_grad_(), student.clone().requires_grad_()
    distil_fast.distillation_loss(apart, teacher, labels).loss.backward()
    distil_fast.distillation_loss(leaf, teacher, labels, inplace=True).loss.backward()
    assert leaf.grad is not None
    assert apart.grad is not None
    assert leaf.grad.data_ptr() == leaf.data_ptr()
    assert torch.equal(leaf.grad, apart.grad)


def test_a_leaf_that_has_a_grad_accumulates() -> None:
    student, teacher, labels = logits_and_rest()
    leaf, apart = student.clone().requires_grad_(), student.clone().requires_grad_()
    distil_fast.distillation_loss(apart, teacher, labels).loss.backward()
    leaf.grad = torch.ones_like(leaf)
    distil_fast.distillation_loss(leaf, teacher, labels, inplace=True).loss.backward()
    assert apart.grad is not None
    assert torch.equal(leaf.grad, 1.0 + apart.grad)


def test_an_op_that_needs_the_logits_notices() -> None:
    """Without the version counter the gradient through tanh would be computed from a gradient, silently."""
    student, teacher, labels = logits_and_rest()
    logits = student.requires_grad_().tanh()
    before = logits._version
    loss = distil_fast.distillation_loss(logits, teacher, labels, inplace=True).loss
    assert logits._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_op_that_saved_the_logits_notices_too() -> None:
    student, teacher, labels = logits_and_rest()
    logits = student.requires_grad_() * 1.0
    square = logits.square().sum()  # saves the logits
    loss = distil_fast.distillation_loss(logits, teacher, labels, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + square).backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_without_a_gradient_nothing_is_written(mode: Any) -> None:
    student, teacher, labels = logits_and_rest()
    before, version = student.clone(), student._version
    student.requires_grad_(mode is not torch.enable_grad)
    with mode():
        terms = distil_fast.distillation_loss(student, teacher, labels, inplace=True)
    assert torch.equal(student, before)
    assert student._version == version
    assert torch.equal(terms.loss, distil_fast.distillation_loss(student, teacher, labels).loss)


@pytest.mark.parametrize("scale", [0.25, 0.0, -2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grad_output_is_applied_once(dtype: torch.dtype, scale: float) -> None:
    student, teacher, labels = logits_and_rest(dtype)
    grads = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        (scale * distil_fast.distillation_loss(leaf, teacher, labels, inplace=inplace).loss).backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1])
    assert bool(grads[0].any()) == (scale != 0.0)


def test_a_second_backward_is_refused_and_changes_nothing() -> None:
    student, teacher, labels = logits_and_rest()
    inner = student.clone().requires_grad_() * 1.0
    loss = distil_fast.distillation_loss(inner, teacher, labels, inplace=True).loss
    loss.backward(retain_graph=True)
    kept = inner.detach().clone()
    with pytest.raises(RuntimeError, match=r"distil_fast: .*first backward"):
        (3.0 * loss).backward()
    assert torch.equal(inner.detach(), kept)


def test_only_the_rows_of_a_view_are_written() -> None:
    student, teacher, labels = logits_and_rest()
    whole = student.clone().requires_grad_() * 1.0
    last = whole.detach()[:, -1].clone()
    loss = distil_fast.distillation_loss(whole[:, :-1], teacher[:, :-1], labels[:, :-1], inplace=True).loss
    assert torch.equal(whole.detach()[:, -1], last)
    apart = student.clone().requires_grad_()
    expected = distil_fast.distillation_loss(apart[:, :-1], teacher[:, :-1], labels[:, :-1]).loss
    assert torch.equal(loss, expected)
    expected.backward()
    assert apart.grad is not None
    assert torch.equal(whole.detach()[:, :-1], apart.grad[:, :-1])


def test_the_teacher_may_be_the_students_own_tensor() -> None:
    """Self-distillation by accident or in a test: each vector is read before it is written."""
    student, _, labels = logits_and_rest()
    leaf = student.clone().requires_grad_()
    terms = distil_fast.distillation_loss(leaf, leaf.detach(), labels, inplace=True)
    assert abs(terms.soft.item()) <= 1e-6
    apart = student.clone().requires_grad_()
    distil_fast.cross_entropy(apart, labels).backward()
    terms.loss.backward()
    assert leaf.grad is not None
    assert apart.grad is not None
    assert error(leaf.grad, apart.grad) <= 1e-5


def test_a_row_longer_than_a_block_with_the_label_anywhere() -> None:
    """The logit at the label is read again at the end of a row, when its block may have been overwritten."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (3.0 * torch.randn(6, 9000, generator=g) for _ in range(2))
    labels = torch.tensor([0, 2047, 2048, 4100, 8191, 8999])
    results = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        loss = distil_fast.distillation_loss(leaf, teacher, labels, temperature=3.7, inplace=inplace).loss
        loss.backward()
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
