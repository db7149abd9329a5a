"""Linear layers by another library are the same linear layers: values, gradients, and where they are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from distil_fast.training import dense

SHAPES = [((4, 33, 40), 50), ((130, 40), 96), ((1, 3, 40), 64)]


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what went by the detour; nothing is too small for it here."""
    seen: list[tuple[int, ...]] = []

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(tuple(x.shape))
        return F.linear(x, weight, bias)

    monkeypatch.setattr(dense, "WORTH_A_CALL", 0)
    monkeypatch.setattr(dense, "by_onednn", lambda *_: True)
    monkeypatch.setattr(dense, "times_transposed", watched)
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "out"), SHAPES)
@pytest.mark.parametrize("transposed", [True, False])
def test_values_and_gradients(
    shape: tuple[int, ...], out: int, bias: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "WORTH_A_CALL", 0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    if transposed and x.dim() == 3:
        x = x.transpose(0, 1)
    layer = torch.nn.Linear(shape[-1], out, bias=bias)
    upstream = torch.randn(*x.shape[:-1], out, generator=generator)

    def run(double: bool) -> list[Tensor]:
        values = x.double() if double else x.clone()
        values.requires_grad_()
        module = torch.nn.Linear(shape[-1], out, bias=bias, dtype=torch.float64 if double else torch.float32)
        module.load_state_dict(layer.state_dict())
        with dense.by_the_fastest(torch.device("cpu")):
            found = module(values)
        found.backward(upstream.to(found.dtype))
        grads = [values.grad, *(parameter.grad for parameter in module.parameters())]
        return [found.detach(), *(grad for grad in grads if grad is not None)]

    for actual, expected in zip(run(False), run(True), strict=True):
        assert (actual.double() - expected).norm() < 1e-6 * expected.norm()


def test_what_goes_there_and_what_does_not(multiplied: list[tuple[int, ...]]) -> None:
    layer, x = torch.nn.Linear(40, 50), torch.randn(4, 40)
    with dense.by_the_fastest(torch.device("cpu")):
        layer(x).sum().backward()
        assert multiplied == [(4, 40), (50, 4)]  # forward, and the weight's gradient: x needs none
        multiplied.clear()
        with torch.no_grad():
            layer(x)
        assert multiplied == [(4, 40)]
    with torch.autocast("cpu", torch.bfloat16), dense.by_the_fastest(torch.device("cpu")):
        layer(x)
    assert layer(x).shape == (4, 50)  # outside of the context
    assert len(multiplied) == 1


def test_small_ones_and_other_dtypes_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("it went there")

    monkeypatch.setattr(dense, "times_transposed", refuse)
    with dense.by_the_fastest(torch.device("cpu")):
        torch.nn.Linear(4, 5)(torch.randn(3, 4))
        torch.nn.Linear(400, 500, dtype=torch.float64)(torch.randn(300, 400, dtype=torch.float64))


def test_a_frozen_layer_passes_its_gradient_on(multiplied: list[tuple[int, ...]]) -> None:
    layer, x = torch.nn.Linear(40, 50).requires_grad_(False), torch.randn(4, 40, requires_grad=True)
    with dense.by_the_fastest(torch.device("cpu")):
        layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, 40))
    assert multiplied == [(4, 40), (4, 50)]
