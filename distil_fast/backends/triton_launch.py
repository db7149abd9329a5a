"""What every op of the Triton backend does: kernels imported late, rows in memory, launches, scalars, row weights.

It knows no op and no formula. Next: triton.py, which has the ops; kernels/tiles.py, for what rows are to a kernel.
"""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distil_fast.backends.gpu import on_device_of
from distil_fast.backends.layout import Shape, geometry

WAVE = 64 if torch.version.hip else 32  # threads that run in step; AMD's data-centre GPUs have 64

Scalar = float | Tensor


@functools.cache
def all_kernels() -> SimpleNamespace:
    """The kernels and their launch shapes: not imported before they are needed, because Triton is not, either."""
    names = "cosine divergences launch order pairs prologue reduction rescale rows softmax topk transforms"
    modules = [vars(importlib.import_module(f"distil_fast.kernels.{name}")) for name in names.split()]
    return SimpleNamespace(**{name: value for module in modules for name, value in module.items()})


# ------------------------------------------------------------------------------------------------ rows in memory


class Rows(NamedTuple):
    """A tensor as a kernel takes it: from a pointer on a 16-byte boundary, `start` elements before the first row."""

    head: Tensor | None
    start: int = 0
    outer: int = 0
    row: int = 0


def _rows(tensor: Tensor | None, matrix: tuple[int, int, int, int] | None) -> Rows:
    if tensor is None or matrix is None:
        return Rows(None)
    address, _, outer, row = matrix
    start = address % 16 // tensor.element_size()
    if start == 0 or tensor.storage_offset() < start:  # memory of others may begin anywhere: then loads are narrower
        return Rows(tensor, 0, outer, row)
    return Rows(tensor.as_strided((1,), (1,), tensor.storage_offset() - start), start, outer, row)


def aligned(rows: Rows, frame: Rows, shape: Shape, group: int) -> bool:
    """Whether every row begins as far from a 16-byte boundary as the frame's: see kernels/tiles.py."""
    steps = [rows.start - frame.start]
    if shape[0] > 1:
        steps.append(rows.outer - frame.outer)
    if shape[1] > 1:
        steps.append(rows.row - frame.row)
    return rows.head is None or all(step % group == 0 for step in steps)


def arrange(*tensors: Tensor | None) -> tuple[Shape, list[Rows]]:
    shape, matrices = geometry(*tensors)
    return shape, [_rows(t, m) for t, m in zip(tensors, matrices, strict=True)]


def group_for(*tensors: Tensor | None) -> int:
    return all_kernels().group_of(*(t.element_size() for t in tensors if t is not None))


def like_rows(values: Tensor) -> Tensor:
    """Room for a gradient or another output of the values' shape."""
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def room(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Room for losses and weights: float32, on the device."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def each_row(kernel: Any, like: Tensor, shape: Shape, *args: Any, **constants: Any) -> None:
    """One program for each row, on the tensor's device and its current stream."""
    by_rows(kernel, like, shape[0] * shape[1], *args, **constants, **all_kernels().options_for_rows(shape[2], WAVE))


def by_rows(kernel: Any, like: Tensor, rows: int, *args: Any, **constants: Any) -> None:
    """The same, with launch options among the constants."""
    if rows:
        with on_device_of(like):
            kernel[(rows,)](*args, **constants)


def once(kernel: Any, like: Tensor, *args: Any, **constants: Any) -> None:
    """One program for all rows."""
    with on_device_of(like):
        kernel[(1,)](*args, **constants, **all_kernels().options_for_vectors(WAVE))


# ------------------------------------------------------------------------------------------------ scalars


def scalar(quantity: Scalar) -> Scalar:
    """A number in float, or a tensor as it is: the kernel reads it."""
    return quantity if isinstance(quantity, Tensor) else float(quantity)


def off(weight: Scalar) -> bool:
    """Whether a weight is known to be 0 before any tensor is read."""
    return not isinstance(weight, Tensor) and weight == 0.0


def temperature_of(temperature: Scalar) -> tuple[Scalar, bool]:
    """The temperature, and whether it is one per row."""
    if isinstance(temperature, Tensor) and temperature.dim():
        return temperature.contiguous(), True
    return scalar(temperature), False


def vector(entries: Tensor | None) -> Tensor | None:
    """One entry a row, of any dtype: the kernel converts."""
    return None if entries is None else entries.contiguous()


# ------------------------------------------------------------------------------------------------ weights


class Weighing(NamedTuple):
    """What the prologue makes: five numbers a row, the gradient's unit (None: it is 1), and the fault record."""

    weights: Tensor
    unit: Tensor | None
    fault: Tensor


def weigh(
    shape: Shape,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: Scalar,
    upstream: Tensor | None,
    weights: tuple[Scalar, Scalar],
    counts: tuple[Scalar, Scalar],
    *,
    like: Tensor,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    soft: bool = True,
    mean: bool,
    t_squared: bool = False,
    in_units: bool = False,
) -> Weighing:
    """The prologue's launch. soft: whether there is a soft term; in_units: whether the gradient has a unit."""
    rows = shape[0] * shape[1]
    temperature, per_row = temperature_of(temperature)
    made = Weighing(
        room(like, (5, rows)),
        room(like, ()) if in_units else None,
        torch.empty(3, dtype=torch.float64, device=like.device),
    )
    above = None if upstream is None else upstream.expand(like.shape[:-1])
    vectors = labels, vector(mask), vector(class_weights), temperature, vector(above)
    numbers = (*map(scalar, (*weights, *counts)), ignore_index, rows, shape[2])
    constants = {"SOFT": soft, "PER_ROW": per_row, "MEAN": mean, "T_SQUARED": t_squared}
    once(all_kernels().prologue_kernel, like, *vectors, *numbers, *made, **constants)
    return made


def reduce(
    soft_rows: Tensor,
    hard_rows: Tensor | None,
    weights: tuple[Scalar, Scalar],
    loss: Tensor,
    soft: Tensor,
    hard: Tensor | None,
    sizes: Tensor | None = None,
    unit: Tensor | None = None,
) -> None:
    """The sums of the rows' values, the loss, and the unit for gradients of these sizes."""
    rows = soft_rows.numel()
    made = loss, soft, hard, sizes, unit
    once(all_kernels().reduction_kernel, loss, soft_rows, hard_rows, *map(scalar, weights), rows, *made)
