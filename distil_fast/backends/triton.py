"""The Triton kernels, from tensors to launches: what each op allocates, compiles for and launches.

Each function computes exactly one op of ops.py, from arguments that functional.py has checked, without waiting for the
device, except in the checking mode. It knows nothing of autograd, and no formula. Next: triton_launch.py, for what ops
share; kernels/rows.py.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distil_fast import backends
from distil_fast.backends import triton_launch
from distil_fast.backends.gpu import DTYPES, check_temperature, raise_if_checking
from distil_fast.backends.layout import PAIR_UNIT, Shape, check_inplace, cut, cut_gradient, raise_fault
from distil_fast.backends.settings import LOG_PROBS, LOGITS, TAILS, RowSettings
from distil_fast.backends.triton_launch import (
    Rows,
    Scalar,
    Weighing,
    aligned,
    all_kernels,
    arrange,
    by_rows,
    each_row,
    group_for,
    like_rows,
    off,
    reduce,
    room,
    scalar,
    temperature_of,
    vector,
    weigh,
)


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


# ------------------------------------------------------------------------------------------------ the ops


class _Call(NamedTuple):
    """A loss over rows of logits between its prologue and its reduction."""

    shape: Shape
    rows: tuple[Rows, Rows, Rows]  # student, teacher, gradient
    labels: Tensor | None
    weights: tuple[Scalar, Scalar]
    weighing: Weighing
    grad: Tensor | None
    totals: tuple[Tensor, Tensor, Tensor]  # loss, soft, hard
    parts: tuple[Tensor | None, Tensor, Tensor]  # of each row; of the loss where nothing is reduced

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Scalar]:
        """What a loss returns, after its rows' kernel."""
        if self.parts[0] is None:
            reduce(*self.parts[1:], self.weights, *self.totals)
        return *self.totals, self.grad, 1.0 if self.weighing.unit is None else self.weighing.unit


def _begin(
    student: Tensor,
    teacher: Tensor | None,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None],
    scalars: tuple[Scalar, Scalar, Scalar, Scalar, Scalar],
    settings: RowSettings,
    gradient: str,
    upstream: Tensor | None,
    *,
    has_soft: bool,
) -> _Call:
    """Outputs and row weights. vectors: labels, soft mask, class weights; scalars: temperature, weights, counts."""
    labels, soft_mask, class_weights = vectors
    temperature, soft_weight, hard_weight, *counts = scalars
    labels = None if off(hard_weight) else vector(labels)
    if gradient == "inplace":
        check_inplace(student, teacher)
    grad = None if gradient == "no" else student if gradient == "inplace" else like_rows(student)
    part = cut(settings.vocab_size, student, teacher)
    shape, (s, t, g) = arrange(*part, cut_gradient(settings.vocab_size, grad))
    weights = soft_weight, hard_weight
    weighing = weigh(
        shape,
        labels,
        soft_mask,
        temperature,
        upstream,
        weights,
        (counts[0], counts[1]),
        like=student,
        class_weights=None if labels is None else class_weights,
        ignore_index=settings.ignore_index,
        soft=has_soft,
        mean=settings.reduction == "mean",
        t_squared=settings.t_squared,
        in_units=grad is not None and student.dtype == torch.float16 and upstream is None,
    )
    raise_if_checking(weighing.fault, shape[2], "soft_mask")
    each = settings.reduction == "none"
    loss, soft, hard = (room(student, student.shape[:-1] if each else ()) for _ in range(3))
    rows = shape[0] * shape[1]
    parts = (loss, soft, hard) if each else (None, room(student, (rows,)), room(student, (rows,)))
    return _Call(shape, (s, t, g), labels, weights, weighing, grad, (loss, soft, hard), parts)


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
    teacher = None if off(soft_weight) else teacher
    student = student.detach()
    vectors = labels, soft_mask, class_weights
    scalars = temperature, soft_weight, hard_weight, soft_count, hard_count
    call = _begin(student, teacher, vectors, scalars, settings, gradient, upstream, has_soft=teacher is not None)
    rows, faults = call.shape[0] * call.shape[1], None
    if teacher is not None and settings.teacher_form != LOGITS:
        faults = _verdicts(student, rows)
    forms, factors = zip(*_transforms(settings), strict=True)
    s, t, g = call.rows
    pointers = (*s, *t, *g, *call.shape[1:], *factors[0], *factors[1])
    constants = _row_constants(call, settings.divergence, forms)
    numbers = _numbers(call, rows, settings)
    each_row(all_kernels().row_kernel, student, call.shape, *pointers, *numbers, *call.parts, faults, **constants)
    if faults is not None:
        _raise_of_rows(faults, call.shape[2])
    return call.finish()


def _numbers(call: _Call, rows: int, settings: RowSettings) -> tuple[Any, ...]:
    """What both kernels take behind their tensors."""
    numbers = settings.label_smoothing, settings.z_loss, *settings.parameters
    weighing = call.weighing.weights, rows, call.weighing.unit
    return call.labels, *weighing, *map(scalar, call.weights), *map(float, numbers)


def topk_loss(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    soft_mask: Tensor | None,
    class_weights: Tensor | None,
    temperature: Scalar,
    soft_weight: Scalar,
    hard_weight: Scalar,
    soft_count: Scalar,
    hard_count: Scalar,
    settings: RowSettings,
    shift: float,
    tail: str,
    *,
    gradient: str = "no",
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Scalar]:
    """`row_loss` with a teacher of k columns a row; shift: the divergence's.

    Raises:
        ValueError: k is above what the kernels compare in registers.
    """
    kernels, k = all_kernels(), ids.shape[-1]
    if k > kernels.MOST:
        raise ValueError(
            f"TopK.ids: expected at most {kernels.MOST} entries a row, got {k}. "
            "Keep fewer, or pass the whole distribution as LogProbs."
        )
    vectors = labels, soft_mask, class_weights
    scalars = temperature, soft_weight, hard_weight, soft_count, hard_count
    if off(soft_weight):
        return row_loss(student, None, *vectors, *scalars, settings, gradient=gradient, upstream=upstream)
    student = student.detach()
    call = _begin(student, None, vectors, scalars, settings, gradient, upstream, has_soft=True)
    shape, rows = call.shape, call.shape[0] * call.shape[1]
    ids, log_probs, faults = ids.contiguous(), log_probs.contiguous(), _verdicts(student, rows)
    options = kernels.options_for_order(k, triton_launch.WAVE)
    ordered = torch.empty(rows, options["K"] + 1, dtype=torch.int32, device=student.device)
    entries = ids, log_probs, call.weighing.weights, rows, shape[2], k, ordered, faults
    by_rows(kernels.order_kernel, student, rows, *entries, **options)
    _raise_of_rows(faults, shape[2])
    (form, factors), (s, _, g) = _transforms(settings)[0], call.rows
    group = group_for(s.head)
    constants = {
        "DIVERGENCE": kernels.DIVERGENCES[settings.divergence],
        "CENTRED": settings.divergence in kernels.CENTRED,
        "TAIL": TAILS.index(tail),
        "HARD": call.labels is not None,
        "FORM": form,
        "VEC": group,
        "ALIGNED": aligned(s, s if g.head is None else g, shape, group),
        **kernels.options_for_topk(shape[2], k, triton_launch.WAVE),
        **kernels.register_bound(triton_launch.WAVE, True),
    }
    pointers = (*s, *g, *shape[1:], *factors, ids, log_probs, k, ordered, faults)
    numbers = *_numbers(call, rows, settings), float(shift)
    by_rows(kernels.topk_kernel, student, rows, *pointers, *numbers, *call.parts, **constants)
    return call.finish()


def _transforms(settings: RowSettings) -> list[tuple[int, tuple[float, float]]]:
    """The student's and the teacher's form of kernels/transforms.py, with its two numbers."""
    kernels = all_kernels()

    def of(scale: float, cap: float) -> tuple[int, tuple[float, float]]:
        if cap:
            return kernels.CAPPED.value, (scale / cap, float(cap))
        return (kernels.PLAIN if scale == 1.0 else kernels.SCALED).value, (float(scale), 0.0)

    student, teacher = of(*settings.transforms[:2]), of(*settings.transforms[2:])
    if settings.teacher_form != LOGITS:  # at the temperature already: the kernel multiplies with it
        form = kernels.SCALED if settings.teacher_form == LOG_PROBS else kernels.LOGARITHM
        teacher = form.value, (0.0, 0.0)
    return [student, teacher]


def _verdicts(like: Tensor, rows: int) -> Tensor:
    """Room for the faults of a teacher's rows: kernels/faults.py."""
    return torch.empty(2, rows, dtype=torch.float64, device=like.device)


def _raise_of_rows(faults: Tensor, cols: int) -> None:
    """In the checking mode: wait for what a kernel has found in the teacher's rows."""
    if backends.checking():
        kinds, values = faults.tolist()
        row = next((row for row, kind in enumerate(kinds) if kind), None)
        if row is not None:
            raise_fault((kinds[row], row, values[row]), cols=cols)


def _row_constants(call: _Call, divergence: str, forms: tuple[int, int]) -> dict[str, Any]:
    """What the row kernel is compiled for."""
    kernels = all_kernels()
    s, t, g = call.rows
    frame, group = s if g.head is None else g, group_for(s.head, t.head)
    made = [form != kernels.PLAIN.value for form in forms]
    return {
        "DIVERGENCE": kernels.DIVERGENCES[divergence],
        "CENTRED": divergence in kernels.CENTRED,
        "EXACT": not any(made) and all(x.head is None or x.head.itemsize == 2 for x in (s, t)),
        "FORM_S": forms[0],
        "FORM_T": forms[1],
        "SOFT": t.head is not None,
        "HARD": call.labels is not None,
        "VEC": group,
        "ALIGNED_S": aligned(s, frame, call.shape, group),
        "ALIGNED_T": aligned(t, frame, call.shape, group),
        **kernels.register_bound(triton_launch.WAVE, divergence in kernels.HEAVY or any(made)),
    }


def rescale(grad: Tensor, grad_output: Tensor, unit: Scalar) -> None:
    """grad *= grad_output * unit, in place; nothing is touched where the product, which the device knows, is 1."""
    shape, (g,) = arrange(grad)
    factors = grad_output, scalar(unit)
    each_row(all_kernels().rescale_kernel, grad, shape, *g, *shape[1:], *factors, VEC=group_for(grad))


def softmax(logits: Tensor, temperature: Scalar, logarithm: bool) -> Tensor:
    """softmax(logits / temperature), or its logarithm, in the logits' dtype."""
    out = like_rows(logits)
    shape, (x, y) = arrange(logits.detach(), out)
    check_temperature(temperature)
    number, per_row = temperature_of(temperature)
    group = group_for(logits)
    constants = {"PER_ROW": per_row, "LOGARITHM": logarithm, "VEC": group, "ALIGNED": aligned(x, y, shape, group)}
    each_row(all_kernels().softmax_kernel, logits, shape, *x, *y, *shape[1:], number, **constants)
    return out


def softmax_backward(out: Tensor, grad_out: Tensor, temperature: Scalar, logarithm: bool) -> Tensor:
    """The logits' gradient from the output and its gradient."""
    grad = like_rows(out)
    shape, (y, u, x) = arrange(out, grad_out.contiguous(), grad)  # upstream gradients come with any strides
    number, per_row = temperature_of(temperature)
    group = group_for(out, grad_out)
    flags = {"ALIGNED_Y": aligned(y, x, shape, group), "ALIGNED_U": aligned(u, x, shape, group)}
    constants = {"PER_ROW": per_row, "LOGARITHM": logarithm, "VEC": group, **flags}
    each_row(all_kernels().softmax_backward_kernel, out, shape, *y, *u, *x, *shape[1:], number, **constants)
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
    grad = like_rows(student) if gradient else None
    shape, (s, t, g) = arrange(student, teacher, grad)
    each = reduction == "none"
    in_units = grad is not None and student.dtype == torch.float16 and upstream is None and not each
    weights, unit, fault = weigh(
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
    loss, term = (room(student, student.shape[:-1] if each else ()) for _ in range(2))
    launch = functools.partial(_pair_rows, student, shape, (s, t), weights, weight, kind, scale)
    if each:
        launch(g, loss=loss, term=term)
        return loss, term, grad, 1.0
    parts = room(student, (shape[0] * shape[1],))
    if in_units and kind == "cosine":
        sizes, unit = torch.empty_like(parts), room(student, ())
        launch(Rows(None), term=parts, sizes=sizes)
        reduce(parts, None, (weight, 0.0), loss, term, None, sizes, unit)
        launch(g, unit=unit)
    else:
        launch(g, unit=unit, term=parts)
        reduce(parts, None, (weight, 0.0), loss, term, None)
    return loss, term, grad, 1.0 if unit is None else unit


def _pair_rows(
    student: Tensor,
    shape: Shape,
    pair: tuple[Rows, Rows],
    weights: Tensor,
    weight: Scalar,
    kind: str,
    scale: float,
    g: Rows,
    *,
    unit: Tensor | None = None,
    loss: Tensor | None = None,
    term: Tensor | None = None,
    sizes: Tensor | None = None,
) -> None:
    """One launch over the rows: values, gradient, or both."""
    s, t = pair
    kernels, frame, group = all_kernels(), s if g.head is None else g, group_for(s.head, t.head)
    flags = {"ALIGNED_S": aligned(s, frame, shape, group), "ALIGNED_T": aligned(t, frame, shape, group)}
    given = (*s, *t, *g, *shape[1:], weights, shape[0] * shape[1], unit, scalar(weight))
    if kind == "cosine":
        each_row(kernels.cosine_kernel, student, shape, *given, loss, term, sizes, VEC=group, **flags)
    else:
        constants = {"PAIR": kernels.PAIRS[kind], "FIRST": kind in kernels.HAVE_FIRST, "VEC": group, **flags}
        bound = kernels.register_bound(triton_launch.WAVE)
        each_row(kernels.entries_kernel, student, shape, *given, scale, loss, term, **constants, **bound)
