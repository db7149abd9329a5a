"""The C++ core, from tensors to pointers: shapes and strides for csrc/core.h, outputs, and faults turned into errors.

Each function computes exactly one op of ops.py, from arguments that functional.py has checked. It knows nothing of
autograd, and no formula. Next: csrc/core.h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch  # before _C: torch's OpenMP runtime must be the one that both share
from torch import Tensor

from distil_fast import _C
from distil_fast.backends.buffers import empty_like_rows

DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
REDUCTION_CODE = {"mean": 0, "sum": 1, "none": 2}
DIVERGENCE_CODE = {name: code for code, name in enumerate(_C.DIVERGENCES)}
LABEL, MASK, TEMPERATURE = 1, 2, 3  # FaultKind

Shape = tuple[int, int, int]
Matrix = tuple[int, int, int, int]


def real_dtype(values: Tensor) -> torch.dtype:
    """The dtype of losses, weights and temperatures beside such values."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------ tensors to pointers


def geometry(*tensors: Tensor | None) -> tuple[Shape, list[Any]]:
    """All tensors of one shape [..., size] as [outer, inner, size] with their strides, without a copy.

    Raises:
        ValueError: a last dimension with gaps, or leading dimensions that two strides cannot describe.
    """
    given = [t for t in tensors if t is not None]
    shape = given[0].shape
    cols = shape[-1]
    for tensor in given:
        if tensor.stride(-1) != 1 and cols > 1 and tensor.numel():
            raise ValueError(
                f"expected rows that are contiguous in memory, got a tensor of shape {tuple(tensor.shape)} with "
                f"strides {tensor.stride()}. Call .contiguous() on it, or undo the transposition that made it."
            )
    if len(shape) == 2:
        return (1, shape[0], cols), [t if t is None else _matrix(t, 0, t.stride(0)) for t in tensors]
    if len(shape) == 3:
        return (shape[0], shape[1], cols), [t if t is None else _matrix(t, t.stride(0), t.stride(1)) for t in tensors]
    leading = len(shape) - 1
    for split in range(leading or 1):
        strides = {id(t): (_merged(t, 0, split), _merged(t, split, leading)) for t in given}
        if not any(None in pair for pair in strides.values()):
            sizes = shape[:split].numel(), shape[split:-1].numel(), cols
            return sizes, [t if t is None else _matrix(t, *strides[id(t)]) for t in tensors]
    raise ValueError(
        f"expected at most two leading dimensions with strides of their own, got shape {tuple(shape)} with strides "
        f"{' and '.join(str(t.stride()) for t in given)}. Call .contiguous() on the permuted tensor."
    )


def _matrix(tensor: Tensor, outer_stride: int | None, row_stride: int | None) -> Matrix:
    assert outer_stride is not None
    assert row_stride is not None
    return tensor.data_ptr(), DTYPE_CODE[tensor.dtype], outer_stride, row_stride


def _merged(tensor: Tensor, start: int, stop: int) -> int | None:
    """The one stride that walks through dimensions [start, stop), None if there is none."""
    stride, size = 0, 1
    for d in range(stop - 1, start - 1, -1):
        if tensor.shape[d] == 1:
            continue
        if size == 1:
            stride = tensor.stride(d)
        elif tensor.stride(d) != stride * size:
            return None
        size *= tensor.shape[d]
    return stride


def _flat(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One entry per row, contiguous, for a pointer that the caller must keep alive."""
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _number(name: str, quantity: float | Tensor) -> float:
    """The value of a scalar. A number has been checked already; a tensor's value is seen here for the first time."""
    if not isinstance(quantity, Tensor):
        return quantity
    value = float(quantity)
    if not math.isfinite(value) or (name.endswith("count") and value < 0):
        expected = "a finite number >= 0" if name.endswith("count") else "a finite number"
        raise ValueError(f"{name}: expected {expected}, got {value}.")
    return value


def _temperature(temperature: float | Tensor, real: torch.dtype) -> tuple[Tensor | None, float]:
    """Per-row temperatures, or one number for all."""
    if isinstance(temperature, Tensor):
        if temperature.dim():
            return _flat(temperature, real), 1.0
        temperature = float(temperature)
    return None, temperature


def _raise(fault: Sequence[float], *, cols: int, mask_name: str = "soft_mask") -> None:
    kind, row, value = fault
    if kind == LABEL:
        raise ValueError(
            f"labels: expected 0 <= label < {cols} or ignore_index, got {int(value)} in row {int(row)}. "
            "Mark rows without a label with ignore_index."
        )
    if kind == MASK:
        raise ValueError(f"{mask_name}: expected finite token weights >= 0, got {value} in row {int(row)}.")
    raise ValueError(f"temperature: expected a number > 0 (1e-15 to 1e15), got {value} in row {int(row)}.")


# ------------------------------------------------------------------------------------------------ the ops


def row_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    soft_mask: Tensor | None,
    temperature: float | Tensor,
    soft_weight: float | Tensor,
    hard_weight: float | Tensor,
    soft_count: float | Tensor,
    hard_count: float | Tensor,
    ignore_index: int,
    divergence: str,
    parameter: float,
    t_squared: bool,
    label_smoothing: float,
    reduction: str,
    *,
    gradient: str = "no",
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """Loss, its two terms, the student's gradient and the unit that it is stored in (fp16; else 1).

    A count of -1 is counted here. gradient: "no", "fresh", or "inplace", which leaves it where the logits were;
    `upstream` multiplies each row's.
    """
    real = real_dtype(student)
    grad = None if gradient == "no" else student if gradient == "inplace" else empty_like_rows(student)
    shape, (student_m, teacher_m, grad_m) = geometry(student, teacher, grad)
    if gradient == "inplace":
        check_inplace(student, teacher)
    labels = _flat(labels, torch.int64)
    mask_is_bool = soft_mask is not None and soft_mask.dtype == torch.bool
    soft_mask = _flat(soft_mask, torch.bool if mask_is_bool else real)
    temperatures, temperature = _temperature(temperature, real)
    if upstream is not None:
        upstream = _flat(upstream.expand(student.shape[:-1]), real)
    leading = student.shape[:-1] if reduction == "none" else ()
    loss = torch.empty(leading, dtype=real)
    soft = torch.empty(leading, dtype=real)
    hard = torch.empty(leading, dtype=real)
    *fault, unit = _C.row_loss(
        shape,
        student_m,
        teacher_m,
        grad_m,
        _address(labels),
        ignore_index,
        _address(soft_mask),
        mask_is_bool,
        _address(temperatures),
        temperature,
        _number("soft_weight", soft_weight),
        _number("hard_weight", hard_weight),
        _number("soft_count", soft_count),
        _number("hard_count", hard_count),
        t_squared,
        REDUCTION_CODE[reduction],
        label_smoothing,
        DIVERGENCE_CODE[divergence],
        parameter,
        _address(upstream),
        loss.data_ptr(),
        soft.data_ptr(),
        hard.data_ptr(),
    )
    if fault[0]:
        _raise(fault, cols=shape[2])
    return loss, soft, hard, grad, unit


def check_inplace(student: Tensor, teacher: Tensor | None) -> None:
    """A gradient in the place of the logits needs rows that share no memory, with each other or with the teacher's.

    Raises:
        ValueError: they do.
    """
    steps = sorted((stride, size) for stride, size in zip(student.stride(), student.shape, strict=True) if size > 1)
    reach = 1
    for stride, size in steps:
        if stride < reach:
            raise ValueError(
                f"inplace: expected rows of their own memory, got shape {tuple(student.shape)} with strides "
                f"{student.stride()}. Use inplace=False."
            )
        reach = stride * size
    if teacher is None or teacher.untyped_storage().data_ptr() != student.untyped_storage().data_ptr():
        return
    same = (teacher.data_ptr(), teacher.dtype, teacher.stride()) == (
        student.data_ptr(),
        student.dtype,
        student.stride(),
    )
    start = max(student.data_ptr(), teacher.data_ptr())
    end = min(t.data_ptr() + t.element_size() * _span(t) for t in (student, teacher))
    if not same and start < end:
        raise ValueError(
            "inplace: expected teacher_logits in memory of its own, got memory that the gradient would overwrite. "
            "Use inplace=False."
        )


def _span(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def rescale(grad: Tensor, grad_output: Tensor, unit: float) -> None:
    """grad *= grad_output * unit, in place; nothing is touched where the product is 1."""
    factor = grad_output.item() * unit
    if factor != 1.0:
        shape, (grad_m,) = geometry(grad)
        _C.rescale(shape, grad_m, factor)


def softmax(logits: Tensor, temperature: float | Tensor, logarithm: bool) -> Tensor:
    """softmax(logits / temperature), or its logarithm, in the logits' dtype."""
    temperatures, number = _temperature(temperature, real_dtype(logits))
    out = empty_like_rows(logits)
    shape, (logits_m, out_m) = geometry(logits, out)
    *fault, _ = _C.softmax(shape, logits_m, out_m, logarithm, _address(temperatures), number)
    if fault[0]:
        _raise(fault, cols=shape[2])
    return out


def softmax_backward(out: Tensor, grad_out: Tensor, temperature: float | Tensor, logarithm: bool) -> Tensor:
    """The logits' gradient from the output and its gradient."""
    temperatures, number = _temperature(temperature, real_dtype(out))
    grad = empty_like_rows(out)
    grad_out = grad_out.contiguous()  # upstream gradients come with any strides
    shape, (out_m, grad_out_m, grad_m) = geometry(out, grad_out, grad)
    _C.softmax_backward(shape, out_m, grad_out_m, grad_m, logarithm, _address(temperatures), number)
    return grad


def cosine_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    weight: float | Tensor,
    count: float | Tensor,
    reduction: str,
    *,
    gradient: bool = False,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Weighted loss, the term before its weight, the student's gradient and the unit that it is stored in."""
    real = real_dtype(student)
    grad = empty_like_rows(student) if gradient else None
    shape, (student_m, teacher_m, grad_m) = geometry(student, teacher, grad)
    mask_is_bool = mask is not None and mask.dtype == torch.bool
    mask = _flat(mask, torch.bool if mask_is_bool else real)
    if upstream is not None:
        upstream = _flat(upstream.expand(student.shape[:-1]), real)
    loss, term = (torch.empty(student.shape[:-1] if reduction == "none" else (), dtype=real) for _ in range(2))
    *fault, unit = _C.cosine_loss(
        shape,
        student_m,
        teacher_m,
        grad_m,
        _address(mask),
        mask_is_bool,
        _number("weight", weight),
        _number("count", count),
        REDUCTION_CODE[reduction],
        _address(upstream),
        loss.data_ptr(),
        term.data_ptr(),
    )
    if fault[0]:
        _raise(fault, cols=shape[2], mask_name="mask")
    return loss, term, grad, unit
