"""What every kernel backend needs of a tensor: its shape and strides as rows, its dtype's code, and faults as errors.

It knows nothing of what is computed, or of the device. Next: native.py, triton.py and cuda.py, which compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
REDUCTION_CODE = {"mean": 0, "sum": 1, "none": 2}
PAIR_CODE = {"cosine": 0, "squared": 1, "kl": 2}  # PairKind
PAIR_UNIT = 64.0  # pair_unit
LABEL, MASK, TEMPERATURE, CLASS_WEIGHT, TEACHER_MASS, TOPK_ID, TOPK_LOG_PROB = 1, 2, 3, 4, 5, 6, 7  # FaultKind

Shape = tuple[int, int, int]
Matrix = tuple[int, int, int, int]


def real_dtype(values: Tensor) -> torch.dtype:
    """The dtype of losses, weights and temperatures beside such values."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def geometry(*tensors: Tensor | None) -> tuple[Shape, list[Any]]:
    """All tensors of one shape [..., size] as [outer, inner, size] with their strides, without a copy.

    Raises:
        ValueError: a last dimension with gaps, or leading dimensions that two strides cannot describe.
    """
    given = [t for t in tensors if t is not None]
    shape = given[0].shape
    cols = shape[-1]
    for tensor in given:
        if tensor.stride()[-1] != 1 and cols > 1 and tensor.numel():
            raise ValueError(
                f"expected rows that are contiguous in memory, got a tensor of shape {tuple(tensor.shape)} with "
                f"strides {tensor.stride()}. Call .contiguous() on it, or undo the transposition that made it."
            )
    if len(shape) == 2:
        return (1, shape[0], cols), [t if t is None else _matrix(t, 0, t.stride()[0]) for t in tensors]
    if len(shape) == 3:
        return (shape[0], shape[1], cols), [t if t is None else _matrix(t, *t.stride()[:2]) for t in tensors]
    leading = len(shape) - 1
    for split in range(leading or 1):
        strides = {id(t): (_merged(t, 0, split), _merged(t, split, leading)) for t in given}
        if not any(None in pair for pair in strides.values()):
            sizes = shape[:split].numel(), shape[split:-1].numel(), cols
            return sizes, [t if t is None else _matrix(t, *strides[id(t)]) for t in tensors]  # type: ignore[arg-type]
    raise ValueError(
        f"expected at most two leading dimensions with strides of their own, got shape {tuple(shape)} with strides "
        f"{' and '.join(str(t.stride()) for t in given)}. Call .contiguous() on the permuted tensor."
    )


def cut(vocab_size: int, *tensors: Tensor | None) -> list[Any]:
    """The columns that take part: the first `vocab_size` of each tensor, all where that is 0."""
    return [t if t is None else t[..., :vocab_size] for t in tensors] if vocab_size else list(tensors)


def cut_gradient(vocab_size: int, grad: Tensor | None) -> Tensor | None:
    """The part of the gradient's memory that a kernel writes; the columns that take no part become 0 here."""
    if grad is None or not vocab_size:
        return grad
    grad[..., vocab_size:].zero_()
    return grad[..., :vocab_size]


def _matrix(tensor: Tensor, outer_stride: int, row_stride: int) -> Matrix:
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


@overload
def flat(tensor: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def flat(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def flat(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One entry per row, contiguous, for a pointer that the caller must keep alive."""
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def topk_tolerance(log_probs: Tensor) -> float:
    """What rounding may add to a top-k teacher's log-probabilities, and to the sum of its probabilities."""
    return {torch.bfloat16: 5e-2, torch.float16: 1e-2}.get(log_probs.dtype, 1e-3)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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


def raise_fault(fault: Sequence[float], *, cols: int, mask_name: str = "soft_mask") -> None:
    kind, row, value = fault
    if kind == LABEL:
        raise ValueError(
            f"labels: expected 0 <= label < {cols} or ignore_index, got {int(value)} in row {int(row)}. "
            "Mark rows without a label with ignore_index."
        )
    if kind == MASK:
        raise ValueError(f"{mask_name}: expected finite token weights >= 0, got {value} in row {int(row)}.")
    if kind == CLASS_WEIGHT:
        raise ValueError(f"class_weights: expected finite weights >= 0, got {value} for class {int(row)}.")
    if kind == TEACHER_MASS:
        raise ValueError(
            f"teacher_logits: expected probabilities >= 0 (or their logarithms) that sum to at most 1, got a sum of "
            f"{value} in row {int(row)}. Pass logits as a plain tensor."
        )
    if kind == TOPK_ID:
        twice = 0 <= value < cols
        raise ValueError(
            f"TopK.ids: expected different columns 0 <= id < {cols} in each row, or -1 for no entry, got {int(value)}"
            f"{' twice' if twice else ''} in row {int(row)}. Pad rows of fewer entries with -1."
        )
    if kind == TOPK_LOG_PROB:
        raise ValueError(
            f"TopK.log_probs: expected log-probabilities <= 0 of the whole distribution at temperature T, got {value} "
            f"in row {int(row)}. TopK.from_logits makes them from logits."
        )
    raise ValueError(f"temperature: expected a number > 0 (1e-15 to 1e15), got {value} in row {int(row)}.")
