"""Losses summed over pairs of entries: squared distance and KL of probabilities, against fp64 in every dtype.

Both are relative to themselves even as student and teacher meet. The functions over layers are test_hidden.py's. Next:
csrc/pairs.h, the maths; test_cosine.py, the third kind.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import distil_fast
from distil_fast import reference
from distil_fast.backends import native
from distil_fast.backends.layout import real_dtype
from tests import oracle
from tests.test_cosine import MASKS, MIXES, check_gradient, check_value

KINDS = ("squared", "kl")
SIZES = [1, 2, 7, 16, 33, 384, 4099]
kinds = pytest.mark.parametrize("kind", KINDS)
half_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def pair_of(kind: str, size: int, rows: int = 4, difference: float = 1.0) -> tuple[Tensor, Tensor]:
    """Hidden states or probabilities, float64, `difference` apart."""
    g = oracle.generator("pairs", kind, size, difference)
    noise, teacher = (torch.randn(rows, size, generator=g, dtype=torch.float64) for _ in range(2))
    student = noise if difference == 1.0 else teacher + difference * noise
    return (student.softmax(-1), teacher.softmax(-1)) if kind == "kl" else (student, teacher)


def exact(
    kind: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    upstream: Tensor | None = None,
    reduction: str = "mean",
    weight: float = 1.0,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    x = student.detach().double().requires_grad_()
    loss = weight * reference.pair_loss(kind, x, teacher.double(), mask, reduction=reduction, **settings)
    return loss.detach(), torch.autograd.grad(loss, x, None if upstream is None else upstream.double())[0]


def stored(
    kind: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
    weight: float = 1.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, float]:
    """Loss, gradient and the unit that it is stored in."""
    settings = weight, -1.0, kind, scale, reduction
    loss, _, grad, unit = native.pair_loss(student, teacher, mask, *settings, gradient=True)
    assert grad is not None
    return loss, grad, float(unit)


# ------------------------------------------------------------------------------------------------ values


@kinds
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(d).removeprefix("torch.") for d in mix))
def test_pair_values_and_gradients(instruction_set: str, mix: tuple[torch.dtype, torch.dtype], kind: str) -> None:
    for size, scale in zip(SIZES, itertools.cycle((1.0, 0.125, 1 / 3)), strict=False):
        student, teacher = (x.to(d) for x, d in zip(pair_of(kind, size), mix, strict=True))
        loss, grad, unit = stored(kind, student, teacher, weight=-2.5, scale=scale)
        value, gradient = exact(kind, student, teacher, weight=-2.5, scale=scale)
        assert loss.dtype == real_dtype(student)
        check_value(loss, value, f"{size}")
        check_gradient(grad, gradient, f"{size}", unit)


@kinds
@pytest.mark.parametrize("difference", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_exact_as_the_student_meets_the_teacher(instruction_set: str, kind: str, difference: float) -> None:
    """A KL of 1e-9, on the very numbers that the kernel gets: sum p log(p / q) in fp32 has no digit left of it."""
    for size in (64, 768, 3001):
        student, teacher = (x.float() for x in pair_of(kind, size, difference=difference))
        loss, grad, _ = stored(kind, student, teacher, reduction="none")
        value, gradient = exact(kind, student, teacher, reduction="none", upstream=torch.ones(4))
        size_of_terms = (teacher - student).double().square()
        terms = (size_of_terms / (teacher.double() if kind == "kl" else 1.0)).sum(-1)
        assert ((loss.double() - value).abs() <= 2e-6 * (terms + value.abs())).all(), f"{loss} {value}"
        check_gradient(grad, gradient, f"{size} {difference}")


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_in_both(instruction_set: str, kind: str, dtype: torch.dtype) -> None:
    """No loss, to the bit. The squared distance has no gradient; the KL's is -1 for each entry, by q alone."""
    if instruction_set != "portable" and dtype == torch.float64:
        pytest.skip("doubles run in the portable sweeps")
    values = pair_of(kind, 771)[1].to(dtype)
    loss, grad, unit = stored(kind, values, values.clone(), reduction="sum")
    assert loss.item() == 0.0
    assert (grad * unit == (0.0 if kind == "squared" else -1.0)).all()


def test_values_are_torchs(instruction_set: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        student, teacher = (x.to(dtype) for x in pair_of("squared", 770, rows=9))
        loss = stored("squared", student, teacher, scale=1 / 770)[0]
        assert loss.item() == pytest.approx(F.mse_loss(student.double(), teacher.double()).item(), rel=1e-6)
        student, teacher = (x.to(dtype) for x in pair_of("kl", 77, rows=9))
        loss = stored("kl", student, teacher)[0]
        theirs = F.kl_div(student.double().log(), teacher.double(), reduction="batchmean")
        assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------ masks


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_reductions(mask: str, reduction: str, dtype: torch.dtype, kind: str) -> None:
    student, teacher = (x.to(dtype) for x in pair_of(kind, 33))
    upstream = torch.tensor([1.0, 2.0, -0.5, 0.0], dtype=real_dtype(student)) if reduction == "none" else None
    call = student, teacher, MASKS[mask], 3.0, -1.0, kind, 0.5, reduction
    loss, term, *_ = native.pair_loss(*call)
    *_, grad, unit = native.pair_loss(*call, gradient=True, upstream=upstream)
    value, gradient = exact(kind, student, teacher, MASKS[mask], upstream, reduction, weight=3.0, scale=0.5)
    torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=0)
    torch.testing.assert_close(term.double(), value / 3, rtol=1e-6, atol=0)
    assert grad is not None
    check_gradient(grad, gradient, mask, float(unit))
    assert (grad[(gradient == 0).all(-1)] == 0).all()


@kinds
@half_precisions
def test_unused_rows_reach_nothing(instruction_set: str, dtype: torch.dtype, kind: str) -> None:
    student, teacher = (x.to(dtype) for x in pair_of(kind, 33))
    expected = stored(kind, student, teacher, MASKS["bool"])
    student[1], teacher[1] = math.nan, math.inf
    result = stored(kind, student, teacher, MASKS["bool"])
    assert result[0] == expected[0]
    assert result[2] == expected[2]
    assert torch.equal(result[1], expected[1])
    assert not result[1][1].any()


# ------------------------------------------------------------------------------------------------ odd values


@kinds
@half_precisions
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("column", [0, 20, 32])
def test_a_bad_row_is_bad_alone(instruction_set: str, column: int, value: float, dtype: torch.dtype, kind: str) -> None:
    """Of the KL also what is no probability, as nan; of the squared distance, infinity in one alone is infinite."""
    good = [x.to(dtype) for x in pair_of(kind, 33)]
    expected = stored(kind, *good, reduction="sum")
    others = torch.tensor([0, 1, 3])
    for which in (0, 1):
        pair = [x.clone() for x in good]
        pair[which][2, column] = value
        loss, _, _ = stored(kind, *pair, reduction="none")
        infinite = kind == "squared" and value == math.inf
        assert loss[2] == math.inf if infinite else loss[2].isnan()
        _, grad, _ = stored(kind, *pair, reduction="sum")
        assert not grad[2, column].isfinite()
        assert torch.equal(grad[others], expected[1][others])


@half_precisions
def test_entries_masked_in_both_count_nothing(instruction_set: str, dtype: torch.dtype) -> None:
    """A masked vocabulary; masked in one alone, the row's loss is infinite."""
    student, teacher = (x.to(dtype) for x in pair_of("squared", 40))
    for column in (0, 17, 39):
        a, b = student.clone(), teacher.clone()
        a[1:, column] = b[1:, column] = -math.inf
        loss, grad, unit = stored("squared", a, b)
        a[1:, column] = b[1:, column] = 0.5
        value, gradient = exact("squared", a, b)
        check_value(loss, value, f"{column}")
        check_gradient(grad, gradient, f"{column}", unit)
        assert (grad[1:, column] == 0).all()
    for which in (0, 1):
        pair = [student.clone(), teacher.clone()]
        pair[which][2, 5] = -math.inf
        loss, grad, _ = stored("squared", *pair, reduction="none")
        assert loss.isinf().tolist() == [False, False, True, False]
        assert grad[2, 5] == (-math.inf, math.inf)[which]
        assert grad[:, :5].isfinite().all()


@half_precisions
def test_where_a_probability_is_zero(instruction_set: str, dtype: torch.dtype) -> None:
    """p = 0 wins over whatever q is; q = 0 < p is infinitely far."""
    student, teacher = (x.to(dtype) for x in pair_of("kl", 40))
    odd = torch.tensor([0.0, 0.25, 1.0, math.nan, math.inf, -1.0, 1e-30], dtype=dtype)
    expected = stored("kl", student[:, 7:], teacher[:, 7:], reduction="none")
    student[:, :7], teacher[:, :7] = odd, 0.0
    loss, grad, _ = stored("kl", student, teacher, reduction="none")
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=1e-7)
    assert (grad[:, :7] == 0).all()
    assert (teacher == 0).all(-1).any() == 0
    student[1, 20] = 0.0
    loss, grad, _ = stored("kl", student, teacher, reduction="none")
    assert loss.isinf().tolist() == [False, True, False, False]
    assert grad[1, 20] == -math.inf
    nothing = torch.zeros(4, 40, dtype=dtype)
    loss, grad, _ = stored("kl", student, nothing)
    assert loss == 0
    assert not grad.any()


@half_precisions
def test_what_is_no_probability(instruction_set: str, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in pair_of("kl", 40))
    for which, value in itertools.product((0, 1), (-1e-3, -math.inf)):
        pair = [student.clone(), teacher.clone()]
        pair[which][2, 30] = value
        loss, grad, _ = stored("kl", *pair, reduction="none")
        assert loss.isnan().tolist() == [False, False, True, False]
        assert grad[2, 30].isnan()


def test_tiny_probabilities(instruction_set: str) -> None:
    """Down to fp32's subnormal numbers, which softmax does return: no tiny q counts as 0 beside a real p."""
    tiny = torch.tensor([1e-45, 1e-42, 1e-39, 1e-37, 1e-30, 1e-20, 1e-19, 1e-10, 1e-3, 0.25])
    student, teacher = tiny.repeat(10).unsqueeze(1), tiny.repeat_interleave(10).unsqueeze(1)
    loss, grad, _ = stored("kl", student, teacher, reduction="none")
    q, p = student.double().squeeze(1), teacher.double().squeeze(1)
    torch.testing.assert_close(loss.double(), p * (p / q).log(), rtol=2e-6, atol=1e-44)
    exact_grad = torch.where(p / q < 3.4e38, p / q, math.inf)
    torch.testing.assert_close(-grad.double().squeeze(1), exact_grad, rtol=1e-6, atol=1e-44)


def test_rows_that_are_not_normalised(instruction_set: str) -> None:
    """Gradient and value are by q itself: nothing takes for granted that rows sum to 1."""
    student, teacher = (x.float() for x in pair_of("kl", 500))
    for of_s, of_t in ((0.5, 1.0), (3.0, 0.1), (1000.0, 900.0)):
        loss, grad, _ = stored("kl", of_s * student, of_t * teacher)
        value, gradient = exact("kl", of_s * student, of_t * teacher)
        assert loss.item() == pytest.approx(value.item(), rel=3e-6)
        check_gradient(grad, gradient, f"{of_s} {of_t}")


@kinds
def test_fp16_units_hold_large_gradients(instruction_set: str, kind: str) -> None:
    """The unit follows from row weights times scale: what is left are differences and quotients, to fp16's own end."""
    student, teacher = (x.half() for x in pair_of(kind, 64))
    if kind == "squared":
        student[0, :3], teacher[0, :3] = torch.tensor([30000.0, 1000.0, 1e-4]), torch.tensor([0.0, -1000.0, 0.0])
    else:
        student[0, :2], teacher[0, :2] = torch.tensor([1e-5, 6e-8]), torch.tensor([0.5, 3e-3])
    for scale in (1.0, 1 / 64, 1 / 3):
        loss, grad, unit = stored(kind, student, teacher, scale=scale)
        assert unit == 2.0 ** math.ceil(math.log2(scale / 4))
        value, gradient = exact(kind, student, teacher, scale=scale)
        assert loss.item() == pytest.approx(value.item(), rel=2e-6)
        check_gradient(grad, gradient, f"{scale}", unit)


# ------------------------------------------------------------------------------------------------ memory


@kinds
def test_layouts_and_threads_do_not_change_a_bit(instruction_set: str, kind: str) -> None:
    g = oracle.generator("layouts")
    whole, teacher = (torch.rand(5, 40, 772, generator=g) + 0.1 for _ in range(2))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for student in (
            whole[:, 1:, 3:-1],
            whole[:, 1:, 3:-1].contiguous(),
            whole.transpose(0, 1)[1:, :, 3:-1].transpose(0, 1),
        ):
            before = whole.clone()
            for other in (teacher[:, 1:, 1:-3], teacher[:, 1:, 1:-3].contiguous()):
                results.append(stored(kind, student, other)[:2])
            assert torch.equal(whole, before)
    for loss, grad in results[1:]:
        assert loss == results[0][0]
        assert torch.equal(grad, results[0][1])
    one = teacher[0, 0, :768].expand(5, 39, 768)
    expected = stored(kind, whole[:, 1:, 3:-1], one.contiguous())
    assert torch.equal(stored(kind, whole[:, 1:, 3:-1], one)[1], expected[1])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,), (2, 3, 4, 5)])
def test_shapes(shape: tuple[int, ...]) -> None:
    student, teacher = (torch.randn(shape, generator=oracle.generator(shape, i)) for i in range(2))
    student.requires_grad_()
    for function, reduction in itertools.product(
        (distil_fast.mse_loss, distil_fast.logit_mse), ("mean", "sum", "none")
    ):
        loss = function(student, teacher, reduction=reduction)
        assert loss.shape == (shape[:-1] if reduction == "none" else ())
        size = shape[-1] if function is distil_fast.mse_loss else 1
        if reduction != "mean":
            expected = (student - teacher).detach().double().square().sum() / size
            torch.testing.assert_close(loss.detach().sum().double(), expected, rtol=1e-6, atol=0)
        assert torch.autograd.grad(loss.sum(), student)[0].shape == shape
