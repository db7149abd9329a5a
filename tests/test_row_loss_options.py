"""Transforms of the logits, forms of teacher, cut vocabularies, class weights and z-loss, against the fp64 oracle and
against torch's own formulae.

Bounds and inputs are oracle.py's. Next: test_row_loss.py, the same of plain logits.
"""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import distil_fast
from distil_fast import LogProbs, Probs
from tests import calls, oracle
from tests.test_row_loss import HALF_MIXES, name_of

INF = math.inf
Settings = dict[str, Any]
OPTIONS: dict[str, Settings] = {
    "student scale": {"student_logit_scale": 0.37},
    "student softcap": {"student_softcap": 4.0},
    "teacher scale": {"teacher_logit_scale": 1.9},
    "teacher softcap": {"teacher_softcap": 5.0, "teacher_logit_scale": 0.8},
    "softcaps": {"student_softcap": 30.0, "teacher_softcap": 30.0},
    "log_probs": {"teacher_form": "log_probs"},
    "probs": {"teacher_form": "probs"},
    "log_probs, softcap": {"teacher_form": "log_probs", "student_softcap": 20.0, "student_logit_scale": 1.5},
}
SIZES = (1, 2, 7, 17, 2049, 5000)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = ("plain", "close", "far", "sharp")


def in_form(form: str, logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """Nine tenths of the distribution of float64 logits, as a teacher of this form gives it: rows are normalised."""
    if form == "logits":
        return logits.to(dtype)
    log_probs = (logits / temperature).log_softmax(-1) + math.log(0.9)
    return (log_probs if form == "log_probs" else log_probs.exp()).to(dtype)


@cache
def matrix(option: str, dtypes: tuple[torch.dtype, torch.dtype]) -> list[tuple[Any, ...]]:
    """Kinds of logits, temperatures, sizes, divergences and terms, taking turns."""
    cases = []
    divergences, start = list(oracle.DIVERGENCES.values()), list(OPTIONS).index(option)
    for i, (kind, temperature) in enumerate(itertools.product(KINDS, (1.0, 2.0, 3.7)), start=start):
        size, labelled = SIZES[i % len(SIZES)], i % 2 == 0
        settings = OPTIONS[option] | {"divergence": divergences[i % len(divergences)], "temperature": temperature}
        g = oracle.generator(option, kind, size, temperature)
        student, teacher = oracle.logit_pair(kind, 4, size, g)
        student = student.to(dtypes[0])
        teacher = in_form(settings.get("teacher_form", "logits"), teacher, temperature, dtypes[1])
        labels = torch.randint(0, size, (4,), generator=g).index_fill(0, torch.tensor([1]), -100) if labelled else None
        truth = oracle.exact(student, teacher, labels, **settings)
        cases.append((f"{kind} {size} {settings}", student, teacher, labels, settings, truth))
    return cases


@pytest.mark.parametrize("dtypes", HALF_MIXES, ids=name_of)
@pytest.mark.parametrize("option", OPTIONS)
def test_matrix(instruction_set: str, option: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for where, student, teacher, labels, settings, truth in matrix(option, dtypes):
        calls.by_backend(student, teacher, labels, **settings).check(truth, f"{instruction_set} {where}")


@pytest.mark.parametrize("option", OPTIONS)
def test_matrix_in_double_precision(option: str) -> None:
    for where, student, teacher, labels, settings, truth in matrix(option, (torch.float64,) * 2):
        calls.by_backend(student, teacher, labels, **settings).check(truth, where)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("form", ["log_probs", "probs"])
def test_forms_of_teacher_as_a_user_passes_them(form: str, reduction: str, dtype: torch.dtype) -> None:
    student, teacher = oracle.logit_pair("plain", 6, 37, oracle.generator("forms"))
    temperature = torch.tensor([0.5, 1.0, 2.0, 3.7, 10.0, 2.0])
    given = in_form(form, teacher, 1.0, dtype)
    upstream = torch.tensor([1.0, -0.5, 3.0, 0.0, 0.125, 2.0]) if reduction == "none" else None
    settings: Settings = {"temperature": temperature, "teacher_form": form, "reduction": reduction}
    calls.check(student.to(dtype), given, torch.arange(6), form, upstream, **settings)


# ------------------------------------------------------------------------------------------------ transforms


def test_the_same_transform_of_the_same_logits_has_no_divergence(instruction_set: str) -> None:
    logits = 5 * torch.randn(3, 3001, generator=oracle.generator("same"))
    both: Settings = {
        f"{m}_{name}": x for m in ("student", "teacher") for name, x in (("softcap", 7.0), ("logit_scale", 0.3))
    }
    for divergence in set(oracle.DIVERGENCES) - {"soft_cross_entropy"}:
        result = calls.by_backend(logits.clone(), logits, divergence=oracle.DIVERGENCES[divergence], **both)
        assert result.values["loss"] == 0, divergence
        assert not result.grad.any(), divergence


def test_a_small_logit_keeps_its_digits_under_a_large_cap(instruction_set: str) -> None:
    """tanh by a difference of exponentials would leave none of 1e-4 / 1e4."""
    student, teacher = (x.float() for x in oracle.logit_pair("close", 4, 3000, oracle.generator("small")))
    for cap in (50.0, 1e4, 1e12):
        truth = oracle.exact(1e-2 * student, 1e-2 * teacher, student_softcap=cap, teacher_softcap=cap)
        result = calls.by_backend(1e-2 * student, 1e-2 * teacher, student_softcap=cap, teacher_softcap=cap)
        result.check(truth, f"cap {cap}")


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_masked_columns_stay_masked_under_a_softcap(instruction_set: str, dtype: torch.dtype) -> None:
    """cap tanh(-inf / cap) would be -cap: a column that counts."""
    student, teacher = (x.to(dtype) for x in oracle.logit_pair("plain", 4, 5000, oracle.generator("masked")))
    columns = torch.arange(5000) % 3 == 0
    columns[:2048] = True
    settings: Settings = {"student_softcap": 3.0, "teacher_softcap": 4.0, "student_logit_scale": 0.5, "z_loss": 0.01}
    labels = torch.tensor([4999, -100, 2048, 2050])
    assert not columns[labels.clamp(min=2048)].any()
    place = (~columns).cumsum(0)[labels.clamp(min=0)] - 1
    truth = oracle.exact(student[:, ~columns], teacher[:, ~columns], torch.where(labels < 0, labels, place), **settings)
    result = calls.by_backend(
        student.masked_fill(columns, -INF), teacher.masked_fill(columns, -INF), labels, **settings
    )
    oracle.check_values(result.values, truth, "masked")
    oracle.check_gradient(result.grad[:, ~columns], truth, "masked", result.unit)
    assert (result.grad[:, columns] == 0).all()


def test_a_column_masked_in_the_student_alone(instruction_set: str) -> None:
    """Forward KL's gradient there is q - p, which a softcap takes to 0; a logit scale only scales it."""
    student, teacher = (x.float() for x in oracle.logit_pair("plain", 2, 100, oracle.generator("alone")))
    student[:, 7] = -INF
    p = teacher.double().div(2.0).softmax(-1)
    options: list[tuple[Settings, float]] = [({"student_softcap": 5.0}, 0.0), ({"student_logit_scale": 0.5}, 0.5)]
    for option, slope in options:
        result = calls.by_backend(student, teacher, reduction="sum", t_squared=False, **option)
        assert result.values["loss"] == INF
        torch.testing.assert_close(result.grad[:, 7].double(), -slope * p[:, 7] / 2.0, rtol=1e-5, atol=0)


def test_infinite_logits_reach_the_cap(instruction_set: str) -> None:
    student, teacher = (x.float() for x in oracle.logit_pair("plain", 3, 50, oracle.generator("infinite")))
    student[1, 3] = INF
    expected = calls.by_backend(student.clamp(max=1e30), teacher, student_softcap=5.0)
    result = calls.by_backend(student, teacher, student_softcap=5.0)
    assert torch.equal(result.grad, expected.grad)
    assert result.values == expected.values
    student[2, 4] = math.nan
    rows = calls.by_backend(student, teacher, student_softcap=5.0, reduction="none")
    assert rows.values["loss"].isnan().tolist() == [False, False, True]


# ------------------------------------------------------------------------------------------------ memory and threads

EVERYTHING: Settings = {
    "student_softcap": 4.0,
    "student_logit_scale": 1.3,
    "teacher_form": "log_probs",
    "z_loss": 0.01,
    "temperature": 2.0,
    "divergence": "jsd",
}


def everything(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Settings]:
    g = oracle.generator("everything", rows, size)
    student, teacher = oracle.logit_pair("plain", rows, size, g)
    labels = torch.randint(0, size, (rows,), generator=g)
    settings = EVERYTHING | {"class_weights": torch.rand(size, generator=g)}
    return student.to(dtype), in_form("log_probs", teacher, 2.0, dtype), labels, settings


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_is_the_same_to_the_bit(instruction_set: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        student, teacher, labels, settings = everything(3, size, dtype)
        fresh = calls.by_backend(student, teacher, labels, **settings)
        over = student.clone()
        inplace = calls.by_backend(over, teacher, labels, gradient="inplace", **settings)
        assert torch.equal(fresh.grad, inplace.grad)
        assert fresh.values == inplace.values
        if calls.DEVICE.type == "cpu":
            assert torch.equal(over, fresh.grad)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_threads_change_no_bit(rows: int) -> None:
    """Fewer rows than threads: then each row's columns are split over them."""
    student, teacher, labels, settings = everything(rows, 60000, torch.float32)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(calls.by_backend(student, teacher, labels, **settings))
    for result in results[1:]:
        assert torch.equal(result.grad, results[0].grad)
        assert result.values == results[0].values


# ------------------------------------------------------------------------------------------------ forms of teacher


@pytest.mark.parametrize("form", [LogProbs, Probs])
def test_a_teacher_of_probabilities_equals_its_logits(form: type[LogProbs] | type[Probs]) -> None:
    student, teacher = oracle.logit_pair("plain", 5, 301, oracle.generator("equal"))
    for temperature in (1.0, 3.0):
        log_probs = (teacher / temperature).log_softmax(-1)
        given = form(log_probs if form is LogProbs else log_probs.exp())
        for divergence in oracle.DIVERGENCES.values():
            arguments: Settings = {"temperature": temperature, "divergence": divergence}
            expected, actual = (student.clone().requires_grad_() for _ in range(2))
            one = distil_fast.distillation_loss(expected, teacher, **arguments).loss
            other = distil_fast.distillation_loss(actual, given, **arguments).loss
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(
                torch.autograd.grad(one, expected), torch.autograd.grad(other, actual), rtol=1e-8, atol=1e-14
            )


def test_a_probability_of_zero_is_a_masked_column(instruction_set: str) -> None:
    student, teacher = (x.float() for x in oracle.logit_pair("plain", 3, 5000, oracle.generator("zeros")))
    columns = torch.arange(5000) % 2 == 0
    probabilities = teacher.double().masked_fill(columns, -INF).softmax(-1).float()
    for divergence in ("forward_kl", "jsd", "total_variation", "hellinger", "alpha_beta", "skewed_kl"):
        given: Settings = {"divergence": divergence, "temperature": 1.0}
        value, gradient = oracle.closed_form(divergence, student, probabilities.double().log(), 1.0)
        result = calls.by_backend(student, probabilities, teacher_form="probs", reduction="sum", **given)
        assert result.values["loss"].item() == pytest.approx(value.sum().item(), rel=4e-6)
        assert ((result.grad.double() - gradient).norm(dim=-1) <= 1e-5 * gradient.norm(dim=-1)).all(), divergence


@pytest.mark.parametrize("size", [5, 4100])
@pytest.mark.parametrize(
    ("form", "bad"),
    [
        *(("probs", x) for x in (0.95, -1e-3, math.nan, INF, 40.0)),
        *(("log_probs", x) for x in (-0.05, 1.0, math.nan, INF)),
    ],
)
def test_a_row_that_is_no_distribution_is_an_error(instruction_set: str, form: str, bad: float, size: int) -> None:
    student, teacher = oracle.logit_pair("plain", 4, size, oracle.generator("mass"))
    given = in_form(form, teacher, 1.0, torch.float32)
    given[2, size - 1] = bad
    with pytest.raises(ValueError, match=r"teacher_logits: expected probabilities.* in row 2"):
        calls.by_backend(student.float(), given, teacher_form=form, temperature=1.0)
    unused = torch.tensor([1.0, 1.0, 0.0, 1.0])
    result = calls.by_backend(student.float(), given, teacher_form=form, temperature=1.0, soft_mask=unused)
    assert result.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_rounding_is_no_error(instruction_set: str, dtype: torch.dtype) -> None:
    """Uniform rows: every entry is rounded the same way."""
    for size in (3, 10, 1000, 30522, 100003):
        uniform = torch.full((1, size), -math.log(size), dtype=torch.float64)
        student = torch.zeros(1, size, dtype=dtype)
        for form, given in (("log_probs", uniform), ("probs", uniform.exp())):
            result = calls.by_backend(student, given.to(dtype), teacher_form=form, temperature=1.0)
            assert result.values["loss"] < 1e-6


# ------------------------------------------------------------------------------------------------ vocab_size


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vocab_size_is_slicing(dtype: torch.dtype, inplace: bool, reduction: str) -> None:
    if (inplace and reduction == "none") or calls.DEVICE.type != "cpu":
        pytest.skip("inplace has a reduction; leaves are on the CPU")
    student, teacher = oracle.logit_pair("plain", 5, 64, oracle.generator("cut"))
    student, teacher = student[:, :53].to(dtype), teacher.to(dtype)
    student[:, 47:], teacher[:, 47:] = math.nan, INF  # padding is not read
    labels = torch.tensor([0, 46, -100, 3, 7])
    settings: Settings = {"label_smoothing": 0.1, "reduction": reduction}
    expected, actual = student[:, :47].clone().requires_grad_(), student.clone().requires_grad_()
    sliced = distil_fast.distillation_loss(expected, teacher[:, :47], labels, **settings)
    cut = distil_fast.distillation_loss(actual, teacher, labels, vocab_size=47, inplace=inplace, **settings)
    assert all(torch.equal(a, b) for a, b in zip(sliced, cut, strict=True))
    sliced.loss.sum().backward()
    cut.loss.sum().backward()
    assert actual.grad is not None
    assert expected.grad is not None
    assert torch.equal(actual.grad[:, :47], expected.grad)
    assert (actual.grad[:, 47:] == 0).all()


def test_labels_beyond_vocab_size_are_errors() -> None:
    student, teacher = oracle.logit_pair("plain", 2, 20, oracle.generator("beyond"))
    with pytest.raises(ValueError, match=r"labels: expected 0 <= label < 15 .*got 15 in row 1"):
        distil_fast.distillation_loss(student, teacher, torch.tensor([14, 15]), vocab_size=15)


def test_different_widths_are_an_error_that_names_vocab_size() -> None:
    student, teacher = torch.zeros(2, 20), torch.zeros(2, 24)
    with pytest.raises(ValueError, match=r"at most 20: with vocab_size"):
        distil_fast.distillation_loss(student, teacher)
    with pytest.raises(ValueError, match=r"vocab_size: expected 1 to 20"):
        distil_fast.distillation_loss(student, teacher, vocab_size=21)


# ------------------------------------------------------------------------------------------------ the hard term


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_weights_are_torchs(reduction: str) -> None:
    g = oracle.generator("class weights")
    logits = 3 * torch.randn(7, 19, generator=g, dtype=torch.float64)
    labels = torch.tensor([0, 3, -100, 18, 3, 5, -100])
    weights = torch.rand(19, generator=g, dtype=torch.float64).index_fill(0, torch.tensor([5]), 0.0)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    one = distil_fast.cross_entropy(ours, labels, class_weights=weights, reduction=reduction)
    other = F.cross_entropy(theirs, labels, weight=weights, reduction=reduction)
    torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(
        torch.autograd.grad(one.sum(), ours), torch.autograd.grad(other.sum(), theirs), rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.7])
def test_z_loss_is_its_formula(temperature: float) -> None:
    logits, teacher = oracle.logit_pair("plain", 6, 29, oracle.generator("z-loss"))
    labels = torch.tensor([0, 3, -100, 28, 3, 5])
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    one = distil_fast.distillation_loss(ours, teacher, labels, temperature=temperature, z_loss=0.02).loss
    kl = F.kl_div((theirs / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean")
    penalty = theirs.logsumexp(-1)[labels >= 0].square().mean()
    other = temperature**2 * kl + F.cross_entropy(theirs, labels) + 0.02 * penalty
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(one, ours), torch.autograd.grad(other, theirs), rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("bad", [-1.0, -1e-30, math.nan, INF])
def test_a_class_weight_that_is_no_weight_is_an_error(bad: float) -> None:
    weights = torch.ones(11)
    weights[[4, 7]] = bad
    with pytest.raises(ValueError, match=r"class_weights: expected finite weights >= 0, got .* for class 4"):
        distil_fast.cross_entropy(torch.full((2, 11), math.nan), torch.tensor([0, 1]), class_weights=weights)


def test_labels_of_weight_zero_are_unused_rows(instruction_set: str) -> None:
    logits = torch.randn(3, 50, generator=oracle.generator("zero weight"))
    logits[1] = math.nan  # never read
    weights = torch.ones(50)
    weights[7] = 0.0
    settings: Settings = {"soft_weight": 0.0, "class_weights": weights}
    result = calls.by_backend(logits, None, torch.tensor([1, 7, 2]), **settings)
    used = calls.by_backend(logits[[0, 2]], None, torch.tensor([1, 2]), soft_weight=0.0)
    assert result.values["loss"] == used.values["loss"]
    assert torch.equal(result.grad[[0, 2]], used.grad)
    assert not result.grad[1].any()
    nothing = calls.by_backend(logits, None, torch.tensor([7, 7, -100]), **settings)
    assert nothing.values["loss"] == 0
    assert not nothing.grad.any()


@pytest.mark.parametrize("margin", [0.0, 15.0, 40.0])
def test_z_loss_of_a_label_that_the_model_is_sure_of(instruction_set: str, margin: float) -> None:
    """softmax - 1 + 2 z lse softmax at the label, without the subtraction."""
    logits = torch.randn(3, 5000, generator=oracle.generator(margin))
    labels = torch.tensor([0, 2500, 4999])
    logits[torch.arange(3), labels] = logits.amax(-1) + margin
    x = logits.double()
    lse = x.logsumexp(-1, keepdim=True)
    q = (x - lse).exp()
    rest = q.scatter(-1, labels[:, None], 0.0).sum(-1, keepdim=True)
    for z in (1e-4, 1e-7):
        expected = q * (1.0 + 2 * z * lse)
        expected = expected.scatter(-1, labels[:, None], -rest + 2 * z * (lse * q).gather(-1, labels[:, None]))
        result = calls.by_backend(logits, None, labels, soft_weight=0.0, z_loss=z, reduction="sum")
        error = (result.grad.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.max() < 3e-6, f"{z} {margin}: {error}"


# ------------------------------------------------------------------------------------------------ regressions


def test_jsd_of_log_probabilities_below_float32(instruction_set: str) -> None:
    """p and q under e^-104 are 0 in float32, and log 0 - log 0 is nan; elsewhere this gave nan for the whole row."""
    student, teacher = (torch.zeros(2, 3000) for _ in range(2))
    student[:, 5], teacher[:, 5] = 300.0, 250.0
    student[:, 9], teacher[:, 7] = 299.0, 249.0
    for beta in (0.1, 0.5, 0.9):
        calls.check(student, teacher, where=f"{beta}", divergence=distil_fast.JSD(beta), temperature=1.0)


def test_alpha_beta_where_one_probability_is_below_float32(instruction_set: str) -> None:
    """q = e^-150 to the power 0.05 is 5e-4: not nothing."""
    student, teacher = (torch.zeros(2, 40) for _ in range(2))
    student[:, :20] = 150.0
    for a, b in ((0.03, 0.02), (0.2, 0.05), (0.5, 0.5)):
        divergence = distil_fast.AlphaBeta(a, b)
        calls.check(student, teacher, where=f"{a} {b}", divergence=divergence, temperature=1.0)
        calls.check(teacher, student, where=f"{a} {b} turned", divergence=divergence, temperature=1.0)
