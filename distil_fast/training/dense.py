"""The models' linear layers by oneDNN on a CPU, in float32: on some processors twice as fast as torch's own BLAS.

A context that stands in for torch.nn.functional.linear; products.py decides who multiplies, as it does for fused heads.
It knows nothing of models or losses. Next: distil_fast/products.py; objective.py, which computes inside of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from distil_fast.products import by_onednn, times_transposed

WORTH_A_CALL = 1 << 22  # multiplications; fewer take less time than the detour


class _Linear(torch.autograd.Function):
    """x weight^T + bias and its three gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.save_for_backward(rows, weight)
        return times_transposed(rows, weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0]).contiguous()
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = times_transposed(grad, weight.t()).view(*grads[0].shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            of_weight = times_transposed(grad.t(), rows.t())
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum(0)
        return of_x, of_weight, of_bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear."""
    if x.numel() * weight.shape[0] < WORTH_A_CALL or not by_onednn(x, weight) or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return times_transposed(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


class _Instead(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear:
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def by_the_fastest(device: torch.device) -> AbstractContextManager[object]:
    """The context in which linear layers go to oneDNN where that may be faster: a CPU's, outside of autocast."""
    if device.type != "cpu" or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return nullcontext()
    return _Instead()
