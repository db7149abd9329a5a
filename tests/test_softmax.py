"""softmax and log_softmax at a temperature, forward and backward: bounds, -inf, layouts, threads.

Each is judged by its row: the norm of the error against the exact values' norm, and what rounding to the dtype costs.
Next: csrc/cpu/softmax.h; test_gradients.py has their gradcheck.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import distil_fast
from distil_fast.backends import native
from tests import oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [1, 2, 7, 17, 1000, 3000, 30522]
TEMPERATURES = (1.0, 2.0, 3.7, 0.5)
INF = math.inf
FUNCTIONS = {"softmax": distil_fast.softmax, "log_softmax": distil_fast.log_softmax}
both = pytest.mark.parametrize("name", FUNCTIONS)


def exact(name: str, logits: Tensor, temperature: float | Tensor) -> Tensor:
    by = temperature.double().unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    scaled = logits.double() / by
    return scaled.softmax(-1) if name == "softmax" else scaled.log_softmax(-1)


def check_rows(actual: Tensor, expected: Tensor, relative: float, where: str, terms: Tensor | None = None) -> None:
    """Each row's error: `relative` of the norm of its values (or of the terms that they are the difference of), and 1.1
    times what rounding the exact values costs."""
    error = (actual.double() - expected).norm(dim=-1)
    cost = (expected.to(actual.dtype).double() - expected).norm(dim=-1)
    terms = expected if terms is None else terms
    bound = relative * terms.norm(dim=-1) + (1.1 * cost if actual.dtype.itemsize == 2 else 0.0)
    assert (error <= bound).all(), f"errors {error.tolist()}, bounds {bound.tolist()}, {where}"


def relative_bound(dtype: torch.dtype) -> float:
    return 1e-13 if dtype == torch.float64 else 3e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both
def test_values(instruction_set: str, name: str, dtype: torch.dtype) -> None:
    for kind in oracle.KINDS:
        for i, size in enumerate(SIZES):
            logits = oracle.logit_pair(kind, 3, size, oracle.generator(kind, size))[0].to(dtype)
            temperature = TEMPERATURES[i % 4]
            out = FUNCTIONS[name](logits, temperature)
            assert out.dtype == dtype
            where = f"{kind} {size} T={temperature}"
            check_rows(out, exact(name, logits, temperature), relative_bound(dtype), where)
            if size == 1:
                assert (out == (1.0 if name == "softmax" else 0.0)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both
def test_gradients(instruction_set: str, name: str, dtype: torch.dtype) -> None:
    """Backward knows the output as it was rounded; from that, it is as exact as forward."""
    for i, size in enumerate(SIZES):
        g = oracle.generator("backward", size)
        logits = oracle.logit_pair("plain", 3, size, g)[0].to(dtype).requires_grad_()
        upstream = torch.randn(3, size, generator=g, dtype=torch.float64).to(dtype)
        temperature = TEMPERATURES[i % 4]
        out = FUNCTIONS[name](logits, temperature)
        (grad,) = torch.autograd.grad(out, logits, upstream)
        assert grad.dtype == dtype
        y, u = out.detach().double(), upstream.double()
        if name == "softmax":
            minuend, subtrahend = y * u, y * (y * u).sum(-1, keepdim=True)
        else:
            minuend, subtrahend = u, y.exp() * u.sum(-1, keepdim=True)
        expected, terms = (minuend - subtrahend) / temperature, (minuend.abs() + subtrahend.abs()) / temperature
        check_rows(grad, expected, relative_bound(dtype), f"{size} T={temperature}", terms)


@both
def test_temperature_per_row(instruction_set: str, name: str) -> None:
    logits = torch.randn(2, 3, 1001, generator=oracle.generator("per row"), requires_grad=True)
    temperature = torch.tensor([[0.5, 1.0, 2.0], [3.7, 10.0, 100.0]])
    out = FUNCTIONS[name](logits, temperature)
    check_rows(out.detach(), exact(name, logits.detach(), temperature), 3e-6, "per row")
    upstream = torch.randn(out.shape, generator=oracle.generator("upstream"))
    (grad,) = torch.autograd.grad(out, logits, upstream)
    x = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(exact(name, x, temperature), x, upstream.double())
    check_rows(grad, expected, 1e-5, "per row, gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan(instruction_set: str, dtype: torch.dtype) -> None:
    """A masked column has probability exactly 0; a row without a finite logit, or with a nan, is nan, and alone so."""
    for size in (5, 5000):
        logits = torch.randn(5, size, generator=oracle.generator(size)).to(dtype)
        columns = torch.arange(size) % 3 == 0
        columns[:2048] |= size == 5000  # a whole block
        logits[0, columns], logits[1], logits[2, -1], logits[3, 0] = -INF, -INF, math.nan, INF
        probabilities, logarithms = distil_fast.softmax(logits), distil_fast.log_softmax(logits)
        assert (probabilities[0, columns] == 0).all()
        assert (logarithms[0, columns] == -INF).all()
        for name, out in (("softmax", probabilities), ("log_softmax", logarithms)):
            check_rows(out[0, ~columns], exact(name, logits[0, ~columns], 1.0), relative_bound(dtype), f"{size}")
            check_rows(out[4], exact(name, logits[4], 1.0), relative_bound(dtype), f"{size}")
            assert out[1:3].isnan().all()
            assert out[3].isnan().any()


@pytest.mark.parametrize("kind", ["finite masks", "huge", "equal"])
def test_extremes(instruction_set: str, kind: str) -> None:
    logits = torch.randn(2, 3000, generator=oracle.generator(kind))
    if kind == "finite masks":
        logits[:, ::2], logits[1, :] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    elif kind == "huge":
        logits *= 1e6
    else:
        logits[:] = 88.8
    for name, function in FUNCTIONS.items():
        check_rows(function(logits, 2.0), exact(name, logits, 2.0), 3e-6, kind)


@both
def test_layouts_and_threads_do_not_change_a_bit(instruction_set: str, name: str) -> None:
    g = oracle.generator("layouts")
    whole = torch.randn(2, 5, 40004, generator=g)
    temperature = torch.rand(2, 4, generator=g) + 0.5
    upstream = torch.randn(2, 4, 40001, generator=g)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for view in (
            whole[:, :-1, 2:-1],
            whole[:, :-1, 2:-1].clone(),
            whole.transpose(0, 1)[:-1, :, 2:-1].transpose(0, 1),
        ):
            before = whole.clone()
            x = view.detach().requires_grad_()
            out = FUNCTIONS[name](x, temperature)
            gradients = [torch.autograd.grad(out, x, u, retain_graph=True)[0] for u in (upstream, strided(upstream))]
            results.append((out.detach(), *gradients))
            assert torch.equal(whole, before), "the logits changed"
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    assert torch.equal(results[0][1], results[0][2])


def strided(values: Tensor) -> Tensor:
    """The same values with gaps between them, as a gradient may come."""
    return torch.stack([values, values * 0 - 1], -1)[..., 0]


@both
def test_one_row_is_split_over_threads(instruction_set: str, name: str) -> None:
    logits = torch.randn(1, 100003, generator=oracle.generator("one"), requires_grad=True)
    outs: list[tuple[Tensor, Tensor]] = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = FUNCTIONS[name](logits, 3.7)
        outs.append((out.detach(), torch.autograd.grad(out.square().sum(), logits)[0]))
    assert all(torch.equal(a, b) for other in outs[1:] for a, b in zip(other, outs[0], strict=True))


@both
def test_expanded_upstream(name: str) -> None:
    """The gradient of a sum has stride 0 everywhere."""
    logits = torch.randn(3, 50, requires_grad=True)
    weights = torch.arange(50.0)
    out = FUNCTIONS[name](logits)
    (expected,) = torch.autograd.grad((out * weights.expand_as(out)).sum(), logits, retain_graph=True)
    (result,) = torch.autograd.grad(out, logits, weights.expand(3, 50), retain_graph=True)
    assert torch.equal(result, expected)
    (flat,) = torch.autograd.grad(out.sum(), logits)
    (contiguous,) = torch.autograd.grad(FUNCTIONS[name](logits), logits, torch.ones(3, 50))
    assert torch.equal(flat, contiguous)


@both
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,)])
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, requires_grad=True)
    out = FUNCTIONS[name](logits, 2.0)
    assert out.shape == shape
    assert torch.autograd.grad(out.sum(), logits)[0].shape == shape
    check_rows(out.detach(), exact(name, logits.detach(), 2.0), 3e-6, f"{shape}")


def test_rows_more_than_two_to_the_31_elements_apart(instruction_set: str) -> None:
    values = torch.randn(2, 3001, generator=oracle.generator("far")).bfloat16()
    far = torch.empty(2**31 + 5 + 3001, dtype=torch.bfloat16).as_strided((2, 3001), (2**31 + 5, 1))
    far.copy_(values)
    for logarithm in (False, True):
        out = native.softmax(values, 2.0, logarithm)
        assert torch.equal(native.softmax(far, 2.0, logarithm), out)
        far_out = far.new_empty(0).set_(far.untyped_storage(), 0, far.shape, far.stride())
        far_out.copy_(out)
        grad = native.softmax_backward(out, values, 2.0, logarithm)
        assert torch.equal(native.softmax_backward(far_out, values, 2.0, logarithm), grad)
        far.copy_(values)


def test_functions_are_what_they_are_called(instruction_set: str) -> None:
    """Neither is the other, and temperature divides."""
    logits = torch.tensor([[0.0, math.log(2.0), math.log(4.0)]])
    functions: dict[str, Callable[..., Tensor]] = FUNCTIONS
    torch.testing.assert_close(functions["softmax"](logits), torch.tensor([[1.0, 2.0, 4.0]]) / 7)
    torch.testing.assert_close(functions["log_softmax"](2 * logits, 2.0).exp(), torch.tensor([[1.0, 2.0, 4.0]]) / 7)
