"""What the public functions mean, clause by clause, against formulae written with torch.nn in float64.

Errors are test_checks.py's, autograd is test_ops.py's, and how exact a kernel is test_row_loss.py's. Next: batch.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import distil_fast
from distil_fast import JSD, reference
from tests.batch import CALLS, Batch, as_double, assert_close, assert_identical, error, make_batch, run

BOUND = {torch.float32: 2e-6, torch.float64: 1e-12}

both_dtypes = pytest.mark.parametrize("dtype", BOUND, ids=str)


def kl_rows(p_logits: Tensor, q_logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """KL(softmax(p / T) || softmax(q / T)) of each row, by torch."""
    by = torch.as_tensor(temperature, dtype=p_logits.dtype).unsqueeze(-1)
    log_p, log_q = (p_logits / by).log_softmax(-1), (q_logits / by).log_softmax(-1)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def ce_rows(logits: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    """Cross-entropy of each row, 0 where there is no label, by torch."""
    rows = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", **settings)
    return rows.view(labels.shape)


# ------------------------------------------------------------------------------------------------ the terms


@both_dtypes
def test_each_term_is_a_mean_over_its_own_rows(dtype: torch.dtype) -> None:
    b = make_batch(3, 5, dtype=dtype)

    def formula(b: Batch) -> tuple[Tensor, ...]:
        valid = b.attention_mask
        soft = 9.0 * kl_rows(b.teacher_logits, b.student_logits, 3.0)[valid].sum() / valid.sum()
        hard = ce_rows(b.student_logits, b.labels).sum() / (b.labels != -100).sum()
        return 0.7 * soft + 0.4 * hard, soft, hard

    def ours(b: Batch) -> tuple[Tensor, ...]:
        return distil_fast.distillation_loss(
            b.student_logits,
            b.teacher_logits,
            b.labels,
            temperature=3.0,
            soft_weight=0.7,
            hard_weight=0.4,
            soft_mask=b.attention_mask,
        )

    assert_close(run(ours, b), run(formula, as_double(b)), BOUND[dtype])


@both_dtypes
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_other_reductions_have_no_denominator(reduction: str, dtype: torch.dtype) -> None:
    b = make_batch(3, 5, dtype=dtype)

    def formula(b: Batch) -> tuple[Tensor, ...]:
        soft = 4.0 * b.token_weights * kl_rows(b.teacher_logits, b.student_logits, 2.0)
        hard = ce_rows(b.student_logits, b.labels)
        terms = 0.7 * soft + 0.4 * hard, soft, hard
        return terms if reduction == "none" else tuple(t.sum() for t in terms)

    def ours(b: Batch) -> tuple[Tensor, ...]:
        return distil_fast.distillation_loss(
            b.student_logits,
            b.teacher_logits,
            b.labels,
            soft_weight=0.7,
            hard_weight=0.4,
            soft_mask=b.token_weights,
            reduction=reduction,
        )

    assert_close(run(ours, b), run(formula, as_double(b)), BOUND[dtype])


def jsd_rows(t: Tensor, s: Tensor, beta: float) -> Tensor:
    log_t, log_s = t.log_softmax(-1), s.log_softmax(-1)
    log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
    return (beta * log_t.exp() * (log_t - log_m) + (1 - beta) * log_s.exp() * (log_s - log_m)).sum(-1)


DIVERGENCES: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda t, s: kl_rows(t, s),
    "reverse_kl": lambda t, s: kl_rows(s, t),
    "jsd": lambda t, s: jsd_rows(t, s, 0.5),
    distil_fast.ForwardKL(): lambda t, s: kl_rows(t, s),
    distil_fast.ReverseKL(): lambda t, s: kl_rows(s, t),
    JSD(0.1): lambda t, s: jsd_rows(t, s, 0.1),
    JSD(beta=0.8): lambda t, s: jsd_rows(t, s, 0.8),
}


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@both_dtypes
def test_divergences_by_name_and_by_object(divergence: Any, dtype: torch.dtype) -> None:
    b = make_batch(6, dtype=dtype)
    actual = run(lambda b: distil_fast.divergence_loss(b.student_logits, b.teacher_logits, divergence=divergence), b)
    expected = run(lambda b: DIVERGENCES[divergence](b.teacher_logits, b.student_logits).mean(), as_double(b))
    assert_close(actual, expected, BOUND[dtype])


@pytest.mark.parametrize("t_squared", [True, False])
def test_t_squared_is_inside_the_mean_where_t_is_per_row(t_squared: bool) -> None:
    b = as_double(make_batch(3, 5))
    t = b.temperatures
    rows = kl_rows(b.teacher_logits, b.student_logits, t) * (t**2 if t_squared else 1.0)
    terms = distil_fast.distillation_loss(b.student_logits, b.teacher_logits, temperature=t, t_squared=t_squared)
    assert_close(terms.loss, rows.mean(), 1e-12)


def test_the_defaults() -> None:
    """T = 2 and T^2 for the loss of a training, T = 1 and no T^2 for a plain divergence."""
    b = as_double(make_batch(6))
    terms = distil_fast.distillation_loss(b.student_logits, b.teacher_logits, b.labels)
    assert_close(terms.soft, 4.0 * kl_rows(b.teacher_logits, b.student_logits, 2.0).mean(), 1e-12)
    assert_close(terms.loss, terms.soft + terms.hard, 1e-12)
    alone = distil_fast.divergence_loss(b.student_logits, b.teacher_logits)
    assert_close(alone, kl_rows(b.teacher_logits, b.student_logits).mean(), 1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_is_torchs(smoothing: float) -> None:
    b = as_double(make_batch(9))
    expected = run(lambda b: functional.cross_entropy(b.student_logits, b.labels, label_smoothing=smoothing), b)
    actual = run(lambda b: distil_fast.cross_entropy(b.student_logits, b.labels, label_smoothing=smoothing), b)
    assert_close(actual, expected, 1e-12)


def test_ignore_index_may_be_any_label() -> None:
    b = as_double(make_batch(9))
    labels = b.labels.clamp(min=0)
    for ignored in (int(labels[2]), -1, 1000):
        marked = torch.where(b.labels == -100, ignored, labels)
        actual = distil_fast.cross_entropy(b.student_logits, marked, ignore_index=ignored)
        assert_close(actual, functional.cross_entropy(b.student_logits, marked, ignore_index=ignored), 1e-12)


@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_labels_of_every_integer_type(integer: torch.dtype) -> None:
    b = make_batch(9)
    labels = b.labels.clamp(min=0).to(integer)
    expected = distil_fast.cross_entropy(b.student_logits, labels.long())
    assert torch.equal(distil_fast.cross_entropy(b.student_logits, labels), expected)


# ------------------------------------------------------------------------------------------------ LossTerms


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_losses_are_float32_whatever_the_logits_are(dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    b = make_batch(3, 5)
    student, teacher = b.student_logits.detach().to(dtype).requires_grad_(), b.teacher_logits.to(teacher_dtype)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (3, 5))):
        terms = distil_fast.distillation_loss(student, teacher, b.labels, reduction=reduction)
        exact = reference.distillation_loss(student.double(), teacher.double(), b.labels, reduction=reduction)
        for name, value in terms._asdict().items():
            assert value.dtype == torch.float32
            assert value.shape == shape
            assert_close(value, getattr(exact, name), 2e-6)
        (grad,) = torch.autograd.grad(terms.loss.sum(), student)
        assert grad.dtype == dtype
    assert distil_fast.cosine_loss(student, teacher).dtype == torch.float32
    assert distil_fast.softmax(student).dtype == dtype


def test_float64_logits_have_float64_losses() -> None:
    b = as_double(make_batch(3, 5))
    for call in CALLS.values():
        result = run(lambda b, call=call: call(distil_fast, b), b)
        assert {t.dtype for t in (*result.values, *result.grads)} == {torch.float64}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_terms_are_detached(reduction: str) -> None:
    b = make_batch(6)
    loss, soft, hard = distil_fast.distillation_loss(b.student_logits, b.teacher_logits, b.labels, reduction=reduction)
    assert loss.requires_grad
    assert not soft.requires_grad
    assert not hard.requires_grad
    terms = distil_fast.triple_loss(*make_batch(6)[:6])
    assert [t.requires_grad for t in terms] == [True, False, False, False]


def test_terms_have_names() -> None:
    b = make_batch(6)
    terms = distil_fast.distillation_loss(b.student_logits, b.teacher_logits, b.labels)
    assert isinstance(terms, distil_fast.LossTerms)
    assert terms == (terms.loss, terms.soft, terms.hard)
    triple = distil_fast.triple_loss(*b[:6])
    assert isinstance(triple, distil_fast.TripleTerms)
    assert triple == (triple.loss, triple.ce, triple.mlm, triple.cos)


# ------------------------------------------------------------------------------------------------ weights and counts


def test_hard_weight_is_1_with_labels_and_0_without() -> None:
    b = make_batch(6)
    with_labels = distil_fast.distillation_loss(b.student_logits, b.teacher_logits, b.labels)
    assert with_labels.hard > 0
    assert_close(with_labels.loss, with_labels.soft + with_labels.hard, 1e-6)
    without = distil_fast.distillation_loss(b.student_logits, b.teacher_logits)
    assert without.hard == 0
    assert without.loss == without.soft == with_labels.soft


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_term_of_weight_0_reads_nothing(reduction: str, as_tensor: bool) -> None:
    b = make_batch(6)
    zero = torch.tensor(0.0) if as_tensor else 0.0
    nothing = torch.full_like(b.teacher_logits, float("nan"))

    def hard_only(b: Batch) -> tuple[Tensor, ...]:
        return distil_fast.distillation_loss(b.student_logits, nothing, b.labels, soft_weight=zero, reduction=reduction)

    def soft_only(b: Batch) -> tuple[Tensor, ...]:
        return distil_fast.distillation_loss(
            b.student_logits, b.teacher_logits, b.labels, hard_weight=zero, reduction=reduction
        )

    (loss, soft, hard), grads = run(hard_only, b)
    (alone,), alone_grads = run(lambda b: distil_fast.cross_entropy(b.student_logits, b.labels, reduction=reduction), b)
    assert torch.equal(loss, alone)
    assert torch.equal(hard, alone)
    assert not soft.any()
    assert torch.equal(grads[0], alone_grads[0])

    (loss, soft, hard), grads = run(soft_only, b)
    (alone, *_), alone_grads = run(
        lambda b: distil_fast.distillation_loss(b.student_logits, b.teacher_logits, reduction=reduction), b
    )
    assert torch.equal(loss, alone)
    assert not hard.any()
    assert torch.equal(grads[0], alone_grads[0])


def test_weights_and_counts_are_numbers_or_tensors() -> None:
    b = make_batch(6)
    numbers = {"soft_weight": 0.25, "hard_weight": 1.5, "soft_count": 3.0, "hard_count": 8.0, "temperature": 3.0}
    settings = {"as numbers": numbers, "as tensors": {name: torch.tensor(x) for name, x in numbers.items()}}
    settings["as float64 tensors"] = {name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()}
    results = [
        run(lambda b, s=s: distil_fast.distillation_loss(b.student_logits, b.teacher_logits, b.labels, **s), b)
        for s in settings.values()
    ]
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])


def test_counts_replace_the_denominators() -> None:
    b = as_double(make_batch(6))
    sums = distil_fast.distillation_loss(
        b.student_logits, b.teacher_logits, b.labels, soft_mask=b.token_weights, reduction="sum"
    )
    means = distil_fast.distillation_loss(
        b.student_logits, b.teacher_logits, b.labels, soft_mask=b.token_weights, soft_count=2.5, hard_count=40
    )
    assert_close(means.soft, sums.soft / 2.5, 1e-12)
    assert_close(means.hard, sums.hard / 40, 1e-12)
    assert_close(means.loss, means.soft + means.hard, 1e-12)


# ------------------------------------------------------------------------------------------------ masks


def test_bool_masks_are_weights_of_0_and_1_and_only_proportions_matter() -> None:
    b = make_batch(3, 5)

    def losses(mask: Tensor) -> Tensor:
        return distil_fast.divergence_loss(b.student_logits, b.teacher_logits, mask=mask)

    assert torch.equal(losses(b.attention_mask), losses(b.attention_mask.float()))
    assert torch.equal(losses(b.token_weights), losses(4.0 * b.token_weights))
    assert torch.equal(losses(torch.full((3, 5), 2.0)), distil_fast.divergence_loss(b.student_logits, b.teacher_logits))
    assert error(losses(b.token_weights), losses(b.attention_mask)) > 1e-3


@both_dtypes
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("filler", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_no_term_uses_are_never_read(filler: float, reduction: str, dtype: torch.dtype) -> None:
    b = make_batch(3, 5, dtype=dtype)
    unused = ~b.attention_mask
    labels = b.labels.masked_fill(unused, -100)

    def call(b: Batch) -> tuple[Tensor, ...]:
        return distil_fast.distillation_loss(
            b.student_logits, b.teacher_logits, labels, soft_mask=b.attention_mask, reduction=reduction
        )

    clean = run(call, b)
    spoilt = [t.detach().masked_fill(unused.unsqueeze(-1), filler) for t in b[:2]]
    dirty = run(call, b._replace(student_logits=spoilt[0].requires_grad_(), teacher_logits=spoilt[1]))
    assert_identical(dirty, clean)
    assert not dirty.grads[0][unused].any()
    assert dirty.grads[0][~unused].any(-1).all()


def test_a_row_without_soft_share_does_not_read_the_teacher() -> None:
    b = make_batch(9)
    labels, mask = torch.arange(9), torch.arange(9) % 2 == 0
    spoilt = b.teacher_logits.masked_fill(~mask.unsqueeze(-1), float("nan"))
    terms = distil_fast.distillation_loss(b.student_logits, spoilt, labels, soft_mask=mask)
    clean = distil_fast.distillation_loss(b.student_logits, b.teacher_logits, labels, soft_mask=mask)
    assert terms.loss.isfinite()
    assert all(torch.equal(x, y) for x, y in zip(terms, clean, strict=True))


NOTHING: dict[str, Any] = {
    "masks": {"soft_mask": torch.zeros(3, 5, dtype=torch.bool)},
    "weights": {"soft_mask": torch.zeros(3, 5)},
    "counts": {"soft_count": 0, "hard_count": 0.0},
    "count_tensors": {"soft_count": torch.tensor(0.0), "hard_count": torch.tensor(0)},
}


@pytest.mark.parametrize("settings", NOTHING.values(), ids=NOTHING)
@both_dtypes
def test_without_a_valid_row_the_loss_is_0_with_zero_gradient(settings: dict[str, Any], dtype: torch.dtype) -> None:
    b = make_batch(3, 5, dtype=dtype)
    labels = b.labels if "hard_count" in settings else torch.full_like(b.labels, -100)
    for api in (distil_fast, reference):
        (loss, soft, hard), (grad,) = run(
            lambda b, api=api: api.distillation_loss(b.student_logits, b.teacher_logits, labels, **settings), b
        )
        assert loss == soft == hard == 0
        assert grad.shape == b.student_logits.shape
        assert not grad.any()


def test_a_term_without_a_valid_row_leaves_the_other_alone() -> None:
    b = make_batch(6)
    ignored = torch.full_like(b.labels, -100)
    soft = distil_fast.distillation_loss(b.student_logits, b.teacher_logits, ignored)
    assert torch.equal(soft.loss, distil_fast.distillation_loss(b.student_logits, b.teacher_logits).loss)
    masked = torch.zeros(6, dtype=torch.bool)
    hard = distil_fast.distillation_loss(b.student_logits, b.teacher_logits, b.labels, soft_mask=masked)
    assert torch.equal(hard.loss, distil_fast.cross_entropy(b.student_logits, b.labels))
    assert distil_fast.cosine_loss(b.student_hidden, b.teacher_hidden, masked) == 0
    assert distil_fast.cosine_loss(b.student_hidden, b.teacher_hidden, count=0) == 0


# ------------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 3, 2), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_any_leading_shape_is_rows(name: str, leading: tuple[int, ...]) -> None:
    b = make_batch(*leading)
    actual = run(lambda b: CALLS[name](distil_fast, b), b)
    flat = Batch(*(t.detach().reshape(-1, *t.shape[len(leading) :]).requires_grad_(t.requires_grad) for t in b))
    expected = run(lambda b: CALLS[name](reference, b), as_double(flat))
    per_row = [v.dim() > 0 for v in expected.values]
    values = tuple(
        v.reshape((*leading, *v.shape[1:])) if rows else v for v, rows in zip(expected.values, per_row, strict=True)
    )
    grads = tuple(g.reshape(*leading, g.shape[-1]) for g in expected.grads)
    assert_close(actual, type(expected)(values, grads), 3e-6)


# ------------------------------------------------------------------------------------------------ the reference


@pytest.mark.parametrize("name", CALLS)
@both_dtypes
def test_the_reference_means_the_same(name: str, dtype: torch.dtype) -> None:
    b = make_batch(3, 5, dtype=dtype)
    actual = run(lambda b: CALLS[name](distil_fast, b), b)
    assert_close(actual, run(lambda b: CALLS[name](reference, b), as_double(b)), BOUND[dtype])
