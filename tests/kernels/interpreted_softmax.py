"""softmax, log_softmax and their backward, and the cosine loss, against fp64. Run by test_interpreter.py.

Bounds as in tests/test_softmax.py and tests/test_cosine.py. Next: test_interpreter.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distil_fast import backends, reference
from distil_fast.backends import triton as backend
from tests import oracle
from tests.kernels.interpreter import HALVES, MIXES, Guarded

NAN = math.nan
LAYOUTS: tuple[dict[str, int], ...] = ({}, {"offset": 1}, {"gap": 3}, {"offset": 3, "gap": 5})


def check_rows(actual: Tensor, expected: Tensor, terms: Tensor, where: str, unit: float = 1.0) -> None:
    """Each row's error: 3e-6 of the norm of the terms that it is made of, and 1.1 times what rounding costs."""
    error = (actual.double() * unit - expected).norm(dim=-1)
    cost = ((expected / unit).to(actual.dtype).double() * unit - expected).norm(dim=-1)
    bound = 3e-6 * terms.norm(dim=-1) + (1.1 * cost if actual.dtype.itemsize == 2 else 0.0)
    assert (error <= bound).all(), f"errors {error.tolist()}, bounds {bound.tolist()}, {where}"


# ------------------------------------------------------------------------------------------------ softmax


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("logarithm", [False, True], ids=["softmax", "log_softmax"])
def test_softmax(logarithm: bool, dtype: torch.dtype) -> None:
    sizes = (1, 2, 7, 17, 1000, 5000)
    temperatures = (1.0, torch.tensor(2.0), torch.tensor([3.7, 0.5]), 2.0, 3.7, 0.5)
    for turn, (size, temperature) in enumerate(zip(sizes, temperatures, strict=True)):
        kind, layout = oracle.KINDS[turn], LAYOUTS[turn % 4]
        g = oracle.generator(kind, size)
        logits = Guarded(oracle.logit_pair(kind, 2, size, g)[0].to(dtype), **layout)
        by = temperature if not isinstance(temperature, Tensor) else temperature.double().view(-1, 1)
        scaled = logits.rows.double() / by
        out = backend.softmax(logits.rows, temperature, logarithm)
        expected = scaled.log_softmax(-1) if logarithm else scaled.softmax(-1)
        assert out.dtype == dtype
        check_rows(out, expected, expected, f"{kind} {size}")
        if size == 1:
            assert (out == (0.0 if logarithm else 1.0)).all()
        upstream = Guarded(torch.randn(2, size, generator=g, dtype=torch.float64).to(dtype), **layout)
        grad = backend.softmax_backward(out, upstream.rows, temperature, logarithm)
        y, u = out.double(), upstream.rows.double()
        minuend, subtrahend = (
            (u, y.exp() * u.sum(-1, keepdim=True)) if logarithm else (y * u, y * (y * u).sum(-1)[:, None])
        )
        check_rows(
            grad, (minuend - subtrahend) / by, (minuend.abs() + subtrahend.abs()) / by, f"backward {kind} {size}"
        )


def test_softmax_at_the_edges() -> None:
    """-inf is 0; a row without a distribution, or with a temperature that is none, is nan alone."""
    logits = torch.randn(4, 33, generator=oracle.generator("edges"))
    logits[0, :5] = -math.inf
    logits[1] = -math.inf
    temperature = torch.tensor([2.0, 2.0, 0.0, 2.0])
    out = backend.softmax(logits, temperature, False)
    assert (out[0, :5] == 0).all()
    assert out.isnan().any(-1).tolist() == [False, True, True, False]
    assert backend.softmax(torch.empty(0, 33), 2.0, True).shape == (0, 33)
    with backends.checked(), pytest.raises(ValueError, match=r"temperature: .*got 0\.0 in row 2"):
        backend.softmax(logits, temperature, False)


# ------------------------------------------------------------------------------------------------ cosine


def hidden(size: int, rows: int = 3, difference: float = 1.0) -> tuple[Tensor, Tensor]:
    g = oracle.generator("hidden", size, difference)
    noise, teacher = (torch.randn(rows, size, generator=g, dtype=torch.float64) for _ in range(2))
    return (noise if difference == 1.0 else 1.7 * (teacher + difference * noise)), teacher


def check_cosine(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, weight: Any = 1.0, upstream: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = student.detach().double().requires_grad_()
    reduction = settings.get("reduction", "mean")
    exact = reference.cosine_loss(x, teacher.double(), mask, **settings)
    above = None if upstream is None else upstream.double() * float(weight)
    (gradient,) = torch.autograd.grad(exact if reduction == "none" else exact * float(weight), x, above)
    count = settings.get("count")
    loss, term, grad, unit = backend.pair_loss(
        student,
        teacher,
        mask,
        weight,
        -1.0 if count is None else count,
        "cosine",
        1.0,
        reduction,
        gradient=True,
        upstream=upstream,
    )
    where = f"{student.dtype} {teacher.dtype} {tuple(student.shape)} {settings}"
    torch.testing.assert_close(term.double(), exact.detach(), rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(loss.double(), exact.detach() * float(weight), rtol=2e-6, atol=2e-7)
    check_rows(grad, gradient, gradient, where, float(unit))
    assert (grad[(gradient == 0).all(-1)] == 0).all()
    return loss, grad


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(str(d).removeprefix("torch.") for d in mix))
def test_cosine(mix: tuple[torch.dtype, torch.dtype]) -> None:
    for turn, size in enumerate((2, 7, 33, 768, 2500)):
        student, teacher = (x.to(d) for x, d in zip(hidden(size), mix, strict=True))
        s, t = Guarded(student, **LAYOUTS[turn % 4]), Guarded(teacher, **LAYOUTS[turn * 3 % 4])
        check_cosine(s.rows, t.rows, weight=(1.0, 2.5)[turn % 2])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cosine_masks_and_reductions(reduction: str, dtype: torch.dtype) -> None:
    """A row of weight 0 is not read: it is nan."""
    upstream = torch.tensor([1.0, 2.0, -0.5]) if reduction == "none" else None
    for mask in (torch.tensor([True, False, True]), torch.tensor([0.5, 0.0, 2.0])):
        student, teacher = (x.to(dtype) for x in hidden(40))
        clean = teacher.clone()
        loss, grad = check_cosine(student, clean, mask, torch.tensor(3.0), upstream, reduction=reduction)
        teacher[1] = NAN
        again = backend.pair_loss(
            student, teacher, mask, torch.tensor(3.0), -1.0, "cosine", 1.0, reduction, gradient=True, upstream=upstream
        )
        assert torch.equal(again[0], loss)
        assert torch.equal(again[2], grad)


def test_cosine_counts_and_faults() -> None:
    student, teacher = (x.float() for x in hidden(40))
    check_cosine(student, teacher, count=5.0)
    for zero in (0, torch.tensor(0)):
        loss, term, grad, _ = backend.pair_loss(student, teacher, None, 1.0, zero, "cosine", 1.0, "mean", gradient=True)
        assert loss == 0
        assert term == 0
        assert not grad.any()
    bad = torch.tensor([1.0, -1.0, 1.0])
    loss, _, grad, _ = backend.pair_loss(student, teacher, bad, 1.0, -1.0, "cosine", 1.0, "mean", gradient=True)
    assert loss.isnan()
    assert grad.any(-1).tolist() == [True, False, True]
    with backends.checked(), pytest.raises(ValueError, match=r"mask: .*got -1\.0 in row 1"):
        backend.pair_loss(student, teacher, bad, 1.0, -1.0, "cosine", 1.0, "mean")
    nothing = torch.empty(0, 40)
    assert backend.pair_loss(nothing, nothing.clone(), None, 1.0, -1.0, "cosine", 1.0, "mean", gradient=True)[0] == 0


@pytest.mark.parametrize("difference", [1e-2, 1e-4])
def test_cosine_stays_exact_as_the_student_meets_the_teacher(difference: float) -> None:
    """1 - cos of 1e-8. The relative error is that of the unit vectors' difference, whose terms are rounded to 2^-24;
    the interpreter multiplies and adds with two roundings, so twice that."""
    student, teacher = (x.float() for x in hidden(768, difference=difference))
    x = student.double().requires_grad_()
    exact = reference.cosine_loss(x, teacher.double())
    loss, _, _, _ = backend.pair_loss(student, teacher, None, 1.0, -1.0, "cosine", 1.0, "mean")
    assert loss.item() == pytest.approx(exact.item(), rel=8e-7 / difference + 2e-6)


# ------------------------------------------------------------------------------------------------ the interpreter


def test_bf16_is_rounded_as_torch_rounds_it() -> None:
    """The patch of interpreter.py: nearest even, subnormals, overflow, nan."""
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=oracle.generator("bits"), dtype=torch.int64)
    values = bits.to(torch.int32).view(torch.float32)
    values[:4] = torch.tensor([1e-40, 3.4e38, NAN, -0.0])
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    stored = interpreter._convert_float(values.numpy(), tl.float32, tl.bfloat16, None)
    mine = torch.from_numpy(stored.astype("int16")).view(torch.bfloat16)
    torch.testing.assert_close(mine, values.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = interpreter._convert_float(stored, tl.bfloat16, tl.float32, None).astype("uint32")
    torch.testing.assert_close(
        torch.from_numpy(back.astype("int32")).view(torch.float32), mine.float(), rtol=0, atol=0, equal_nan=True
    )
