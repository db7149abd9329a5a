"""The C++ core, from tensors to pointers: shapes and strides for csrc/core.h, outputs, and faults turned into errors.

Each function computes exactly one op of ops.py, from arguments that functional.py has checked. It knows nothing of
autograd, and no formula. Next: csrc/core.h.
"""

from __future__ import annotations

import math
from typing import Any

import torch  # before _C: torch's OpenMP runtime must be the one that both share
from torch import Tensor

from distil_fast import _C
from distil_fast.backends.buffers import empty_like_rows
from distil_fast.backends.layout import (
    PAIR_CODE,
    REDUCTION_CODE,
    address,
    check_inplace,
    cut,
    cut_gradient,
    flat,
    geometry,
    raise_fault,
    real_dtype,
    topk_tolerance,
)
from distil_fast.backends.settings import TAILS, TEACHER_FORMS, RowSettings

DIVERGENCE_CODE = {name: code for code, name in enumerate(_C.DIVERGENCES)}


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
            return flat(temperature, real), 1.0
        temperature = float(temperature)
    return None, temperature


def available(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether this backend serves such tensors, and why."""
    if device.type in ("cpu", "meta"):
        return True, f"the C++ core, compiled for and running on {_C.instruction_set()}"
    return False, f"the C++ core serves CPUs, not {device.type}"


# ------------------------------------------------------------------------------------------------ the ops


def row_settings(settings: RowSettings) -> tuple[Any, ...]:
    """Settings as the core takes them."""
    ignore_index, divergence, parameters, t_squared, smoothing, z_loss, form, transforms, _, reduction, _ = settings
    codes = DIVERGENCE_CODE[divergence], TEACHER_FORMS.index(form), REDUCTION_CODE[reduction]
    return ignore_index, codes[0], parameters, t_squared, smoothing, z_loss, codes[1], transforms, codes[2]


def row_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    soft_mask: Tensor | None,
    class_weights: Tensor | None,
    temperature: float | Tensor,
    soft_weight: float | Tensor,
    hard_weight: float | Tensor,
    soft_count: float | Tensor,
    hard_count: float | Tensor,
    settings: RowSettings,
    *,
    gradient: str = "no",
    upstream: Tensor | None = None,
    topk: tuple[int, int, int, float, int, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """Loss, its two terms, the student's gradient and the unit that it is stored in (fp16; else 1).

    A count of -1 is counted here. gradient: "no", "fresh", or "inplace", which leaves it where the logits were;
    `upstream` multiplies each row's. topk: the top-k teacher as the core takes it (`topk_loss`).
    """
    real = real_dtype(student)
    if gradient == "inplace":
        check_inplace(student, teacher)
    grad = None if gradient == "no" else student if gradient == "inplace" else empty_like_rows(student)
    shape, (student_m, teacher_m, grad_m) = geometry(*cut(settings.vocab_size, student, teacher, grad))
    labels = flat(labels, torch.int64)
    mask_is_bool = soft_mask is not None and soft_mask.dtype == torch.bool
    soft_mask = flat(soft_mask, torch.bool if mask_is_bool else real)
    class_weights = flat(class_weights, real)
    temperatures, temperature = _temperature(temperature, real)
    if upstream is not None:
        upstream = flat(upstream.expand(student.shape[:-1]), real)
    leading = student.shape[:-1] if settings.reduction == "none" else ()
    loss = torch.empty(leading, dtype=real)
    soft, hard = torch.empty_like(loss), torch.empty_like(loss)
    *fault, unit = _C.row_loss(
        shape,
        student_m,
        teacher_m,
        grad_m,
        address(labels),
        address(soft_mask),
        mask_is_bool,
        address(class_weights),
        address(temperatures),
        temperature,
        _number("soft_weight", soft_weight),
        _number("hard_weight", hard_weight),
        _number("soft_count", soft_count),
        _number("hard_count", hard_count),
        row_settings(settings),
        address(upstream),
        loss.data_ptr(),
        soft.data_ptr(),
        hard.data_ptr(),
        topk,
    )
    if fault[0]:
        raise_fault(fault, cols=shape[2])
    cut_gradient(settings.vocab_size, grad)  # in place, an error leaves the logits whole
    return loss, soft, hard, grad, unit


def topk_loss(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    soft_mask: Tensor | None,
    class_weights: Tensor | None,
    temperature: float | Tensor,
    soft_weight: float | Tensor,
    hard_weight: float | Tensor,
    soft_count: float | Tensor,
    hard_count: float | Tensor,
    settings: RowSettings,
    shift: float,
    tail: str,
    *,
    gradient: str = "no",
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """`row_loss` with a teacher of k columns a row; shift: the divergence's."""
    rows = labels, soft_mask, class_weights
    scalars = temperature, soft_weight, hard_weight, soft_count, hard_count
    tolerance = topk_tolerance(log_probs)
    ids, log_probs = flat(ids, torch.int64), flat(log_probs, real_dtype(student))
    topk = ids.shape[-1], address(ids), address(log_probs), tolerance, TAILS.index(tail), shift
    return row_loss(student, None, *rows, *scalars, settings, gradient=gradient, upstream=upstream, topk=topk)


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
    *fault, _ = _C.softmax(shape, logits_m, out_m, logarithm, address(temperatures), number)
    if fault[0]:
        raise_fault(fault, cols=shape[2])
    return out


def softmax_backward(out: Tensor, grad_out: Tensor, temperature: float | Tensor, logarithm: bool) -> Tensor:
    """The logits' gradient from the output and its gradient."""
    temperatures, number = _temperature(temperature, real_dtype(out))
    grad = empty_like_rows(out)
    grad_out = grad_out.contiguous()  # upstream gradients come with any strides
    shape, (out_m, grad_out_m, grad_m) = geometry(out, grad_out, grad)
    _C.softmax_backward(shape, out_m, grad_out_m, grad_m, logarithm, address(temperatures), number)
    return grad


def pair_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    weight: float | Tensor,
    count: float | Tensor,
    kind: str,
    scale: float,
    reduction: str,
    *,
    gradient: bool = False,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Weighted loss, the term before its weight, the student's gradient and the unit that it is stored in.

    kind: what csrc/core.h compares two rows by; scale: of a row's value, in (0, 1].
    """
    real = real_dtype(student)
    grad = empty_like_rows(student) if gradient else None
    shape, (student_m, teacher_m, grad_m) = geometry(student, teacher, grad)
    mask_is_bool = mask is not None and mask.dtype == torch.bool
    mask = flat(mask, torch.bool if mask_is_bool else real)
    if upstream is not None:
        upstream = flat(upstream.expand(student.shape[:-1]), real)
    loss, term = (torch.empty(student.shape[:-1] if reduction == "none" else (), dtype=real) for _ in range(2))
    *fault, unit = _C.pair_loss(
        shape,
        student_m,
        teacher_m,
        grad_m,
        address(mask),
        mask_is_bool,
        PAIR_CODE[kind],
        scale,
        _number("weight", weight),
        _number("count", count),
        REDUCTION_CODE[reduction],
        address(upstream),
        loss.data_ptr(),
        term.data_ptr(),
    )
    if fault[0]:
        raise_fault(fault, cols=shape[2], mask_name="mask")
    return loss, term, grad, unit
