"""Bugs that the field's trackers record, each as a test of these losses: what it was, and where, in the docstring.

Grouped as they were found: gradients and autograd, masks and reductions, numerics, shapes and meaning. Only what these
losses could get wrong is here. Next: test_row_loss.py, the bounds.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import distil_fast
from distil_fast import JSD
from tests import calls, oracle

ROWS, SIZE = 6, 301
LABELS = torch.tensor([3, -100, 0, SIZE - 1, 3, -100])
NONE: dict[str, Any] = {"reduction": "none"}


def pair(kind: str = "plain", size: int = SIZE) -> tuple[Tensor, Tensor]:
    student, teacher = oracle.logit_pair(kind, ROWS, size, oracle.generator("regressions", kind, size))
    return student.float(), teacher.float()


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


# ------------------------------------------------------------------------------------------------ gradients, autograd


def test_each_row_has_its_own_upstream_gradient() -> None:
    """Liger #1298, #680, #435: reduction="none" multiplied every row by grad_output[0], or returned a scalar."""
    student, teacher = pair()
    upstream = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0, 7.0])
    result = calls.check(student, teacher, LABELS, upstream=upstream, **NONE)
    assert result.values["loss"].shape == (ROWS,)
    assert not result.grad[0].any()


@pytest.mark.parametrize("inplace", [False, True])
def test_grad_output_of_1_is_not_the_only_one_that_works(inplace: bool) -> None:
    """TE #2139: the kernel that applies grad_output was skipped at 1, which hid that it read a wrong pointer."""
    student, teacher = pair()
    one = calls.by_autograd(student, teacher, LABELS).grad
    for factor in (0.25, -3.0, 1e-4):
        x = student.clone().requires_grad_()
        loss = distil_fast.distillation_loss(x, teacher, LABELS, inplace=inplace).loss
        (grad,) = torch.autograd.grad(loss, x, torch.tensor(factor))
        assert relative(grad, one.double() * factor) < 1e-7


def test_stride_0_upstream_gradient_of_a_sum() -> None:
    """ROCm TE #623, quack 3e97238: `loss.sum()` hands an expanded grad_output; kernels read N elements of one."""
    student, teacher = pair()
    x = student.requires_grad_()
    (grad,) = torch.autograd.grad(distil_fast.distillation_loss(x, teacher, LABELS, **NONE).loss.sum(), x)
    oracle.check_gradient(grad, oracle.exact(student, teacher, LABELS, reduction="sum"), "sum of rows")


def test_strided_upstream_gradient() -> None:
    """TE #2402: a non-contiguous grad_output was read as if it were contiguous."""
    student, teacher = (x.view(2, 3, SIZE) for x in pair())
    upstream = torch.tensor([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]).t()
    assert not upstream.is_contiguous()
    calls.check(student, teacher, LABELS.view(2, 3), upstream=upstream, **NONE)
    calls.check(student, teacher, LABELS.view(2, 3), upstream=torch.arange(12.0).view(2, 6)[:, ::2], **NONE)


def test_upstream_gradient_of_a_chain() -> None:
    """fla #963: a loss that others were added to ignored what came from above it."""
    student, teacher = pair()
    x = student.requires_grad_()
    alone = calls.by_autograd(student, teacher, LABELS).grad
    loss = distil_fast.distillation_loss(x, teacher, LABELS).loss
    (grad,) = torch.autograd.grad(3.0 * loss * loss + x.sum(), x)
    assert relative(grad, 6.0 * loss.detach().double() * alone.double() + 1.0) < 1e-6


def test_in_place_bumps_the_version() -> None:
    """Liger #272, #343, #1251, unsloth #5002: logits overwritten behind autograd's back; tanh's backward reads them."""
    student, teacher = pair()
    logits = student.requires_grad_().tanh()
    loss = distil_fast.distillation_loss(logits, teacher, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_retained_graph_does_not_square_the_scale() -> None:
    """Liger, fla: a second backward scaled the saved gradient again. Here it is right, or an error."""
    student, teacher = pair()
    x = student.requires_grad_()
    rows = distil_fast.distillation_loss(x, teacher, LABELS, **NONE).loss
    first, second = (torch.autograd.grad(rows, x, torch.full((ROWS,), 0.25), retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    mean = distil_fast.distillation_loss(x, teacher, LABELS).loss
    torch.autograd.grad(mean, x, torch.tensor(0.25), retain_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        torch.autograd.grad(mean, x, torch.tensor(0.25))


def test_the_hard_term_has_a_gradient() -> None:
    """axolotl #3660: cross-entropy came back as an auxiliary output, right in value and without gradient."""
    student, teacher = pair()
    both, soft = (calls.by_autograd(student, teacher, LABELS, hard_weight=w).grad for w in (2.0, 0.0))
    x = student.double().requires_grad_()
    (hard,) = torch.autograd.grad(2.0 * F.cross_entropy(x, LABELS), x)
    assert relative(both.double() - soft.double(), hard) < 1e-5


# ------------------------------------------------------------------------------------------------ masks, reductions


@pytest.mark.parametrize("ignored", [-100, 3, 0])
def test_ignore_index_is_used(ignored: int) -> None:
    """Liger #974: accepted for a year by the chunked JSD, and never read."""
    student, teacher = pair()
    labels = torch.where(LABELS == -100, ignored, LABELS)
    calls.check(student, teacher, labels, ignore_index=ignored)
    hard = calls.by_autograd(student, teacher, labels, ignore_index=ignored, soft_weight=0.0).grad
    assert torch.equal(hard.any(-1), labels != ignored)


def test_labels_follow_their_rows_through_views() -> None:
    """Liger #330: a chunk of the logits met the labels of another."""
    g = oracle.generator("chunks")
    student, teacher = (torch.randn(4, 10, SIZE, generator=g) for _ in range(2))
    labels = torch.randint(0, SIZE, (4, 10), generator=g)
    whole = calls.by_autograd(student, teacher, labels, reduction="sum").grad
    for start in range(0, 10, 3):
        chunk = slice(start, start + 3)
        part = calls.by_autograd(student[:, chunk], teacher[:, chunk], labels[:, chunk], reduction="sum").grad
        assert relative(part, whole[:, chunk]) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_nothing_to_average(divergence: str, reduction: str) -> None:
    """Liger #153, its TVD, quack, fla, CCE: all rows ignored divides by zero. Here: 0, with zero gradient."""
    student, teacher = pair()
    labels, mask = torch.full((ROWS,), -100), torch.zeros(ROWS)
    settings: dict[str, Any] = {"divergence": oracle.DIVERGENCES[divergence], "reduction": reduction, "soft_mask": mask}
    x = student.requires_grad_()
    terms = distil_fast.distillation_loss(x, teacher, labels, **settings)
    assert not any(value.any() for value in (*terms, torch.autograd.grad(terms.loss.sum(), x)[0]))


def test_a_mean_counts_the_rows_that_it_uses() -> None:
    """TE #2476: the mean divided by all rows, ignored ones too, and the test compared the result with itself."""
    student, teacher = pair()
    mask = torch.tensor([True, False, True, True, False, False])
    whole = calls.by_autograd(student, teacher, LABELS, soft_mask=mask)
    soft = calls.by_autograd(student[mask], teacher[mask]).values["loss"]
    hard = calls.by_autograd(student[LABELS >= 0], teacher[:4], LABELS[LABELS >= 0], soft_weight=0.0).values["loss"]
    torch.testing.assert_close(whole.values["soft"], soft, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.values["hard"], hard, rtol=1e-6, atol=0)


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_accumulated_micro_batches_are_the_batch(divergence: str) -> None:
    """TRL #6006: the JSD was not divided by the items of the whole step under gradient accumulation."""
    student, teacher = pair()
    settings: dict[str, Any] = {"divergence": oracle.DIVERGENCES[divergence]}
    whole = calls.by_autograd(student, teacher, LABELS, **settings)
    parts = [
        calls.by_autograd(student[i:j], teacher[i:j], LABELS[i:j], soft_count=ROWS, hard_count=4, **settings)
        for i, j in ((0, 1), (1, 4), (4, 6))
    ]
    assert relative(torch.cat([p.grad for p in parts]), whole.grad) < 1e-6
    total = sum(p.values["loss"].double() for p in parts)
    torch.testing.assert_close(total, whole.values["loss"].double(), rtol=1e-6, atol=0)


def test_a_row_without_label_reads_no_label() -> None:
    """quack 66d8016: weight[ignore_index = -100] was read out of bounds. Any ignore_index is only compared."""
    student, teacher = pair()
    expected = calls.by_autograd(student, teacher, LABELS, label_smoothing=0.1)
    for ignored in (-(2**62), -1, SIZE, 2**62):
        labels = torch.where(LABELS == -100, ignored, LABELS)
        result = calls.by_autograd(student, teacher, labels, ignore_index=ignored, label_smoothing=0.1)
        assert torch.equal(result.grad, expected.grad)


def test_a_label_out_of_range_is_an_error_before_anything_is_written() -> None:
    """CCE #59 and others: a label that no column has indexed into padding, or out of memory."""
    student, teacher = pair()
    for label in (SIZE, -1, 2**62, -(2**62)):
        x = student.clone()
        labels = LABELS.clone()
        labels[4] = label
        with pytest.raises(ValueError, match=f"expected 0 <= label < {SIZE} or ignore_index, got"):
            distil_fast.distillation_loss(x.requires_grad_(), teacher, labels, inplace=True)
        assert torch.equal(x, student)


def test_ignored_rows_keep_their_logits_without_gradient() -> None:
    """Liger: cross-entropy zeroed the logits of ignored rows even in evaluation, before an argmax read them."""
    student, teacher = pair()
    before = student.clone()
    distil_fast.distillation_loss(student, teacher, LABELS, inplace=True)
    with torch.no_grad():
        distil_fast.distillation_loss(student.requires_grad_(), teacher, LABELS, inplace=True)
    assert torch.equal(student, before)


# ------------------------------------------------------------------------------------------------ numerics


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_half_precision_gradient_as_p_meets_q(instruction_set: str, divergence: str, dtype: torch.dtype) -> None:
    """Liger #1432 (4 to 23 % of gradient error from rounding logits), vllm speculators #788 (KL in bf16: 3, 9, 19 %).

    Student and teacher of one dtype, a few units in the last place apart in a part of the columns.
    """
    teacher = pair(size=4000)[1].to(dtype)
    ulp = teacher.abs().float() * torch.finfo(dtype).eps
    g = oracle.generator("ulps")
    student = (teacher.float() + ulp * torch.randint(-1, 2, teacher.shape, generator=g)).to(dtype)
    settings: dict[str, Any] = {"divergence": oracle.DIVERGENCES[divergence], "temperature": 2.0}
    truth = oracle.exact(student, teacher, **settings)
    result = calls.by_backend(student, teacher, **settings)
    result.check(truth, "ulps apart")
    error = relative(result.grad.double() * result.unit, truth.grad)
    assert error < {torch.bfloat16: 2.5e-3, torch.float16: 1e-2}[dtype], error  # fp16: 1e-6 of the weight, subnormal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_backward_see_the_same_logits(dtype: torch.dtype) -> None:
    """marin #8217: forward read bf16 logits and backward fp32 ones. Stored and recomputed gradients agree."""
    student, teacher = (x.to(dtype) for x in pair())
    stored = calls.by_backend(student, teacher, LABELS, reduction="sum")
    again = calls.by_backend(student, teacher, LABELS, reduction="none", upstream=torch.ones(ROWS))
    if dtype == torch.float16:
        assert relative(stored.grad.double() * stored.unit, again.grad) < 4e-4
    else:
        assert torch.equal(stored.grad, again.grad)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("depth", [50.0, 104.0, 200.0, 1000.0])
def test_jsd_of_two_vanishing_probabilities(instruction_set: str, depth: float, beta: float) -> None:
    """Liger #1453, #1397, #769, #862: 0 * log 0 = nan once both log-probabilities are below about -104."""
    student, teacher = pair()
    student[:, ::3] -= depth
    teacher[:, ::3] -= depth
    teacher[:, 1::3] -= depth  # and one that vanishes alone
    calls.check(student, teacher, divergence=JSD(beta), temperature=1.0)


@pytest.mark.parametrize("size", [2047, 2048, 2049, 4097, 65537])
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_rows_longer_than_a_block(divergence: str, size: int) -> None:
    """Liger #262: KL was wrong wherever V was larger than the block, and an invalid assertion hid it."""
    student, teacher = pair(size=size)
    calls.check(student[:2], teacher[:2], LABELS[:2], divergence=oracle.DIVERGENCES[divergence])


def test_a_sure_labels_gradient_is_not_rounded_away(instruction_set: str) -> None:
    """Liger #1329, TE #3193: softmax - 1 rounded before it was subtracted. The other columns say what it is."""
    for dtype, margin in ((torch.float32, 16.0), (torch.bfloat16, 16.0), (torch.float16, 4.0)):
        student, teacher = (x.to(dtype) for x in pair())
        labels = torch.full((ROWS,), 7)
        student[:, 7] = student.amax(-1) + margin
        result = calls.by_backend(student, teacher, labels, soft_weight=0.0)
        grad = result.grad.double()
        others = grad.sum(-1) - grad[:, 7]
        relative_error = ((grad[:, 7] + others) / others).abs().max()
        assert (others > 0).all()
        assert relative_error < {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]


@pytest.mark.parametrize("start", [0, 2048, 4096])
def test_a_block_without_a_finite_logit(instruction_set: str, start: int) -> None:
    """flash-attn #1930, and Liger's, fla's and quack's online softmax: a wholly -inf tile gives -inf - -inf = nan."""
    student, teacher = pair(size=6144)
    columns = torch.arange(6144)
    hidden = (columns >= start) & (columns < start + 2048)
    result = calls.by_backend(student.masked_fill(hidden, -math.inf), teacher.masked_fill(hidden, -math.inf))
    kept = calls.by_backend(student[:, ~hidden], teacher[:, ~hidden])
    torch.testing.assert_close(result.values, kept.values, rtol=2e-6, atol=0)
    assert relative(result.grad[:, ~hidden], kept.grad) < 1e-5
    assert (result.grad[:, hidden] == 0).all()


@pytest.mark.parametrize("level", [-1e4, -50.0, 50.0, 1e4])
def test_lanes_beyond_the_row_add_no_mass(instruction_set: str, level: float) -> None:
    """unsloth #10616, and softcaps elsewhere: padding lanes joined the sum. Rows far from 0, odd widths."""
    for size in (1, 3, 15, 17, 31, 33, 2051):
        student, teacher = (x + level for x in pair(size=size))
        labels = torch.full((ROWS,), size - 1)
        calls.check(student, teacher, labels, where=f"{level} {size}")
        torch.testing.assert_close(distil_fast.softmax(student).sum(-1), torch.ones(ROWS), rtol=2e-6, atol=0)


def test_label_smoothing_with_a_very_unlikely_column() -> None:
    """Liger's vocabulary-parallel cross-entropy: log(exp(x)) is -inf for a logit 104 below the row's largest."""
    student, teacher = pair()
    student[:, 5] = -500.0
    calls.check(student, teacher, torch.full((ROWS,), 7), label_smoothing=0.1)


def test_an_unlikely_label_has_a_finite_loss(instruction_set: str) -> None:
    """llm.c: -log(exp(x) / z) is inf where log z - x is 200."""
    student, labels = pair()[0], torch.full((ROWS,), 5)
    student[:, 5] = student.amax(-1) - 200.0
    expected = F.cross_entropy(student.double(), labels, reduction="none")
    torch.testing.assert_close(distil_fast.cross_entropy(student, labels, **NONE).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_not_rounded_to_the_logits_dtype(dtype: torch.dtype) -> None:
    """Liger: the buffer of per-token losses had the logits' dtype."""
    student, teacher = (x.to(dtype) for x in pair())
    for reduction in ("mean", "none"):
        terms = distil_fast.distillation_loss(student, teacher, LABELS, reduction=reduction)
        for value in terms:
            assert value.dtype == torch.float32
            used = value[value != 0]
            assert not torch.equal(used.to(dtype).float(), used)


# ------------------------------------------------------------------------------------------------ shapes, meaning


def test_a_transposed_matrix_is_not_read_as_if_it_were_not() -> None:
    """TE #2734: a transposed view with stride(-1) == 1 by accident was silently wrong. One column has no stride."""
    square = torch.randn(20, 20, generator=oracle.generator("transposed"))
    labels = torch.zeros(20, dtype=torch.int64)
    with pytest.raises(ValueError, match="contiguous"):
        distil_fast.cross_entropy(square.t(), labels)
    with pytest.raises(ValueError, match="contiguous"):
        distil_fast.softmax(square[:, :1].t())
    assert (distil_fast.cross_entropy(square[:1].t(), labels, reduction="none") == 0).all()
    assert (distil_fast.softmax(square[:1].t()) == 1).all()


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_dtypes_under_autocast(student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    """Liger #318, #502, #1283, #1316: under AMP, models of two dtypes met in one kernel."""
    student, teacher = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calls.check(student.to(student_dtype), teacher.to(teacher_dtype), LABELS)


def test_the_hard_term_is_at_temperature_1_and_the_weights_are_as_given() -> None:
    """TRL #5731: trained 0.5 CE + 0.5 JSD whatever the weights were, at the sampling temperature."""
    student, teacher = pair()
    expected = F.cross_entropy(student.double(), LABELS)
    for temperature in (0.5, 2.0, 3.7):
        terms = distil_fast.distillation_loss(
            student, teacher, LABELS, divergence="jsd", temperature=temperature, soft_weight=0.3, hard_weight=0.1
        )
        assert terms.hard.item() == pytest.approx(expected.item(), rel=1e-6)
        assert terms.loss.item() == pytest.approx(0.3 * terms.soft.item() + 0.1 * terms.hard.item(), rel=1e-6)


@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_divergences_are_not_negative(instruction_set: str, divergence: str, kind: str) -> None:
    """verl #7855 (a clamped, truncated KL), CCE #52 (a loss below zero): not even by a rounding."""
    student, teacher = pair(kind)
    for x in (student, teacher + 1e-4 * student, teacher + 1e-6 * student, teacher):
        value = distil_fast.divergence_loss(x, teacher, divergence=oracle.DIVERGENCES[divergence], **NONE)
        assert (value >= 0).all(), value.min()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 3.0),
        ("soft_weight", 0.5),
        ("hard_weight", 0.5),
        ("soft_mask", torch.tensor([True, False, True, True, False, False])),
        ("soft_count", 3),
        ("hard_count", 3),
        ("ignore_index", 3),
        ("divergence", "reverse_kl"),
        ("divergence", JSD(0.3)),
        ("t_squared", False),
        ("label_smoothing", 0.1),
        ("reduction", "sum"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_every_argument_arrives(name: str, value: Any) -> None:
    """Liger #983, #879, #931: arguments accepted and dropped on the way. Each moves loss and gradient, rightly."""
    student, teacher = pair()
    labels = LABELS.clamp(min=0)
    plain = calls.check(student, teacher, labels)
    changed = calls.check(student, teacher, labels, **{name: value})
    assert abs(changed.values["loss"] / plain.values["loss"] - 1) > 1e-4
    assert relative(changed.grad, plain.grad) > 1e-3
