"""The products of a fused head in every pair of dtypes against float64, and that no head is ever widened as a whole.

What they come to in a loss is test_linear.py's affair. Next: distil_fast/products.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distil_fast import products

ROWS, WIDTH, V = 3, 24, 700
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
TILE = 50  # rows of a tile here


class Largest(TorchDispatchMode):
    """The most elements that a floating-point tensor of WIDTH columns or rows had that an op made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given and WIDTH in x.shape:
                self.most = max(self.most, x.numel())
        return out


def drawn(states: torch.dtype, weights: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=g) for shape in ((ROWS, WIDTH), (V, WIDTH), (V,)))
    return hidden.to(states), weight.to(weights), bias.to(weights)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "TILE_BYTES", 4 * WIDTH * TILE)


@pytest.mark.parametrize("states", DTYPES, ids=str)
@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_wide_logits(states: torch.dtype, weights: torch.dtype) -> None:
    hidden, weight, bias = drawn(states, weights)
    for b in (None, bias):
        with Largest() as seen:
            got = products.logits(hidden, weight, b, wide=True)
        assert got.dtype == torch.float32
        exact = torch.nn.functional.linear(hidden.double(), weight.double(), None if b is None else b.double())
        assert (got - exact).norm() < 1e-6 * exact.norm()
        assert seen.most <= TILE * WIDTH


@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_the_wide_gradient_of_hidden_states(weights: torch.dtype) -> None:
    _, weight, _ = drawn(torch.float32, weights)
    grad = torch.randn(ROWS, V, generator=torch.Generator().manual_seed(1))
    with Largest() as seen:
        got = products.hidden_gradient(grad, weight, wide=True)
    assert got.dtype == torch.float32
    exact = grad.double() @ weight.double()
    assert (got - exact).norm() < 1e-6 * exact.norm()
    assert seen.most <= TILE * WIDTH


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_walk_sees_a_copy(dtype: torch.dtype) -> None:
    _, weight, _ = drawn(torch.float32, dtype)
    with Largest() as seen:
        weight.float()
    assert seen.most == V * WIDTH
