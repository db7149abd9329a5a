"""The cosine loss: bounds against fp64 in every dtype and instruction set, masks, layouts, threads, odd vectors.

Value and gradient are relative to themselves even as student and teacher meet: 1 - cos is computed as half the squared
distance of the unit vectors. Next: csrc/cpu/hidden.h; test_gradients.py has the gradcheck.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distil_fast
from distil_fast import reference
from distil_fast.backends import native
from distil_fast.backends.layout import real_dtype
from tests import oracle

SIZES = [1, 2, 7, 16, 33, 384, 768, 4099]
MIXES = [*itertools.product((torch.float32, torch.bfloat16, torch.float16), repeat=2), (torch.float64,) * 2]


def hidden_pair(size: int, rows: int = 4, difference: float = 1.0) -> tuple[Tensor, Tensor]:
    g = oracle.generator("hidden", size, difference)
    noise, teacher = (torch.randn(rows, size, generator=g, dtype=torch.float64) for _ in range(2))
    student = noise if difference == 1.0 else 1.7 * (teacher + difference * noise)
    return student, teacher


def exact(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, upstream: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Tensor]:
    x = student.detach().double().requires_grad_()
    loss = reference.cosine_loss(x, teacher.detach().double(), mask, **settings)
    return loss.detach(), torch.autograd.grad(loss, x, None if upstream is None else upstream.double())[0]


def stored(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, reduction: str = "mean", weight: float = 1.0
) -> tuple[Tensor, Tensor, float]:
    """Loss, gradient and the unit that it is stored in."""
    loss, _, grad, unit = native.pair_loss(
        student, teacher, mask, weight, -1.0, "cosine", 1.0, reduction, gradient=True
    )
    assert grad is not None
    return loss, grad, unit


def check_gradient(grad: Tensor, expected: Tensor, where: str, unit: float = 1.0, relative: float = 3e-6) -> None:
    """By rows: relative to the norm, and 1.1 times what rounding the exact gradient costs."""
    relative = 1e-11 if grad.dtype == torch.float64 else relative
    cost = ((expected / unit).to(grad.dtype).double() * unit - expected).norm(dim=-1)
    bound = relative * expected.norm(dim=-1) + (1.1 * cost if grad.dtype.itemsize == 2 else 0.0)
    error = (grad.double() * unit - expected).norm(dim=-1)
    assert (error <= bound).all(), f"gradient: errors {error.tolist()}, bounds {bound.tolist()}, {where}"


def check_value(loss: Tensor, value: Tensor, where: str) -> None:
    relative = 2e-6 if loss.dtype == torch.float32 else 1e-13
    assert (loss.double() - value).abs() <= relative * (value.abs() + 0.1), f"loss {loss}, exactly {value}, {where}"


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(d).removeprefix("torch.") for d in mix))
def test_values_and_gradients(instruction_set: str, mix: tuple[torch.dtype, torch.dtype]) -> None:
    for size in SIZES[1:]:
        student, teacher = (x.to(d) for x, d in zip(hidden_pair(size), mix, strict=True))
        loss, grad, unit = stored(student, teacher)
        value, gradient = exact(student, teacher)
        assert loss.dtype == real_dtype(student)
        check_value(loss, value, f"{size}")
        check_gradient(grad, gradient, f"{size}", unit)


@pytest.mark.parametrize("difference", [1e-1, 1e-2, 1e-3, 1e-4])
def test_exact_as_the_student_meets_the_teacher(instruction_set: str, difference: float) -> None:
    """1 - cos of 1e-8: a subtraction would leave no digit of it. The relative error is that of the difference."""
    for size in (64, 768):
        student, teacher = (x.float() for x in hidden_pair(size, difference=difference))
        loss, grad, _ = stored(student, teacher)
        value, gradient = exact(student, teacher)
        relative = 4e-7 / difference + 2e-6  # of the unit vectors' difference, whose terms are rounded to 2^-24
        assert loss.item() == pytest.approx(value.item(), rel=relative)
        check_gradient(grad, gradient, f"{size} {difference}", relative=relative)


def test_same_direction(instruction_set: str) -> None:
    """A student that is the teacher: no loss; and 2^k times the teacher as well, to the bit."""
    teacher = torch.randn(4, 768, generator=oracle.generator("same"))
    for factor in (1.0, 4.0):
        loss, grad, _ = stored(factor * teacher, teacher)
        assert 0.0 <= loss.item() < 1e-14
        assert grad.abs().max().item() < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_value_is_torchs(instruction_set: str, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in hidden_pair(768, rows=50))
    theirs = nn.CosineEmbeddingLoss()(student.double(), teacher.double(), torch.ones(50))
    assert distil_fast.cosine_loss(student, teacher).item() == pytest.approx(theirs.item(), rel=1e-6)


MASKS = {
    "all": None,
    "bool": torch.tensor([True, False, True, True]),
    "weights": torch.tensor([0.5, 0.0, 2.0, 1.0]),
    "none": torch.zeros(4, dtype=torch.bool),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_reductions(mask: str, reduction: str, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in hidden_pair(33))
    weights = MASKS[mask]
    upstream = torch.tensor([1.0, 2.0, -0.5, 0.0]) if reduction == "none" else torch.tensor(0.25)
    x = student.clone().requires_grad_()
    loss = distil_fast.cosine_loss(x, teacher, weights, reduction=reduction)
    (grad,) = torch.autograd.grad(loss, x, upstream.to(loss.dtype))
    value, gradient = exact(student, teacher, weights, upstream, reduction=reduction)
    torch.testing.assert_close(loss.detach().double(), value, rtol=1e-6, atol=0)
    check_gradient(grad, gradient, mask, relative=6e-4 if dtype == torch.float16 else 3e-6)  # fp16: rounded twice
    assert (grad[(gradient == 0).all(-1)] == 0).all()


@pytest.mark.parametrize("count", [7, 2.5, 0, torch.tensor(3)])
def test_count_replaces_the_denominator(count: float | Tensor) -> None:
    student, teacher = (x.float() for x in hidden_pair(33))
    x = student.clone().requires_grad_()
    loss = distil_fast.cosine_loss(x, teacher, MASKS["weights"], count)
    value, gradient = exact(student, teacher, MASKS["weights"], count=count)
    assert loss.item() == pytest.approx(value.item(), rel=1e-6)
    check_gradient(torch.autograd.grad(loss, x)[0], gradient, f"{count}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_unused_rows_reach_nothing(instruction_set: str, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in hidden_pair(33))
    expected = stored(student, teacher, MASKS["bool"])
    student[1], teacher[1] = math.nan, math.inf
    result = stored(student, teacher, MASKS["bool"])
    assert result[0] == expected[0]
    assert result[2] == expected[2]
    assert torch.equal(result[1], expected[1])
    assert not result[1][1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_bad_row_is_bad_alone(instruction_set: str, value: float, dtype: torch.dtype) -> None:
    good = [x.to(dtype) for x in hidden_pair(33)]
    expected = stored(good[0], good[1], reduction="none")
    others = torch.tensor([0, 1, 3])
    for which in (0, 1):
        pair = [x.clone() for x in good]
        pair[which][2, -1] = value
        loss, grad, unit = stored(pair[0], pair[1], reduction="none")
        assert loss[2].isnan()
        assert grad[2].isnan().any()
        assert torch.equal(loss[others], expected[0][others])
        error = (grad.double() * unit - expected[1].double() * expected[2])[others]
        assert error.norm() <= (1e-3 if dtype == torch.float16 else 0.0) * expected[1].double().norm() * expected[2]


def test_vectors_of_length_zero_and_nearly_so(instruction_set: str) -> None:
    """As torch has it, 1e-12 under the roots: a vector of length 0 is at right angles to everything."""
    for scale in (0.0, 1e-8, 1e-6, 1e-3, 1e3, 1e8):
        student, teacher = hidden_pair(33)
        student, teacher = (scale * student).float(), teacher.float()
        loss, grad, _ = stored(student, teacher)
        value, gradient = exact(student, teacher)
        assert loss.item() == pytest.approx(value.item(), rel=2e-6)
        check_gradient(grad, gradient, f"{scale}")


def test_fp16_gradients_of_short_vectors_do_not_overflow(instruction_set: str) -> None:
    """The gradient is of the size 1 / |student|, which no weight knows of."""
    student, teacher = hidden_pair(64)
    for scale in (1e-5, 1e-4, 1e-3, 1.0, 1e3):
        short = (scale * student).half()
        x = short.clone().requires_grad_()
        (grad,) = torch.autograd.grad(distil_fast.cosine_loss(x, teacher.half()), x)
        _, gradient = exact(short, teacher.half())
        check_gradient(grad, gradient, f"|student| = {short.norm(dim=-1)}", relative=6e-4)


def test_one_column(instruction_set: str) -> None:
    """cos is 1 or -1 (but for the 1e-12), and has no gradient worth the name."""
    student, teacher = torch.tensor([[2.0], [-3.0]]), torch.tensor([[0.5], [0.25]])
    loss, grad, _ = stored(student, teacher, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, 2.0]), rtol=1e-6, atol=1e-6)
    assert (grad.abs() < 1e-6).all()


def test_layouts_and_threads_do_not_change_a_bit(instruction_set: str) -> None:
    g = oracle.generator("layouts")
    whole, teacher = (torch.randn(5, 40, 772, generator=g) for _ in range(2))
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
                results.append(stored(student, other)[:2])
            assert torch.equal(whole, before)
    for loss, grad in results[1:]:
        assert loss == results[0][0]
        assert torch.equal(grad, results[0][1])
    one = teacher[0, 0, :768].expand(5, 39, 768)
    expected = stored(whole[:, 1:, 3:-1], one.contiguous())
    assert torch.equal(stored(whole[:, 1:, 3:-1], one)[1], expected[1])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,), (2, 3, 4, 5)])
def test_shapes(shape: tuple[int, ...]) -> None:
    student, teacher = (torch.randn(shape, generator=oracle.generator(shape, i)) for i in range(2))
    student.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        loss = distil_fast.cosine_loss(student, teacher, reduction=reduction)
        assert loss.shape == (shape[:-1] if reduction == "none" else ())
        value, _ = exact(student.detach(), teacher, reduction="sum")
        if reduction != "mean":
            torch.testing.assert_close(loss.detach().sum().double(), value, rtol=1e-6, atol=0)
        assert torch.autograd.grad(loss.sum(), student)[0].shape == shape


def test_rows_more_than_two_to_the_31_elements_apart(instruction_set: str) -> None:
    values, teacher = (x.bfloat16() for x in hidden_pair(768, rows=2))
    far = torch.empty(2**31 + 800, dtype=torch.bfloat16).as_strided((2, 768), (2**31, 1))
    far.copy_(values)
    loss, grad, _ = stored(far, teacher)
    expected = stored(values, teacher)
    assert loss == expected[0]
    assert torch.equal(grad, expected[1])
