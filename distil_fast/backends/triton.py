"""The Triton kernels, from tensors to launches: rows and their alignment, outputs, scalars that stay on the device.

Each function computes exactly one op of ops.py, from arguments that functional.py has checked, without waiting for the
device, except in the checking mode. It knows nothing of autograd, and no formula. Next: kernels/rows.py.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distil_fast.backends.gpu import DTYPES, check_temperature, on_device_of, raise_if_checking
from distil_fast.backends.layout import PAIR_UNIT, Shape, check_inplace, cut, cut_gradient, geometry
from distil_fast.backends.settings import RowSettings

WAVE = 64 if torch.version.hip else 32  # threads that run in step; AMD's data-centre GPUs have 64

Scalar = float | Tensor


def available(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether this backend serves such tensors, and why."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed; pip install triton"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return False, f"Triton serves GPUs, not {device.type}"
    if dtype not in DTYPES:
        return False, f"Triton kernels serve float32, float16 and bfloat16, not {dtype}"
    return True, "the Triton kernels" + (", in the interpreter: slow, for tests" if device.type == "cpu" else "")


@functools.cache
def _kernels() -> SimpleNamespace:
    """The kernels and their launch shapes: not imported before they are needed, because Triton is not, either."""
    names = "cosine", "divergences", "launch", "pairs", "prologue", "reduction", "rescale", "rows", "softmax"
    modules = [vars(importlib.import_module(f"distil_fast.kernels.{name}")) for name in names]
    return SimpleNamespace(**{name: value for module in modules for name, value in module.items()})


# ------------------------------------------------------------------------------------------------ rows in memory


class _Rows(NamedTuple):
    """A tensor as a kernel takes it: from a pointer on a 16-byte boundary, `start` elements before the first row."""

    head: Tensor | None
    start: int = 0
    outer: int = 0
    row: int = 0


def _rows(tensor: Tensor | None, matrix: tuple[int, int, int, int] | None) -> _Rows:
    if tensor is None or matrix is None:
        return _Rows(None)
    address, _, outer, row = matrix
    start = address % 16 // tensor.element_size()
    if start == 0 or tensor.storage_offset() < start:  # memory of others may begin anywhere: then loads are narrower
        return _Rows(tensor, 0, outer, row)
    return _Rows(tensor.as_strided((1,), (1,), tensor.storage_offset() - start), start, outer, row)


def _aligned(rows: _Rows, frame: _Rows, shape: Shape, group: int) -> bool:
    """Whether every row begins as far from a 16-byte boundary as the frame's: see kernels/tiles.py."""
    steps = [rows.start - frame.start]
    if shape[0] > 1:
        steps.append(rows.outer - frame.outer)
    if shape[1] > 1:
        steps.append(rows.row - frame.row)
    return rows.head is None or all(step % group == 0 for step in steps)


def _arrange(*tensors: Tensor | None) -> tuple[Shape, list[_Rows]]:
    shape, matrices = geometry(*tensors)
    return shape, [_rows(t, m) for t, m in zip(tensors, matrices, strict=True)]


def _group(*tensors: Tensor | None) -> int:
    return _kernels().group_of(*(t.element_size() for t in tensors if t is not None))


def _like(values: Tensor) -> Tensor:
    """Room for a gradient or another output of the values' shape."""
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Room for losses and weights: float32, on the device."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _each_row(kernel: Any, like: Tensor, shape: Shape, *args: Any, **constants: Any) -> None:
    """One program for each row, on the tensor's device and its current stream."""
    if rows := shape[0] * shape[1]:
        with on_device_of(like):
            kernel[(rows,)](*args, **constants, **_kernels().options_for_rows(shape[2], WAVE))


def _once(kernel: Any, like: Tensor, *args: Any, **constants: Any) -> None:
    """One program for all rows."""
    with on_device_of(like):
        kernel[(1,)](*args, **constants, **_kernels().options_for_vectors(WAVE))


# ------------------------------------------------------------------------------------------------ scalars


def _scalar(quantity: Scalar) -> Scalar:
    """A number in float, or a tensor as it is: the kernel reads it."""
    return quantity if isinstance(quantity, Tensor) else float(quantity)


def _off(weight: Scalar) -> bool:
    """Whether a weight is known to be 0 before any tensor is read."""
    return not isinstance(weight, Tensor) and weight == 0.0


def _temperature(temperature: Scalar) -> tuple[Scalar, bool]:
    """The temperature, and whether it is one per row."""
    if isinstance(temperature, Tensor) and temperature.dim():
        return temperature.contiguous(), True
    return _scalar(temperature), False


def _vector(entries: Tensor | None) -> Tensor | None:
    """One entry a row, of any dtype: the kernel converts."""
    return None if entries is None else entries.contiguous()


# ------------------------------------------------------------------------------------------------ weights


class _Weighing(NamedTuple):
    """What the prologue makes: five numbers a row, the gradient's unit (None: it is 1), and the fault record."""

    weights: Tensor
    unit: Tensor | None
    fault: Tensor


def _weigh(
    shape: Shape,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: Scalar,
    upstream: Tensor | None,
    weights: tuple[Scalar, Scalar],
    counts: tuple[Scalar, Scalar],
    *,
    like: Tensor,
    ignore_index: int = -100,
    soft: bool = True,
    mean: bool,
    t_squared: bool = False,
    in_units: bool = False,
) -> _Weighing:
    """The prologue's launch. soft: whether there is a soft term; in_units: whether the gradient has a unit."""
    rows = shape[0] * shape[1]
    temperature, per_row = _temperature(temperature)
    made = _Weighing(
        _empty(like, (5, rows)),
        _empty(like, ()) if in_units else None,
        torch.empty(3, dtype=torch.float64, device=like.device),
    )
    above = None if upstream is None else upstream.expand(like.shape[:-1])
    vectors = labels, _vector(mask), temperature, _vector(above)
    numbers = (*map(_scalar, (*weights, *counts)), ignore_index, rows, shape[2])
    constants = {"SOFT": soft, "PER_ROW": per_row, "MEAN": mean, "T_SQUARED": t_squared}
    _once(_kernels().prologue_kernel, like, *vectors, *numbers, *made, **constants)
    return made


def _reduce(
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
    _once(_kernels().reduction_kernel, loss, soft_rows, hard_rows, *map(_scalar, weights), rows, *made)


# ------------------------------------------------------------------------------------------------ the ops


def row_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    soft_mask: Tensor | None,
    class_weights: Tensor | None,
    temperature: Scalar,
    soft_weight: Scalar,
    hard_weight: Scalar,
    soft_count: Scalar,
    hard_count: Scalar,
    settings: RowSettings,
    *,
    gradient: str = "no",
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Scalar]:
    """Loss, its two terms, the student's gradient and the unit that it is stored in (fp16: a tensor; else 1).

    A count of -1 is counted on the device. gradient: "no", "fresh", or "inplace", which leaves it where the logits
    were; `upstream` multiplies each row's.
    """
    teacher = None if _off(soft_weight) else teacher
    labels = None if _off(hard_weight) else _vector(labels)
    student = student.detach()
    if gradient == "inplace":
        check_inplace(student, teacher)
    grad = None if gradient == "no" else student if gradient == "inplace" else _like(student)
    part = cut(settings.vocab_size, student, teacher)
    shape, (s, t, g) = _arrange(*part, cut_gradient(settings.vocab_size, grad))
    weights = soft_weight, hard_weight
    weighing = _weigh(
        shape,
        labels,
        soft_mask,
        temperature,
        upstream,
        weights,
        (soft_count, hard_count),
        like=student,
        ignore_index=settings.ignore_index,
        soft=teacher is not None,
        mean=settings.reduction == "mean",
        t_squared=settings.t_squared,
        in_units=grad is not None and student.dtype == torch.float16 and upstream is None,
    )
    raise_if_checking(weighing.fault, shape[2], "soft_mask")
    each, rows = settings.reduction == "none", shape[0] * shape[1]
    loss, soft, hard = (_empty(student, student.shape[:-1] if each else ()) for _ in range(3))
    soft_rows, hard_rows = (soft, hard) if each else _empty(student, (2, rows)).unbind()
    vectors = labels, weighing.weights, rows, weighing.unit
    numbers = (*map(_scalar, weights), float(settings.label_smoothing), float(settings.parameters[0]))
    values = loss if each else None, soft_rows, hard_rows
    constants = _row_constants(shape, (s, t, g), settings.divergence, labels is not None)
    _each_row(_kernels().row_kernel, student, shape, *s, *t, *g, *shape[1:], *vectors, *numbers, *values, **constants)
    if not each:
        _reduce(soft_rows, hard_rows, weights, loss, soft, hard)
    return loss, soft, hard, grad, 1.0 if weighing.unit is None else weighing.unit


def _row_constants(shape: Shape, tensors: tuple[_Rows, _Rows, _Rows], divergence: str, hard: bool) -> dict[str, Any]:
    """What the row kernel is compiled for."""
    kernels = _kernels()
    s, t, g = tensors
    frame, group = s if g.head is None else g, _group(s.head, t.head)
    return {
        "DIVERGENCE": kernels.DIVERGENCES[divergence],
        "CENTRED": divergence in kernels.CENTRED,
        "EXACT": all(x.head is None or x.head.itemsize == 2 for x in (s, t)),
        "SOFT": t.head is not None,
        "HARD": hard,
        "VEC": group,
        "ALIGNED_S": _aligned(s, frame, shape, group),
        "ALIGNED_T": _aligned(t, frame, shape, group),
        **kernels.register_bound(WAVE),
    }


def rescale(grad: Tensor, grad_output: Tensor, unit: Scalar) -> None:
    """grad *= grad_output * unit, in place; nothing is touched where the product, which the device knows, is 1."""
    shape, (g,) = _arrange(grad)
    factors = grad_output, _scalar(unit)
    _each_row(_kernels().rescale_kernel, grad, shape, *g, *shape[1:], *factors, VEC=_group(grad))


def softmax(logits: Tensor, temperature: Scalar, logarithm: bool) -> Tensor:
    """softmax(logits / temperature), or its logarithm, in the logits' dtype."""
    out = _like(logits)
    shape, (x, y) = _arrange(logits.detach(), out)
    check_temperature(temperature, shape[2])
    number, per_row = _temperature(temperature)
    group = _group(logits)
    constants = {"PER_ROW": per_row, "LOGARITHM": logarithm, "VEC": group, "ALIGNED": _aligned(x, y, shape, group)}
    _each_row(_kernels().softmax_kernel, logits, shape, *x, *y, *shape[1:], number, **constants)
    return out


def softmax_backward(out: Tensor, grad_out: Tensor, temperature: Scalar, logarithm: bool) -> Tensor:
    """The logits' gradient from the output and its gradient."""
    grad = _like(out)
    shape, (y, u, x) = _arrange(out, grad_out.contiguous(), grad)  # upstream gradients come with any strides
    number, per_row = _temperature(temperature)
    group = _group(out, grad_out)
    aligned = {"ALIGNED_Y": _aligned(y, x, shape, group), "ALIGNED_U": _aligned(u, x, shape, group)}
    constants = {"PER_ROW": per_row, "LOGARITHM": logarithm, "VEC": group, **aligned}
    _each_row(_kernels().softmax_backward_kernel, out, shape, *y, *u, *x, *shape[1:], number, **constants)
    return grad


def pair_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    weight: Scalar,
    count: Scalar,
    kind: str,
    scale: float,
    reduction: str,
    *,
    gradient: bool = False,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Scalar]:
    """Weighted loss, the term before its weight, the student's gradient and the unit that it is stored in.

    kind: what csrc/core.h compares two rows by; scale: of a row's value, in (0, 1]. The unit of the cosine's reduced
    fp16 gradient depends on the norms of all rows: there the gradient is a launch of its own.
    """
    student = student.detach()
    grad = _like(student) if gradient else None
    shape, (s, t, g) = _arrange(student, teacher, grad)
    each = reduction == "none"
    in_units = grad is not None and student.dtype == torch.float16 and upstream is None and not each
    weights, unit, fault = _weigh(
        shape,
        None,
        mask,
        1.0 / (PAIR_UNIT * scale),  # what a gradient is divided by
        upstream,
        (weight, 0.0),
        (count, -1.0),
        like=student,
        mean=reduction == "mean",
        in_units=in_units and kind != "cosine",
    )
    raise_if_checking(fault, shape[2], "mask")
    loss, term = (_empty(student, student.shape[:-1] if each else ()) for _ in range(2))
    launch = functools.partial(_pair_rows, student, shape, (s, t), weights, weight, kind, scale)
    if each:
        launch(g, loss=loss, term=term)
        return loss, term, grad, 1.0
    parts = _empty(student, (shape[0] * shape[1],))
    if in_units and kind == "cosine":
        sizes, unit = torch.empty_like(parts), _empty(student, ())
        launch(_Rows(None), term=parts, sizes=sizes)
        _reduce(parts, None, (weight, 0.0), loss, term, None, sizes, unit)
        launch(g, unit=unit)
    else:
        launch(g, unit=unit, term=parts)
        _reduce(parts, None, (weight, 0.0), loss, term, None)
    return loss, term, grad, 1.0 if unit is None else unit


def _pair_rows(
    student: Tensor,
    shape: Shape,
    pair: tuple[_Rows, _Rows],
    weights: Tensor,
    weight: Scalar,
    kind: str,
    scale: float,
    g: _Rows,
    *,
    unit: Tensor | None = None,
    loss: Tensor | None = None,
    term: Tensor | None = None,
    sizes: Tensor | None = None,
) -> None:
    """One launch over the rows: values, gradient, or both."""
    s, t = pair
    kernels, frame, group = _kernels(), s if g.head is None else g, _group(s.head, t.head)
    aligned = {"ALIGNED_S": _aligned(s, frame, shape, group), "ALIGNED_T": _aligned(t, frame, shape, group)}
    given = (*s, *t, *g, *shape[1:], weights, shape[0] * shape[1], unit, _scalar(weight))
    if kind == "cosine":
        _each_row(kernels.cosine_kernel, student, shape, *given, loss, term, sizes, VEC=group, **aligned)
    else:
        constants = {"PAIR": kernels.PAIRS[kind], "FIRST": kind in kernels.HAVE_FIRST, "VEC": group, **aligned}
        bound = kernels.register_bound(WAVE)
        _each_row(kernels.entries_kernel, student, shape, *given, scale, loss, term, **constants, **bound)
