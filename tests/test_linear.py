"""The fused linear losses against the fp64 truth of whole logits: options, dtypes, forms of teacher, and the exactness
that chunking promises.

Bounds and inputs are heads.py's. Next: test_linear_use.py, what is around a call; parallel/test_heads.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import distil_fast
from distil_fast import Hidden, LogProbs, Probs, chunks, reference
from tests.calls import there
from tests.heads import BOUND, DTYPES, ROWS, Heads, V, check, make, off

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature 1": {"temperature": 1.0, "t_squared": False},
    "weights": {"soft_weight": 0.3, "hard_weight": torch.tensor(1.7)},
    "counts": {"soft_count": 11.0, "hard_count": torch.tensor(7.0)},
    "reverse": {"divergence": "reverse_kl", "temperature": 3.7},
    "jsd": {"divergence": distil_fast.JSD(0.2)},
    "smooth": {"label_smoothing": 0.1},
    "all rows": {"soft_mask": None},
    "no labels": {"labels": None},
    "soft off": {"soft_weight": 0.0},
    "class weights": {"class_weights": torch.linspace(0.0, 2.0, V)},
    "z-loss": {"z_loss": 0.02},
    "softcap": {"student_softcap": 4.0, "teacher_softcap": 6.0, "student_logit_scale": 0.5},
    "alpha-beta": {"divergence": distil_fast.AlphaBeta(0.3, 0.6)},
    "narrow": {"vocab_size": 401, "labels": "cut"},
}


def options(name: str, heads: Heads) -> dict[str, Any]:
    how = dict(OPTIONS[name])
    if how.get("labels") == "cut":
        how["labels"] = heads.labels.clamp(max=400)
    return {k: there(v) for k, v in how.items()}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_options(dtype: torch.dtype, name: str, reduction: str) -> None:
    if reduction != "mean" and name == "counts":
        pytest.skip("counts go with a mean")
    heads = make(dtype)
    check(heads, BOUND[dtype], reduction=reduction, chunk_bytes=8 * V * 5, **options(name, heads))


@pytest.mark.parametrize("chunk_bytes", [None, 1, 8 * V * 7])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: torch.dtype, reduction: str, chunk_bytes: int | None) -> None:
    check(make(dtype), BOUND[dtype], reduction=reduction, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["plain", "all rows", "no labels", "soft off", "class weights"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_nothing_uses_may_stay(
    dtype: torch.dtype, name: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weight 0; then nothing asks where the others are, which would wait for a GPU."""
    monkeypatch.setattr(chunks, "places", lambda used: pytest.fail("asked"))
    heads = make(dtype)
    check(heads, BOUND[dtype], reduction=reduction, chunk_bytes=8 * V * 5, gather=False, **options(name, heads))


def test_leading_dimensions_are_rows() -> None:
    heads = make(torch.float32, 3, 5, 4)
    assert check(heads, 2e-6, reduction="none").loss.shape == (3, 5, 4)
    strided = heads._replace(student_hidden=heads.student_hidden.detach().transpose(0, 1).contiguous().transpose(0, 1))
    check(strided.wanting(), 2e-6)


def test_temperatures_and_weights_by_row() -> None:
    heads = make(torch.float32)
    g = torch.Generator().manual_seed(2)
    weights = there((torch.rand(ROWS, generator=g) - 0.3).clamp(min=0.0))
    check(heads, 2e-6, temperature=there(1.0 + torch.rand(ROWS, generator=g)), soft_mask=weights, chunk_bytes=8 * V * 4)


def test_without_biases_and_with_one() -> None:
    heads = make(torch.float32)
    loss = distil_fast.linear_distillation_loss(*heads[:2], *heads[3:5], heads.labels, teacher_bias=heads.teacher_bias)
    exact = heads.exact()
    truth = reference.linear_distillation_loss(*exact[:2], *exact[3:5], exact.labels, teacher_bias=exact.teacher_bias)
    assert off(loss.loss, truth.loss) < 2e-6
    grads = torch.autograd.grad(loss.loss, heads[:2])
    for mine, theirs in zip(grads, torch.autograd.grad(truth.loss, exact[:2]), strict=True):
        assert off(mine, theirs) < 2e-6


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_as_the_models_meet(dtype: torch.dtype, apart: float) -> None:
    """The models' logits are `apart` from each other: the gradient stays within 1 % of the truth, where logits in the
    heads' dtype lose it."""
    g = torch.Generator().manual_seed(3)
    hidden = (torch.randn(64, 96, generator=g)).to(dtype)
    weight = (0.5 * torch.randn(2048, 96, generator=g)).to(dtype)
    # the student's last state differs, and with it its logits: by 0.5 apart
    other = hidden.clone()
    other[:, -1] = (other[:, -1].float() + 2 * apart * 8).to(dtype)
    leaf = there(other).requires_grad_()
    errors = {}
    exact = other.double().requires_grad_()
    truth = reference.linear_distillation_loss(exact, weight.double(), hidden.double(), weight.double()).loss
    (expected,) = torch.autograd.grad(truth, exact)
    for precision in ("exact", "fast"):
        heads = leaf, there(weight), there(hidden), there(weight)
        loss = distil_fast.linear_distillation_loss(*heads, precision=precision).loss
        errors[precision] = off(torch.autograd.grad(loss, leaf)[0], expected)
    assert errors["exact"] < 0.01
    if dtype == torch.bfloat16 and apart <= 1e-2:
        assert errors["fast"] > 0.01  # so that the test says something


def test_float16_gradients_do_not_underflow_before_a_scaler_acts() -> None:
    """With weights of 1 / N the gradient is below float16's range; a loss scale of 2^16 brings it back."""
    heads = make(torch.float16)
    loss = heads.loss(soft_count=1e6, hard_count=1e6).loss
    exact = heads.exact()
    truth = exact.loss(reference, soft_count=1e6, hard_count=1e6).loss
    grads = torch.autograd.grad(loss * 2.0**16, heads.leaves())
    for mine, theirs in zip(grads, torch.autograd.grad(truth * 2.0**16, exact.leaves()), strict=True):
        assert off(mine, theirs) < BOUND[torch.float16]


@pytest.mark.parametrize("counts", [{}, {"hard_count": 0.0}], ids=["no label", "no count"])
def test_a_term_without_a_row_leaves_float16_its_unit(counts: dict[str, Any]) -> None:
    """A denominator of 0 is a share of 0, and not of the infinity that no unit is made of."""
    heads = make(torch.float16)
    heads = heads._replace(labels=heads.labels if counts else torch.full_like(heads.labels, -100))
    exact = heads.exact()
    truth = exact.loss(reference, soft_count=1e6, **counts).loss
    grads = torch.autograd.grad(heads.loss(soft_count=1e6, **counts).loss * 2.0**16, heads.leaves())
    for mine, theirs in zip(grads, torch.autograd.grad(truth * 2.0**16, exact.leaves()), strict=True):
        assert off(mine, theirs) < BOUND[torch.float16]


def test_gradients_accumulate_over_parts_of_a_batch() -> None:
    heads = make(torch.float32)
    whole = torch.autograd.grad(heads.loss().loss, heads.leaves())
    soft_count, hard_count = float(heads.mask.sum()), float((heads.labels != -100).sum())
    for leaf in heads.leaves():
        leaf.grad = None
    for part in (slice(0, 10), slice(10, ROWS)):
        hidden, teacher = heads.student_hidden[part], heads.teacher_hidden[part]
        distil_fast.linear_distillation_loss(
            hidden,
            heads.student_weight,
            teacher,
            heads.teacher_weight,
            heads.labels[part],
            student_bias=heads.student_bias,
            teacher_bias=heads.teacher_bias,
            soft_mask=heads.mask[part],
            soft_count=soft_count,
            hard_count=hard_count,
        ).loss.backward()
    for leaf, expected in zip(heads.leaves(), whole, strict=True):
        assert leaf.grad is not None
        assert off(leaf.grad, expected.cpu()) < 2e-6


def test_float32_weights_beside_half_precision_states() -> None:
    """Master weights: computed in the states' dtype, their gradient in float32."""
    heads = make(torch.bfloat16)
    masters = Heads(*(x.float() if i in (1, 2, 4, 5) else x for i, x in enumerate(heads))).wanting()
    grads = torch.autograd.grad(masters.loss().loss, masters.leaves())
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    for mine, theirs in zip(grads, torch.autograd.grad(heads.loss().loss, heads.leaves()), strict=True):
        assert off(mine, theirs.cpu()) < 6e-3


def test_single_terms_are_those_of_the_whole() -> None:
    heads = make(torch.float32)
    whole = heads.loss(temperature=1.0)
    states, teacher = (heads.student_hidden, heads.student_weight), (heads.teacher_hidden, heads.teacher_weight)
    biases = {"student_bias": heads.student_bias, "teacher_bias": heads.teacher_bias}
    soft = distil_fast.linear_divergence_loss(*states, *teacher, mask=heads.mask, **biases)
    hard = distil_fast.linear_cross_entropy(*states, heads.labels, bias=heads.student_bias)
    assert off(soft, whole.soft.cpu()) < 1e-6
    assert off(hard, whole.hard.cpu()) < 1e-6


@pytest.mark.parametrize("form", ["hidden", "logits", "log_probs", "probs"])
def test_any_form_of_teacher_is_the_same_teacher(form: str) -> None:
    """`Hidden` beside the student's logits, and a teacher's rows beside the student's head."""
    heads = make(torch.float32)
    bias = {"student_bias": heads.student_bias}
    expected = heads.loss()
    grads = torch.autograd.grad(expected.loss, heads.leaves())
    teacher = reference.head_logits(heads.teacher_hidden, heads.teacher_weight, heads.teacher_bias)
    if form == "hidden":
        logits = reference.head_logits(*heads.leaves())
        given = Hidden(heads.teacher_hidden, heads.teacher_weight, heads.teacher_bias)
        loss = distil_fast.distillation_loss(logits, given, heads.labels, soft_mask=heads.mask)
    else:
        rows = {
            "logits": lambda: teacher,
            "log_probs": lambda: LogProbs((teacher / 2.0).log_softmax(-1)),
            "probs": lambda: Probs((teacher / 2.0).softmax(-1)),
        }[form]()
        student = heads.student_hidden, heads.student_weight
        loss = distil_fast.linear_distillation_loss(*student, rows, None, heads.labels, soft_mask=heads.mask, **bias)
    assert off(loss.loss, expected.loss.detach().cpu()) < 3e-6
    for mine, theirs in zip(torch.autograd.grad(loss.loss, heads.leaves()), grads, strict=True):
        assert off(mine, theirs.cpu()) < 1e-5


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "ignore"])
def test_a_top_k_teacher_beside_the_students_head(tail: str) -> None:
    heads = make(torch.float32)
    logits = reference.head_logits(heads.teacher_hidden, heads.teacher_weight, heads.teacher_bias)
    teacher = distil_fast.TopK.from_logits(logits, 6, 2.0, tail)
    how = {"soft_mask": heads.mask, "student_bias": heads.student_bias, "chunk_bytes": 8 * V * 5}
    loss = distil_fast.linear_distillation_loss(*heads[:2], teacher, None, heads.labels, **how).loss
    whole = reference.head_logits(*heads.leaves())
    expected = distil_fast.distillation_loss(whole, teacher, heads.labels, soft_mask=heads.mask).loss
    assert off(loss, expected.detach().cpu()) < 1e-6
    grads = torch.autograd.grad(loss, heads.leaves())
    for mine, theirs in zip(grads, torch.autograd.grad(expected, heads.leaves()), strict=True):
        assert off(mine, theirs.cpu()) < 3e-6
