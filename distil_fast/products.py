"""The four matrix products of a fused head, on one chunk of rows: both models' logits, and the student's two gradients.

Products are summed in float32 at least; `wide` results are not rounded to a half precision either. A head is widened by
tiles, never as a whole. It knows nothing of losses or of how rows are chunked. Next: heads.py.

On a CPU float32 goes to oneDNN where torch has it, which on some processors is twice as fast as torch.mm's BLAS. oneDNN
falls back to a slow reference for layouts that it does not know: only dense operands go there, transposed or not.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALVES = (torch.float16, torch.bfloat16)
TILE_BYTES = 4 << 20  # of what is widened, or multiplied, at a time: on a CPU it stays in the caches
GPU_TILE_BYTES = 64 << 20


def by_onednn(*operands: Tensor) -> bool:
    return (
        all(x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0 for x in operands)
        and bool(torch.backends.mkldnn.enabled)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def times_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias of one dtype; `weight` is dense, or the transposition of a dense matrix."""
    if by_onednn(x, weight):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
        return product
    return torch.nn.functional.linear(x, weight, bias)


def _tiles(weight: Tensor) -> range:
    """The first rows of tiles whose float32 copies have TILE_BYTES."""
    size = TILE_BYTES if weight.device.type == "cpu" else GPU_TILE_BYTES
    return range(0, weight.shape[0], max(1, size // (4 * weight.shape[1])))


def logits_dtype(hidden: Tensor, wide: bool) -> torch.dtype:
    """Of the logits that `logits` makes."""
    return torch.float32 if hidden.dtype in _HALVES and (wide or _slow_half(hidden)) else hidden.dtype


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, wide: bool) -> Tensor:
    """hidden weight^T + bias `[rows, V]`, of hidden states `[rows, H]` and weights `[V, H]`.

    wide: half-precision operands, of one dtype or of two, give float32 logits, which no rounding comes near. Otherwise
    weights and bias are of the hidden states' dtype.
    """
    if wide and weight.dtype not in _HALVES:
        hidden = hidden.to(weight.dtype)
    if weight.dtype == hidden.dtype == logits_dtype(hidden, wide):
        return times_transposed(hidden, weight.contiguous(), None if bias is None else bias.to(hidden.dtype))
    if hidden.device.type != "cpu" and weight.dtype == hidden.dtype:
        out: Tensor = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return out if bias is None else out.add_(bias)
    out = hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=torch.float32)
    x, tiles = hidden.float(), _tiles(weight)
    for start in tiles:
        stop = start + tiles.step
        tile_bias = None if bias is None else bias[start:stop].float()
        out[:, start:stop] = times_transposed(x, weight[start:stop].float(), tile_bias)
    return out


def _slow_half(x: Tensor) -> bool:
    """A half precision that this CPU has no instructions for: there float32 is both more exact and faster."""
    if x.dtype not in _HALVES or x.device.type != "cpu":
        return False
    name = "bf16" if x.dtype == torch.bfloat16 else "fp16"
    return not getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: False)()


def hidden_gradient(grad: Tensor, weight: Tensor, wide: bool = False) -> Tensor:
    """grad weight `[rows, H]` in the weight's dtype, of the logits' gradient `[rows, V]` in float32 or that dtype.

    wide: of weights in half precision the product is float32, and not rounded.
    """
    if weight.dtype in _HALVES and (wide or _slow_half(weight)):
        out = grad.new_zeros((grad.shape[0], weight.shape[1]), dtype=torch.float32)
        tiles = _tiles(weight)
        for start in tiles:
            out.addmm_(grad[:, start : start + tiles.step].float(), weight[start : start + tiles.step].float())
        return out if wide else out.to(weight.dtype)
    grad = grad.to(weight.dtype)
    if by_onednn(grad, weight):
        return times_transposed(grad, weight.contiguous().t())
    return torch.mm(grad, weight)


class WeightGradient:
    """The sum over chunks of grad^T hidden, `[V, H]`: in float32, or float64 beside float64.

    On a CPU it grows by tiles that stay in the caches: adding to memory costs more than multiplying. There a chunk's
    product of half precision is rounded to it once, as mm returns it, before it is added.
    """

    def __init__(self, vocab_size: int, hidden: Tensor) -> None:
        real = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.sum = torch.zeros((vocab_size, hidden.shape[1]), dtype=real, device=hidden.device)

    def add(self, grad: Tensor, hidden: Tensor) -> None:
        """Adds the chunk's part, from its logits' gradient `[rows, V]` and hidden states `[rows, H]`."""
        if grad.shape[0] == 0:
            return
        dtype = self.sum.dtype if hidden.dtype not in _HALVES or _slow_half(hidden) else hidden.dtype
        grad, hidden = grad.to(dtype), hidden.to(dtype)
        if hidden.device.type == "cpu":
            columns = hidden.t().contiguous()
            tiles = _tiles(self.sum)
            for start in tiles:
                turned = grad[:, start : start + tiles.step].t()
                if by_onednn(turned, columns):
                    self.sum[start : start + tiles.step] += times_transposed(turned, columns)
                else:
                    self.sum[start : start + tiles.step] += torch.mm(turned, hidden)
        elif dtype in _HALVES:
            torch.addmm(self.sum, grad.t(), hidden, out_dtype=torch.float32, out=self.sum)
        else:
            self.sum.addmm_(grad.t(), hidden)
