"""Every wrong argument: the right kind of error, saying what was expected, what came and what to do, before anything
runs.

Each case of wrong_arguments.py runs in every reduction, without a gradient and in place; memory is compared bit by bit.
It knows no formula. Next: test_functional.py, what right arguments mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import distil_fast
from distil_fast import JSD, reference
from tests.wrong_arguments import NAN, ROWS, WRONG, V, Wrong, arguments, label_rows, rows

H = 8


def raised(case: Wrong, call: Callable[..., Any], **settings: Any) -> None:
    """The call raises the case's error, with everything that a caller needs, and writes nothing."""
    kwargs = {**arguments(), **settings, **case.spoil()}
    tensors = {name: t for name, t in kwargs.items() if isinstance(t, Tensor) and t.device.type == "cpu"}
    before = {name: (t.detach().clone(), t._version) for name, t in tensors.items()}
    with pytest.raises(case.error) as info:
        call(**kwargs)
    message = str(info.value)
    assert type(info.value) is case.error, type(info.value)
    for pattern in case.says:
        assert re.search(pattern, message), f"{pattern!r} is not in: {message}"
    for name, tensor in tensors.items():
        contents, version = before[name]
        assert tensor._version == version, name
        assert torch.equal(tensor.detach().view(torch.uint8), contents.view(torch.uint8)) if tensor.dim() else True, (
            name
        )
        assert tensor.grad is None, name


@pytest.mark.parametrize(
    ("case", "reduction"),
    [
        pytest.param(case, reduction, id=f"{name}-{reduction}")
        for name, case in WRONG.items()
        for reduction in ("mean", "sum", "none")
        if reduction == "mean" or "_count" not in name  # a count without a mean is an error by itself
    ],
)
def test_in_every_reduction(case: Wrong, reduction: str) -> None:
    raised(case, distil_fast.distillation_loss, reduction=reduction)


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_before_a_logit_is_overwritten(case: Wrong) -> None:
    raised(case, distil_fast.distillation_loss, inplace=True)


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_without_a_gradient(case: Wrong) -> None:
    with torch.no_grad():
        raised(case, distil_fast.distillation_loss)


# ------------------------------------------------------------------------------------------------ the other functions


def test_counts_go_with_a_mean_only() -> None:
    a = arguments()
    student, teacher, labels = a["student_logits"], a["teacher_logits"], a["labels"]
    calls: dict[str, Callable[[str], Any]] = {
        "soft_count": lambda r: distil_fast.distillation_loss(student, teacher, labels, soft_count=1, reduction=r),
        "hard_count": lambda r: distil_fast.distillation_loss(student, teacher, labels, hard_count=1, reduction=r),
        "count": lambda r: distil_fast.divergence_loss(student, teacher, count=1, reduction=r),
        "count ": lambda r: distil_fast.cross_entropy(student, labels, count=1, reduction=r),
        "count  ": lambda r: distil_fast.cosine_loss(student, teacher, count=1, reduction=r),
    }
    for name, call in calls.items():
        for reduction in ("sum", "none"):
            with pytest.raises(ValueError, match=rf"{name.strip()}: .*mean.*'{reduction}'.*divide"):
                call(reduction)
        assert call("mean") is not None


@pytest.mark.parametrize("beta", [0, 1, 0.0, 1.0, -0.5, 1.5, NAN])
def test_the_ends_of_jsd_name_the_divergence_that_is_meant(beta: float) -> None:
    with pytest.raises(ValueError, match=rf"beta.* inside \(0, 1\), got {beta}.*'forward_kl'.*'reverse_kl'"):
        JSD(beta)


@pytest.mark.parametrize("alpha", [0, 1.0, -0.5, 1.5, NAN])
def test_the_ends_of_the_skewed_divergences_name_the_one_that_is_meant(alpha: float) -> None:
    for kind, end in ((distil_fast.SkewedKL, "forward_kl"), (distil_fast.SkewedReverseKL, "reverse_kl")):
        with pytest.raises(ValueError, match=rf"alpha.* inside \(0, 1\), got {alpha}.*'{end}'"):
            kind(alpha)


@pytest.mark.parametrize("value", [0, -1.0, 1e-4, 1e4, NAN, math.inf])
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_the_ends_of_alpha_beta_name_the_divergence_that_is_meant(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}.* from 0\.001 to 1000, got {value}.*'forward_kl'.*'reverse_kl'"):
        distil_fast.AlphaBeta(**{name: value})


@pytest.mark.parametrize("beta", ["0.5", None])
def test_a_beta_that_is_no_number(beta: Any) -> None:
    with pytest.raises(TypeError, match=r"beta.*number"):
        JSD(beta)


@pytest.mark.parametrize("function", [distil_fast.softmax, distil_fast.log_softmax])
def test_softmax(function: Callable[..., Tensor]) -> None:
    logits = arguments()["student_logits"]
    for bad in (0.0, -2.0, NAN, torch.tensor(0.0), rows(1, 1, 1, 0), rows(1, NAN, 1, 1)):
        with pytest.raises(ValueError, match=r"temperature: expected .*> 0.*got"):
            function(logits, bad)
    with pytest.raises(ValueError, match=r"temperature: .*\(4,\).*got shape \(11,\)"):
        function(logits, torch.ones(V))
    with pytest.raises(ValueError, match=r"temperature requires grad.*detach"):
        function(logits, torch.ones((), requires_grad=True))
    with pytest.raises(TypeError, match=r"logits: expected float32.*int64.*float\(\)"):
        function(torch.ones(ROWS, V, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"contiguous.*strides.*contiguous\(\)"):
        function(torch.ones(V, ROWS).t())


def test_cosine_loss() -> None:
    student, teacher = torch.randn(ROWS, H, requires_grad=True), torch.randn(ROWS, H)
    cases: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((student, teacher[:2]), ValueError, r"teacher_hidden: expected student_hidden's shape \(4, 8\), got \(2, 8\)"),
        ((student, teacher.double()), TypeError, "teacher_hidden: .*float64.*Convert"),
        ((student, teacher.clone().requires_grad_()), ValueError, "teacher_hidden requires grad.*no_grad"),
        ((student, teacher, torch.ones(ROWS).int()), TypeError, r"mask: expected bool.*int32.*bool\(\)"),
        ((student, teacher, torch.ones(ROWS - 1)), ValueError, r"mask: expected shape \(4,\).*got \(3,\)"),
        ((student, teacher, rows(1, -1, 1, 1)), ValueError, "mask: expected .*>= 0, got -1.0 in row 1"),
        ((student, teacher, rows(1, 1, NAN, 1)), ValueError, "mask: expected .*>= 0, got nan in row 2"),
        ((student, teacher, None, -1), ValueError, "count: expected .*>= 0, got -1"),
        ((student, teacher, None, torch.tensor(-1.0)), ValueError, "count: expected .*>= 0, got -1"),
        ((student, teacher, None, None, "avg"), ValueError, "reduction: expected one of mean, sum, none, got 'avg'"),
        ((student.t(), teacher.t()), ValueError, "contiguous"),
    ]
    for args, error, message in cases:
        with pytest.raises(error, match=message):
            distil_fast.cosine_loss(*args)


def test_triple_loss() -> None:
    a = arguments()
    hidden = torch.randn(ROWS, H), torch.randn(ROWS, H)
    good = (*a.values(), *hidden, torch.ones(ROWS))
    assert distil_fast.triple_loss(*good).loss.isfinite()
    for position, bad, error, message in [
        (0, None, TypeError, "student_logits: expected a tensor, got NoneType"),
        (1, torch.ones(ROWS, V + 1), ValueError, "teacher_logits: .*padded"),
        (2, label_rows(3, V), ValueError, "labels: .*got 11 in row 3"),
        (3, torch.ones(ROWS, H + 1), ValueError, r"teacher_hidden: expected student_hidden's shape \(4, 9\)"),
        (4, torch.ones(ROWS, H, requires_grad=True), ValueError, "teacher_hidden requires grad"),
        (5, [1] * ROWS, TypeError, "attention_mask: expected a tensor, got list"),
        (5, torch.ones(ROWS + 1), ValueError, r"mask: expected shape \(4,\).*got \(5,\)"),
    ]:
        with pytest.raises(error, match=message):
            distil_fast.triple_loss(*good[:position], bad, *good[position + 1 :])
    for name in ("alpha_ce", "alpha_mlm", "alpha_cos", "ce_count", "mlm_count", "cos_count"):
        with pytest.raises(ValueError, match="requires grad"):
            distil_fast.triple_loss(*good, **{name: torch.ones((), requires_grad=True)})
        with pytest.raises(ValueError, match=r"finite number.*got nan"):
            distil_fast.triple_loss(*good, **{name: NAN})


# ------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("which", ["student_logits", "teacher_logits"])
def test_rows_with_gaps_are_refused(which: str) -> None:
    wide = torch.randn(ROWS, 2 * V)
    for tensor in (wide[:, ::2], torch.randn(V, ROWS).t(), torch.randn(ROWS, 1).expand(ROWS, V)):
        with pytest.raises(ValueError, match=r"contiguous in memory, got .*\(4, 11\).*strides.*\.contiguous\(\)"):
            distil_fast.divergence_loss(**{**{k: v for k, v in arguments().items() if k != "labels"}, which: tensor})


def test_more_than_two_free_strides_are_refused() -> None:
    student = torch.randn(2, 3, 4, 5, V)
    permuted = student.permute(3, 1, 2, 0, 4)
    with pytest.raises(ValueError, match=r"two leading dimensions.*\(5, 3, 4, 2, 11\).*strides.*\.contiguous\(\)"):
        distil_fast.divergence_loss(permuted, torch.randn(5, 3, 4, 2, V))
    with pytest.raises(ValueError, match="two leading dimensions"):
        distil_fast.divergence_loss(torch.randn(5, 3, 4, 2, V), permuted)


def test_in_place_goes_with_a_reduced_loss() -> None:
    a = arguments()
    for student in (a["student_logits"], a["student_logits"].detach()):
        with pytest.raises(ValueError, match="inplace: expected reduction 'mean' or 'sum', got 'none'"):
            distil_fast.distillation_loss(student, a["teacher_logits"], inplace=True, reduction="none")


OVERLAPS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor | None]]] = {
    "expanded rows": lambda memory: (memory[:V].expand(ROWS, V), None),
    "overlapping rows": lambda memory: (memory.as_strided((ROWS, V), (V - 1, 1)), None),
    "expanded batch": lambda memory: (memory[: 2 * V].view(1, 2, V).expand(2, 2, V), None),
    "teacher one row on": lambda memory: (memory[: ROWS * V].view(ROWS, V), memory[V : (ROWS + 1) * V].view(ROWS, V)),
    "teacher one element on": lambda memory: (memory[: ROWS * V].view(ROWS, V), memory[1 : ROWS * V + 1].view(ROWS, V)),
    "teacher expanded from the student": lambda memory: (
        memory[: ROWS * V].view(ROWS, V),
        memory[:V].expand(ROWS, V),
    ),
}


@pytest.mark.parametrize("case", OVERLAPS.values(), ids=OVERLAPS)
def test_in_place_needs_memory_of_its_own(case: Callable[[Tensor], tuple[Tensor, Tensor | None]]) -> None:
    memory = torch.randn(8 * V)
    before = memory.clone()
    student, teacher = case(memory)
    teacher = torch.randn(student.shape) if teacher is None else teacher
    student = (student.requires_grad_() if student.is_leaf else student).detach().requires_grad_()
    with pytest.raises(ValueError, match=r"inplace: expected .* own.*, got .*Use inplace=False"):
        distil_fast.distillation_loss(student, teacher, inplace=True)
    assert torch.equal(memory, before)
    # without a gradient nothing is written, so nothing is wrong
    with torch.no_grad():
        assert distil_fast.distillation_loss(student, teacher, inplace=True).loss.isfinite()
    # and out of place it is fine
    terms = distil_fast.distillation_loss(student, teacher)
    exact = reference.distillation_loss(student.detach().double(), teacher.double())
    assert terms.loss.item() == pytest.approx(exact.loss.item(), rel=2e-6)


def test_in_place_may_share_memory_where_nothing_overlaps() -> None:
    memory = torch.randn(2, ROWS, V)
    student, teacher = memory[0].detach().requires_grad_(), memory[1]
    expected = reference.distillation_loss(student.detach().double(), teacher.double()).loss.item()
    terms = distil_fast.distillation_loss(student, teacher, inplace=True)
    assert terms.loss.item() == pytest.approx(expected, rel=2e-6)
