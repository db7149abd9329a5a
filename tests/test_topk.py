"""The row loss with a top-k teacher against its fp64 definition: divergences x tails x dtypes x instruction sets,
ragged rows, every argument; how it meets the loss of a whole teacher; what happens at the ends.

What is refused, and memory, is in test_topk_checks.py; autograd and the compiler are test_ops.py's and
test_compile.py's. Next: topk.py, which has the cases and their bounds.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import distil_fast
from distil_fast import TopK, reference_topk
from distil_fast.backends.settings import TAILS
from tests import batch, calls, oracle, topk

HALVES = (torch.float32, torch.bfloat16, torch.float16)
INF = math.inf


@cache  # one truth for all instruction sets
def matrix(divergence: str, dtypes: tuple[torch.dtype, ...]) -> list[topk.Case]:
    return topk.cases(oracle.DIVERGENCES[divergence], dtypes)


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_matrix(instruction_set: str, divergence: str) -> None:
    for where, student, teacher, labels, settings, truth in matrix(divergence, HALVES):
        topk.by_backend(student, teacher, labels, **settings).check(truth, f"{instruction_set} {where}")


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_matrix_in_double_precision(divergence: str) -> None:
    for where, student, teacher, labels, settings, truth in matrix(divergence, (torch.float64,)):
        topk.by_backend(student, teacher, labels, **settings).check(truth, where)


# ------------------------------------------------------------------------------------------------ arguments

ARGUMENTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "t_squared off": {"t_squared": False, "temperature": 3.7},
    "temperature per row": {"temperature": torch.tensor([0.5, 1.0, 2.0, 3.7, 10.0, 2.0])},
    "weights": {"soft_weight": torch.tensor(0.3), "hard_weight": -2.0},
    "soft alone": {"hard_weight": 0.0},
    "hard alone": {"soft_weight": 0.0},
    "bool mask": {"soft_mask": torch.tensor([True, False, True, True, False, True])},
    "float mask": {"soft_mask": torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25, 0.0])},
    "ignore_index": {"ignore_index": 3},
    "label_smoothing": {"label_smoothing": 0.3, "temperature": 3.7},
    "vocab_size": {"vocab_size": 30},
    "reverse": {"divergence": "reverse_kl"},
    "everything": {
        "temperature": torch.tensor([0.5, 1.0, 2.0, 3.7, 10.0, 2.0]),
        "soft_weight": 0.7,
        "hard_weight": 1.3,
        "soft_mask": torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25, 0.0]),
        "divergence": distil_fast.JSD(0.25),
        "label_smoothing": 0.1,
        "t_squared": False,
        "vocab_size": 30,
    },
}


def labelled(dtype: torch.dtype, tail: str = "bucket", size: int = 37) -> tuple[Tensor, TopK, Tensor]:
    """Six rows, the last one empty; ids and labels below 30; some labels are ids."""
    g = oracle.generator("top-k arguments")
    student, teacher = oracle.logit_pair("plain", topk.ROWS, size, g)
    held = torch.float64 if dtype == torch.float64 else torch.float32
    ids, log_probs = topk.entries(teacher[:, :30], 5, 2.0, held, g)
    return student.to(dtype), TopK(ids, log_probs, tail), torch.tensor([int(ids[0, 0]), -100, 0, 29, 3, -100])


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tail", TAILS)
def test_arguments(tail: str, reduction: str, dtype: torch.dtype) -> None:
    student, teacher, labels = labelled(dtype, tail)
    upstream = torch.tensor([1.0, -0.5, 3.0, 0.0, 0.125, 2.0]) if reduction == "none" else None
    for name, argument in ARGUMENTS.items():
        settings: dict[str, Any] = argument | {"reduction": reduction}
        given = torch.where(labels == -100, 5, labels) if name == "ignore_index" else labels
        truth = topk.exact(student, teacher, given, upstream, **settings)
        x = student.clone().requires_grad_()
        terms = distil_fast.distillation_loss(x, teacher, given, **settings)
        oracle.check_values(calls._values(terms), truth, name)
        if dtype == torch.float16 and upstream is None:  # the final gradient is rounded twice
            topk.by_backend(student, teacher, given, **settings).check(truth, name)
        else:
            oracle.check_gradient(torch.autograd.grad(terms.loss, x, upstream)[0], truth, name)


OPTIONS: dict[str, dict[str, Any]] = {
    "class_weights": {"class_weights": torch.linspace(0.0, 2.0, 37), "label_smoothing": 0.0},
    "z_loss": {"z_loss": 0.1, "label_smoothing": 0.1},
    "scale": {"student_logit_scale": 0.3, "temperature": 1.0},
    "softcap": {"student_softcap": 3.0, "divergence": "jsd"},
    "both": {"student_logit_scale": 2.0, "student_softcap": 4.0, "temperature": 3.7, "vocab_size": 31, "z_loss": 0.01},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_hard_term_and_transforms_of_the_student(
    instruction_set: str, option: str, tail: str, dtype: torch.dtype
) -> None:
    """With a hard term and without; in place, the slope of a softcap is taken before the logits are gone."""
    student, teacher, labels = labelled(dtype, tail)
    student[1, 3] = -INF
    bound = {torch.float32: 4e-6, torch.bfloat16: 3e-3, torch.float64: 1e-12}[dtype]
    for given in (labels, None):
        settings = {
            n: v for n, v in OPTIONS[option].items() if given is not None or n not in ("class_weights", "z_loss")
        }
        x = student.double().requires_grad_()
        terms = reference_topk.topk_loss(x, teacher.ids, teacher.log_probs, given, tail=tail, **settings)
        (grad,) = torch.autograd.grad(terms.loss, x)
        result = topk.by_backend(student, teacher, given, **settings)
        for name, value in result.values.items():
            expected = getattr(terms, name).detach()
            assert (value - expected).abs() <= 4e-6 * (1.0 + expected.abs()), name
        assert batch.error(result.grad, grad.nan_to_num(0.0)) <= bound
        inplace = topk.by_backend(student.clone(), teacher, given, gradient="inplace", **settings)
        assert torch.equal(inplace.grad, result.grad)


def test_counts_replace_denominators() -> None:
    student, teacher, labels = labelled(torch.float32)
    counted = distil_fast.distillation_loss(student, teacher, labels, soft_count=12, hard_count=torch.tensor(8.0))
    whole = distil_fast.distillation_loss(student, teacher, labels, reduction="sum")
    torch.testing.assert_close(counted.soft * 12, whole.soft)
    torch.testing.assert_close(counted.hard * 8, whole.hard)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8], ids=str)
@pytest.mark.parametrize("held", HALVES, ids=str)
def test_entries_of_every_dtype(dtype: torch.dtype, held: torch.dtype) -> None:
    student, teacher, labels = labelled(torch.float32)
    stored = TopK(teacher.ids.to(dtype), teacher.log_probs.to(held))
    topk.by_backend(student, stored, labels).check(topk.exact(student, stored, labels), f"{dtype} {held}")


def test_entries_with_any_strides() -> None:
    student, teacher, labels = labelled(torch.float32)
    apart = TopK(*(torch.stack([x, x], -1)[..., 0].t().contiguous().t() for x in (teacher.ids, teacher.log_probs)))
    expected, result = topk.by_backend(student, teacher, labels), topk.by_backend(student, apart, labels)
    assert result.values == expected.values
    assert torch.equal(result.grad, expected.grad)


def test_the_other_losses_and_the_modules_take_it() -> None:
    student, teacher, labels = labelled(torch.float32)
    rows = distil_fast.distillation_loss(student, teacher, temperature=1.0).soft
    assert torch.equal(distil_fast.divergence_loss(student, teacher), rows)
    assert torch.equal(distil_fast.DivergenceLoss()(student, teacher), rows)
    both = distil_fast.distillation_loss(student, teacher, labels).loss
    assert torch.equal(distil_fast.DistillationLoss()(student, teacher, labels).loss, both)


def test_leading_dimensions_are_rows() -> None:
    student, teacher, labels = labelled(torch.float32)
    cube = TopK(teacher.ids.view(2, 3, 5), teacher.log_probs.view(2, 3, 5))
    terms = distil_fast.distillation_loss(student.view(2, 3, 37), cube, labels.view(2, 3), reduction="none")
    expected = distil_fast.distillation_loss(student, teacher, labels, reduction="none")
    assert torch.equal(terms.loss.flatten(), expected.loss)


# ------------------------------------------------------------------------------------------------ the whole teacher


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
def test_all_columns_are_the_loss_of_the_whole_teacher(instruction_set: str, tail: str, divergence: str) -> None:
    """k = V, where the masses meet 1 to rounding alone."""
    for kind, temperature in (("plain", 2.0), ("close", 1.0), ("sharp", 3.7)):
        student, teacher = (x.float() for x in oracle.logit_pair(kind, 4, 301, oracle.generator(kind)))
        labels = torch.tensor([0, 150, -100, 300])
        settings: dict[str, Any] = {"divergence": oracle.DIVERGENCES[divergence], "temperature": temperature}
        whole = TopK.from_logits(teacher.double(), 301, temperature, tail)
        given = TopK(whole.ids, whole.log_probs.float(), tail)
        # of log-probabilities in float, each rounded by itself, the distribution is not the logits' to the last digit
        dense = whole.log_probs.float().double().gather(-1, whole.ids.argsort(-1)) * temperature
        truth = oracle.exact(student, dense, labels, **settings)
        result = topk.by_backend(student, given, labels, **settings)
        rounding = 4e-7 * (1.0 + whole.log_probs.abs().amax())
        for name, value in result.values.items():
            assert (value - truth.values[name]).abs() <= rounding * (temperature**2 + truth.values[name].abs()), name
        error = (result.grad - truth.grad).norm() / (truth.grad.norm() + (dense / temperature).exp().norm())
        assert error < rounding, f"{kind} {error}"


def test_the_bucket_is_below_the_whole_teacher_and_reaches_it() -> None:
    """Lumping columns never adds divergence, and finer lumps take less away."""
    student, teacher = oracle.logit_pair("plain", 16, 200, oracle.generator("lump"))
    for divergence in ("forward_kl", "reverse_kl", "jsd", "hellinger", "total_variation"):
        settings: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "reduction": "none"}
        dense = distil_fast.divergence_loss(student, teacher, **settings)
        rows = [
            distil_fast.divergence_loss(student, TopK.from_logits(teacher, k, 2.0), **settings)
            for k in (1, 10, 100, 199, 200)
        ]
        for coarse, fine in zip(rows, [*rows[1:], dense], strict=True):
            assert (coarse <= fine + 1e-9).all(), divergence
        torch.testing.assert_close(rows[-2], dense, rtol=1e-8, atol=1e-8)  # a bucket of one column


@pytest.mark.parametrize("difference", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_gradient_as_the_student_meets_the_teacher(instruction_set: str, divergence: str, difference: float) -> None:
    """Within the rounding of one number a row, r_tail; and to full precision where there is no tail."""
    g = oracle.generator(difference)
    teacher = 3 * torch.randn(4, 3000, generator=g, dtype=torch.float64)
    student = (teacher + difference * torch.randn(4, 3000, generator=g, dtype=torch.float64) + 37.3).float()
    for temperature, tail in ((1.0, "bucket"), (2.0, "renormalise"), (3.7, "bucket"), (1.0, "ignore")):
        whole = TopK.from_logits(teacher, 64, temperature, tail)
        given = TopK(whole.ids, whole.log_probs.float(), tail)
        settings: dict[str, Any] = {"divergence": oracle.DIVERGENCES[divergence], "temperature": temperature}
        truth = topk.exact(student, given, **settings)
        topk.by_backend(student, given, **settings).check(truth, f"{instruction_set} {difference} {tail}")


# ------------------------------------------------------------------------------------------------ the ends


def one_row(student: list[float], ids: list[int], probs: list[float], tail: str, **settings: Any) -> calls.Result:
    teacher = TopK(torch.tensor([ids]), torch.tensor([probs]).log(), tail)
    settings = {"temperature": 1.0} | settings
    return topk.by_backend(torch.tensor([student]), teacher, **settings)


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
@pytest.mark.parametrize("tail", TAILS)
def test_an_empty_row_is_nothing(instruction_set: str, tail: str, divergence: str) -> None:
    kind = oracle.DIVERGENCES[divergence]
    result = one_row([1.0, -2.0, 0.5], [-1, -1], [2.0, math.nan], tail, divergence=kind)
    assert result.values["loss"] == 0
    assert not result.grad.any()


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_masses_that_rounding_lifted_above_1_leave_no_bucket(divergence: str) -> None:
    """A sum in (1, 1 + tolerance] is 1: only reverse KL minds that the student has something outside."""
    kind = oracle.DIVERGENCES[divergence]
    result = one_row([2.0, 1.0, 0.5], [1, 0], [0.3, 0.7005], "bucket", divergence=kind)
    if divergence == "reverse_kl":
        assert result.values["loss"] == INF
        return
    truth = topk.exact(
        torch.tensor([[2.0, 1.0, 0.5]]),
        TopK(torch.tensor([[1, 0]]), torch.tensor([[0.3, 0.7005]]).log()),
        divergence=kind,
        temperature=1.0,
    )
    result.check(truth, divergence)
    assert result.grad[0, 2] > 0  # down with the third logit


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
@pytest.mark.parametrize("third", [-INF, -200.0])
def test_a_bucket_that_the_student_leaves_empty(instruction_set: str, third: float, divergence: str) -> None:
    """Mass missing by rounding is no outcome where the student has none; what is really missing is infinitely far."""
    kind, student = oracle.DIVERGENCES[divergence], torch.tensor([[2.0, 1.0, third]])
    for probs in ([0.7, 0.299], [0.7, 0.2]):
        teacher = TopK(torch.tensor([[0, 1]]), torch.tensor([probs]).log())
        result = topk.by_backend(student, teacher, divergence=kind, temperature=1.0)
        if third == -INF and probs[1] == 0.2 and divergence in ("forward_kl", "soft_cross_entropy"):
            assert result.values["loss"] == INF
            assert result.grad.isfinite().all()
            continue
        truth = topk.exact(student, teacher, divergence=kind, temperature=1.0)
        oracle.check_values(result.values, truth, f"{divergence} {probs}")
        assert result.grad.isfinite().all()
        if truth.grad.isfinite().all():  # autograd gives up where a logit is -inf
            oracle.check_gradient(result.grad, truth, f"{divergence} {probs}")


@pytest.mark.parametrize("tail", TAILS)
def test_columns_that_are_impossible(tail: str) -> None:
    """Masked in both models: nothing. In the teacher alone: p = 0. In the student alone: as the divergence has it."""
    both = one_row([2.0, -INF, 1.0, 0.0], [0, 1, 2], [0.6, 0.0, 0.3], tail)
    without = one_row([2.0, -INF, 1.0, 0.0], [0, -1, 2], [0.6, 0.9, 0.3], tail)
    torch.testing.assert_close(both.values, without.values)
    torch.testing.assert_close(both.grad, without.grad)
    assert one_row([2.0, 0.0, 1.0, 0.0], [0, 1, 2], [0.6, 0.0, 0.3], tail).grad.isfinite().all()
    alone = one_row([2.0, -INF, 1.0, 0.0], [0, 1, 2], [0.6, 0.1, 0.3], tail)
    assert alone.values["loss"] == INF
    assert alone.grad.isfinite().all()
    finite = one_row([2.0, -INF, 1.0, 0.0], [0, 1, 2], [0.6, 0.1, 0.3], tail, divergence="jsd")
    assert finite.values["loss"].isfinite()
    assert finite.grad.isfinite().all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("value", [math.nan, INF])
def test_what_is_no_number_spoils_its_row_alone(instruction_set: str, tail: str, value: float) -> None:
    student, teacher, labels = labelled(torch.float32, tail)
    clean = topk.by_backend(student, teacher, labels, reduction="none")
    spoilt = student.clone()
    spoilt[0, int(teacher.ids[0, 2])] = value
    result = topk.by_backend(spoilt, teacher, labels, reduction="none")
    assert result.values["loss"][0].isnan()
    assert result.grad[0].isnan().any()
    assert torch.equal(result.values["loss"][1:], clean.values["loss"][1:])
    assert torch.equal(result.grad[1:], clean.grad[1:])
    masked = torch.full_like(student, -INF)
    nothing = topk.by_backend(masked, teacher, reduction="none").values["loss"]
    assert nothing[0].isnan()


def test_a_faint_tail_keeps_its_digits(instruction_set: str) -> None:
    """The student's mass outside is e^-150 of the rest: no float beside it, but a number."""
    for cols, dtype in ((9, torch.float32), (5000, torch.float32), (5000, torch.bfloat16)):
        g = oracle.generator("faint", cols)
        student = torch.randn(3, cols, generator=g)
        student[:, 2:5] += 150.0
        student = student.to(dtype)
        ids = torch.tensor([[2, 4, 3]] * 3)
        teacher = TopK(ids, torch.tensor([[0.5, 0.2, 0.1]] * 3).log())
        for divergence in ("forward_kl", "reverse_kl", "jsd"):
            for labels in (None, torch.tensor([2, 0, 8])):
                settings: dict[str, Any] = {"divergence": divergence, "temperature": 1.0}
                truth = topk.exact(student, teacher, labels, **settings)
                topk.by_backend(student, teacher, labels, **settings).check(truth, f"{cols} {dtype} {divergence}")


# ------------------------------------------------------------------------------------------------ from_logits


def test_from_logits() -> None:
    logits = torch.randn(2, 3, 50, generator=oracle.generator("from_logits"))
    temperature = torch.tensor([[1.0, 2.0, 3.0]]).expand(2, 3)
    for t in (2.5, temperature):
        teacher = TopK.from_logits(logits.requires_grad_(), 7, t, "ignore")
        by = torch.as_tensor(t).unsqueeze(-1)
        expected, ids = (logits.detach() / by).log_softmax(-1).topk(7)
        assert torch.equal(teacher.ids, ids)
        torch.testing.assert_close(teacher.log_probs, expected)
        assert not teacher.log_probs.requires_grad
        assert teacher.tail == "ignore"
    assert TopK.from_logits(logits.double(), 1, 1.0).log_probs.dtype == torch.float64
    assert TopK.from_logits(logits.half(), 1, 1.0).log_probs.dtype == torch.float32
    for k in (0, 51):
        with pytest.raises(ValueError, match="k: expected 1 to 50"):
            TopK.from_logits(logits, k, 1.0)
    with pytest.raises(ValueError, match="temperature: expected a number > 0, got 0"):
        TopK.from_logits(logits, 3, 0.0)


def test_what_the_disk_holds_is_enough() -> None:
    """int32 and float16: 6 bytes an entry, and a gradient that is about 1e-3 off."""
    student, teacher = (x.float() for x in oracle.logit_pair("plain", 32, 1000, oracle.generator("disk")))
    whole = TopK.from_logits(teacher, 64, 2.0)
    stored = TopK(whole.ids.int(), whole.log_probs.half())
    expected, result = topk.by_backend(student, whole), topk.by_backend(student, stored)
    assert (result.grad - expected.grad).norm() < 3e-3 * expected.grad.norm()
