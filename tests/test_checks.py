"""Every wrong argument: the right kind of error, saying what was expected, what came and what to do, before anything ran.

Each case runs eagerly in every reduction, in place where that exists, and traced by torch.compile; memory is compared
byte by byte. It knows no formula. Next: test_functional.py, what right arguments mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import distil_fast
from distil_fast import JSD, reference

ROWS, V, H = 4, 11, 8


def arguments() -> dict[str, Any]:
    """Valid arguments of distillation_loss, to spoil one at a time."""
    g = torch.Generator().manual_seed(5)
    return {
        "student_logits": torch.randn(ROWS, V, generator=g).requires_grad_(),
        "teacher_logits": torch.randn(ROWS, V, generator=g),
        "labels": torch.randint(0, V, (ROWS,), generator=g),
    }


@dataclass(frozen=True)
class Wrong:
    """Arguments to replace, and the error: its type, and patterns for what was expected, what came, what to do."""

    spoil: Callable[[], dict[str, Any]]
    error: type[Exception]
    says: tuple[str, ...]
    traceable: bool = True  # the check needs no value of a tensor, so tracing raises it too


def number(name: str, values: list[Any], error: type[Exception], *says: str) -> dict[str, Wrong]:
    return {f"{name}={v!r}"[:40]: Wrong(lambda v=v: {name: v}, error, (name, *says)) for v in values}


def values(name: str, kind: str, tensors: list[Tensor], *says: str) -> dict[str, Wrong]:
    """Tensors whose values are wrong, which only the kernel sees."""
    return {
        f"{name}-{kind}-{i}": Wrong(lambda t=t: {name: t}, ValueError, (name, *says), traceable=False)
        for i, t in enumerate(tensors)
    }


def rows(*entries: float) -> Tensor:
    return torch.tensor(entries)


def label_rows(row: int, label: int) -> Tensor:
    labels = torch.zeros(ROWS, dtype=torch.int64)
    labels[row] = label
    return labels


INF, NAN = float("inf"), float("nan")
LEAF = {"requires_grad": True}

WRONG: dict[str, Wrong] = {
    # ---- the pair of logits
    "student-list": Wrong(lambda: {"student_logits": [[1.0]]}, TypeError, ("student_logits", "tensor", "list")),
    "student-int": Wrong(
        lambda: {"student_logits": torch.ones(ROWS, V, dtype=torch.int64)},
        TypeError,
        ("student_logits", "float32", "int64", r"\.float\(\)"),
    ),
    "student-0-d": Wrong(
        lambda: {"student_logits": torch.ones(())}, ValueError, ("student_logits", r"\[\.\.\., size\]", r"\(\)")
    ),
    "student-V=0": Wrong(lambda: {"student_logits": torch.ones(ROWS, 0)}, ValueError, ("size >= 1", r"\(4, 0\)")),
    "teacher-none": Wrong(lambda: {"teacher_logits": None}, TypeError, ("teacher_logits", "tensor", "NoneType")),
    "teacher-int": Wrong(
        lambda: {"teacher_logits": torch.ones(ROWS, V, dtype=torch.int32)}, TypeError, ("teacher_logits", "int32")
    ),
    "teacher-rows": Wrong(
        lambda: {"teacher_logits": torch.ones(ROWS + 1, V)}, ValueError, ("teacher_logits", r"\(4, 11\)", r"\(5, 11\)")
    ),
    "teacher-dimensions": Wrong(
        lambda: {"teacher_logits": torch.ones(2, 2, V)}, ValueError, ("teacher_logits", r"\(4, 11\)", r"\(2, 2, 11\)")
    ),
    "teacher-padded": Wrong(
        lambda: {"teacher_logits": torch.ones(ROWS, V + 5)}, ValueError, (r"\(4, 16\)", r"teacher_logits\[\.\.\., :11\]")
    ),
    "student-padded": Wrong(
        lambda: {"teacher_logits": torch.ones(ROWS, V - 3)}, ValueError, (r"\(4, 8\)", r"student_logits\[\.\.\., :8\]")
    ),
    "teacher-device": Wrong(
        lambda: {"teacher_logits": torch.ones(ROWS, V, device="meta")}, ValueError, ("cpu", "meta", r"\.to\('cpu'\)")
    ),
    "teacher-float64": Wrong(
        lambda: {"teacher_logits": torch.ones(ROWS, V).double()}, TypeError, ("float64", "float32", "Convert")
    ),
    "teacher-requires-grad": Wrong(
        lambda: {"teacher_logits": torch.ones(ROWS, V, **LEAF)},
        ValueError,
        ("teacher_logits requires grad", "no_grad", "inference_mode", r"detach\(\)"),
    ),
    # ---- labels
    "labels-list": Wrong(lambda: {"labels": [0] * ROWS}, TypeError, ("labels", "tensor of integers", "list")),
    "labels-float": Wrong(lambda: {"labels": torch.zeros(ROWS)}, TypeError, ("labels", "float32", r"\.long\(\)")),
    "labels-bool": Wrong(lambda: {"labels": torch.zeros(ROWS).bool()}, TypeError, ("labels", "bool", r"\.long\(\)")),
    "labels-shape": Wrong(
        lambda: {"labels": torch.zeros(ROWS, 1).long()}, ValueError, ("labels", r"\(4,\)", r"\(4, 1\)")
    ),
    "labels-device": Wrong(
        lambda: {"labels": torch.zeros(ROWS, device="meta").long()}, ValueError, ("labels", "cpu", "meta", r"\.to\('cpu'\)")
    ),
    **{
        f"label-{label}-in-row-{row}": Wrong(
            lambda row=row, label=label: {"labels": label_rows(row, label)},
            ValueError,
            ("labels", rf"0 <= label < {V}", f"got {label} in row {row}", "ignore_index"),
            traceable=False,
        )
        for row in (0, ROWS - 1)
        for label in (-1, -101, V, V + 1, 2**31, 2**53, -(2**53))
    },
    # ---- temperature
    **number("temperature", [0, 0.0, -1.0, NAN, INF, -INF, 1e-16, 1e16], ValueError, "> 0", "got"),
    **number("temperature", ["2", None, [2.0]], TypeError, "number or a tensor", "got"),
    "temperature-shape": Wrong(
        lambda: {"temperature": torch.ones(ROWS, 1)}, ValueError, ("temperature", r"\(4,\)", r"\(4, 1\)")
    ),
    "temperature-device": Wrong(
        lambda: {"temperature": torch.ones(ROWS, device="meta")}, ValueError, ("temperature", "cpu", "meta", r"\.to")
    ),
    "temperature-complex": Wrong(
        lambda: {"temperature": torch.ones(ROWS, dtype=torch.complex64)}, TypeError, ("temperature", "complex64")
    ),
    **values("temperature", "0-d", [torch.tensor(x) for x in (0.0, -1.0, NAN, INF)], "> 0", "got"),
    **values("temperature", "row", [rows(1, 1, x, 1) for x in (0.0, -1.0, NAN, INF)], "> 0", "got .* in row 2"),
    # ---- masks
    "soft_mask-list": Wrong(lambda: {"soft_mask": [1] * ROWS}, TypeError, ("soft_mask", "tensor", "list")),
    "soft_mask-int": Wrong(
        lambda: {"soft_mask": torch.ones(ROWS).int()}, TypeError, ("soft_mask", "bool", "int32", r"\.bool\(\)")
    ),
    "soft_mask-shape": Wrong(
        lambda: {"soft_mask": torch.ones(ROWS, V)}, ValueError, ("soft_mask", r"\(4,\)", r"\(4, 11\)")
    ),
    "soft_mask-device": Wrong(
        lambda: {"soft_mask": torch.ones(ROWS, device="meta")}, ValueError, ("soft_mask", "cpu", "meta", r"\.to\('cpu'\)")
    ),
    **values("soft_mask", "entry", [rows(1, 1, 1, x) for x in (-1.0, -1e-30, NAN, INF)], ">= 0", "got .* in row 3"),
    # ---- weights and counts
    **number("soft_weight", [NAN, INF, -INF], ValueError, "finite number", "got"),
    **number("hard_weight", [NAN, INF, -INF], ValueError, "finite number", "got"),
    **number("soft_count", [-1, -1.0, NAN, INF], ValueError, ">= 0", "got"),
    **number("hard_count", [-1, -0.5, NAN, INF], ValueError, ">= 0", "got"),
    **number("soft_weight", ["1", None], TypeError, "number or a tensor", "got"),
    **number("hard_count", ["1", [1]], TypeError, "number or a tensor", "got"),
    **values("soft_weight", "0-d", [torch.tensor(x) for x in (NAN, INF)], "finite number", "got"),
    **values("hard_weight", "0-d", [torch.tensor(x) for x in (NAN, INF)], "finite number", "got"),
    **values("soft_count", "0-d", [torch.tensor(x) for x in (-1.0, -2.0, NAN, INF)], ">= 0", "got"),
    **values("hard_count", "0-d", [torch.tensor(x) for x in (-1.0, -2.0, NAN, INF)], ">= 0", "got"),
    **{
        f"{name}-shape": Wrong(lambda name=name: {name: torch.ones(1)}, ValueError, (name, "0-d", r"\(1,\)"))
        for name in ("soft_weight", "hard_weight", "soft_count", "hard_count")
    },
    **{
        f"{name}-device": Wrong(
            lambda name=name: {name: torch.ones((), device="meta")}, ValueError, (name, "cpu", "meta", r"\.to\('cpu'\)")
        )
        for name in ("soft_weight", "hard_weight", "soft_count", "hard_count")
    },
    **{
        f"{name}-requires-grad": Wrong(
            lambda name=name, shape=shape: {name: torch.ones(shape, **LEAF)},
            ValueError,
            (f"{name} requires grad", rf"{name}\.detach\(\)"),
        )
        for name, shape in [
            *((name, ()) for name in ("soft_weight", "hard_weight", "soft_count", "hard_count", "temperature")),
            ("temperature", (ROWS,)),
            ("soft_mask", (ROWS,)),
        ]
    },
    # ---- settings
    **number("reduction", ["avg", "", "Mean", "batchmean", None, 0], ValueError, "mean, sum, none", "got"),
    **number("divergence", ["kl", "", "JSD"], ValueError, "forward_kl, reverse_kl, jsd", "got"),
    **number("divergence", [None, 0.5, JSD], TypeError, r"JSD\(0\.5\)", "got", "forward_kl, reverse_kl, jsd"),
    **number("label_smoothing", [-0.1, 1.1, NAN], ValueError, r"\[0, 1\]", "got"),
    **number("label_smoothing", ["0.1", None], TypeError, "number", "got"),
    **number("ignore_index", [1.5, None, "x", 2**70], TypeError, "integer", "got"),
    "hard_weight-without-labels": Wrong(
        lambda: {"labels": None, "hard_weight": 1.0}, ValueError, ("hard_weight", "without labels", "Pass labels")
    ),
    "hard_count-without-labels": Wrong(
        lambda: {"labels": None, "hard_count": 3}, ValueError, ("hard_count", "without labels", "Pass labels")
    ),
    "too-large-a-number": Wrong(lambda: {"soft_weight": 10**400}, ValueError, ("soft_weight", "finite", "got")),
}


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
        assert torch.equal(tensor.detach().view(torch.uint8), contents.view(torch.uint8)) if tensor.dim() else True, name
        assert tensor.grad is None, name


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_in_every_reduction(case: Wrong, reduction: str) -> None:
    spoilt = case.spoil()
    if reduction != "mean" and {"soft_count", "hard_count"} & set(spoilt):
        pytest.skip("a count with another reduction than mean is an error by itself")
    raised(case, distil_fast.distillation_loss, reduction=reduction)


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_before_a_logit_is_overwritten(case: Wrong) -> None:
    raised(case, distil_fast.distillation_loss, inplace=True)


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_without_a_gradient(case: Wrong) -> None:
    with torch.no_grad():
        raised(case, distil_fast.distillation_loss)


# torch.compile: test_compile.py runs the traceable cases of this table through it.


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
            with pytest.raises(ValueError, match=rf"{name.strip()} .* mean, got reduction='{reduction}'.* Use"):
                call(reduction)
        assert call("mean") is not None


@pytest.mark.parametrize("beta", [0, 1, 0.0, 1.0, -0.5, 1.5, NAN])
def test_the_ends_of_jsd_name_the_divergence_that_is_meant(beta: float) -> None:
    with pytest.raises(ValueError, match=rf"0 < beta < 1, got {beta}.*'forward_kl'.*'reverse_kl'"):
        JSD(beta)


@pytest.mark.parametrize("beta", ["0.5", None])
def test_a_beta_that_is_no_number(beta: Any) -> None:
    with pytest.raises(TypeError, match="beta.*number"):
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
        ((student, teacher.double()), TypeError, "teacher_hidden: float64 goes with float64.*Convert"),
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
        with pytest.raises(ValueError, match="finite number.*got nan"):
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
    with pytest.raises(ValueError, match=r"inplace: expected .* memory of .* own.*Use inplace=False"):
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
