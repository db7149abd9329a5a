"""The fused heads' op, and how its gradients reach autograd: made in the forward, where a chunk's logits are at hand.

Nothing of `[rows, V]` is kept for backward: gradients of hidden states and head are, and backward multiplies them. It
knows nothing of argument checks. Next: chunks.py, which computes; linear.py, the public face; docs/design.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distil_fast import backends, ops
from distil_fast.backends.layout import real_dtype
from distil_fast.backends.settings import SCHEMA, RowSettings
from distil_fast.chunks import Given, Made, Rows, Terms, chunked_loss
from distil_fast.heads import Head, Wanted

# ------------------------------------------------------------------------------------------------ the op

_lib = torch.library.Library("distil_fast", "FRAGMENT")
_ARGS = (
    "Tensor student, Tensor? weight, Tensor? bias, Tensor? teacher, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? ids, Tensor? labels, Tensor? soft_mask, Tensor? class_weights, Tensor? temperature, Tensor? soft_weight, "
    f"Tensor? hard_weight, Tensor? soft_count, Tensor? hard_count, float[] numbers, {SCHEMA}, str tail, float shift, "
    "bool wide, int chunk_bytes, bool gather, bool[] wanted"
)
_lib.define(f"chunked_loss(Tensor? upstream, {_ARGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
_TENSORS = 15  # of _ARGS, before `numbers`
_SETTINGS = len(RowSettings._fields)


def _compute(upstream: Tensor | None, *args: Any) -> Made:
    """chunked_loss from the schema's arguments."""
    student, weight, bias, teacher, teacher_weight, teacher_bias, ids, labels, soft_mask, class_weights = args[:10]
    numbers, settings = args[_TENSORS], RowSettings(*args[_TENSORS + 1 : _TENSORS + 1 + _SETTINGS])
    tail, shift, wide, chunk_bytes, gather, wanted = args[_TENSORS + 1 + _SETTINGS :]
    temperature, soft_weight, hard_weight, *counts = ops._paired(args[10:_TENSORS], numbers)
    source: Head | Given | None = None
    if teacher is not None:
        source = Given(teacher, ids) if teacher_weight is None else Head(teacher, teacher_weight, teacher_bias)
    rows = Rows(
        student if weight is None else Head(student, weight, bias), source, labels, soft_mask, temperature, upstream
    )
    terms = Terms(class_weights, soft_weight, hard_weight, counts[0], counts[1], settings, tail, shift)
    return chunked_loss(rows, terms, Wanted(*wanted), wide=wide, chunk_bytes=chunk_bytes, gather=gather)


def _op(upstream: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    """The same in tensors alone: an empty one for what is not wanted."""
    made = _compute(upstream, *args)
    student = args[0]
    unit = made.unit if isinstance(made.unit, Tensor) else student.new_full((), made.unit, dtype=torch.float32)
    grads = (student.new_empty(0) if grad is None else grad for grad in made[3:6])
    return (*(x.clone() for x in made[:3]), *grads, unit)  # an op's outputs share no memory


def _fake(upstream: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    student, weight, reduction, wanted = args[0], args[1], args[_TENSORS + _SETTINGS - 1], args[-1]
    real = real_dtype(student)
    values = [student.new_empty(student.shape[:1] if reduction == "none" else (), dtype=real) for _ in range(3)]
    shapes: list[Any] = [student.shape, *((0, 0) if weight is None else (weight.shape, weight.shape[:1]))]
    grads = [student.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True)]
    grads[1:] = [g.to(real) if want else g for g, want in zip(grads[1:], wanted[1:], strict=True)]
    return *values, *grads, student.new_empty((), dtype=torch.float32)


for _key in ("CPU", "CUDA"):
    _lib.impl("chunked_loss", _op, _key)
torch.library.register_fake("distil_fast::chunked_loss", _fake, lib=_lib)


# ------------------------------------------------------------------------------------------------ autograd


class _Stored(torch.autograd.Function):
    """Gradients in forward, applied in backward."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, weight: Tensor | None, bias: Tensor | None, args: tuple[Any, ...]
    ) -> tuple[Tensor, ...]:
        made = _compute(None, student, weight, bias, *args)
        ctx.made, ctx.backend = made, args[_TENSORS - 3 + _SETTINGS]
        ctx.dtypes = [None if x is None else x.dtype for x in (student, weight, bias)]
        ctx.mark_non_differentiable(made.soft, made.hard)
        ctx.set_materialize_grads(False)
        return made.loss, made.soft, made.hard

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        made, ctx.made = ctx.made, None
        if made is None:
            raise RuntimeError(ops._USED_UP)
        kernels, final = backends.module(ctx.backend), []
        for grad, dtype in zip(made[3:6], ctx.dtypes, strict=True):
            if grad is not None:
                kernels.rescale(grad if grad.dim() > 1 else grad.unsqueeze(0), grads[0], made.unit)
                grad = ops._final(grad.to(dtype))
            final.append(grad)
        return *final, None


class _Traced(torch.autograd.Function):
    """The same for traced code: what forward made is saved, and multiplied anew."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any) -> Any:
        loss, soft, hard, *made = ops._ops.chunked_loss(None, student, weight, bias, *args)
        ctx.save_for_backward(*made)
        ctx.wanted = args[-1]
        ctx.dtypes = [None if x is None else x.dtype for x in (student, weight, bias)]
        ctx.count = len(args)
        ctx.mark_non_differentiable(soft, hard)
        return loss, soft, hard

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        *made, unit = ctx.saved_tensors
        factor = grads[0] * unit
        final = [
            (grad * factor).to(dtype) if want else None
            for grad, want, dtype in zip(made, ctx.wanted, ctx.dtypes, strict=True)
        ]
        return *final, *(None,) * ctx.count


class _Recomputed(torch.autograd.Function):
    """Gradients in backward, from chunks made again: for upstream gradients per row."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        compute = _op if ops._direct(args[0]) else ops._ops.chunked_loss
        loss, soft, hard, *_ = compute(None, *args[:-1], (False, False, False))
        ops._keep(ctx, *args[:_TENSORS])
        ctx.settings = args[_TENSORS:]
        ctx.mark_non_differentiable(soft, hard)
        return loss, soft, hard

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        tensors = ops._kept(ctx)
        student, wanted = tensors[0], ctx.settings[-1]
        compute = _op if ops._direct(student) else ops._ops.chunked_loss
        held = [None if t is None else t.detach() for t in tensors]
        made = compute(grads[0], *held, *ctx.settings)[3:6]
        final = [
            ops._final(grad.to(x.dtype)) if want else None
            for grad, x, want in zip(made, tensors[:3], wanted, strict=True)
        ]
        return *final, *(None,) * (_TENSORS - 3 + len(ctx.settings))


def chunked(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None],
    scalars: tuple[Any, ...],
    settings: RowSettings,
    how: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and terms of `[rows, ...]`. teacher: values, weights, bias, ids; how: tail, shift, wide, chunk_bytes,
    gather."""
    tensors, numbers = ops._split(scalars)
    grad = torch.is_grad_enabled()
    wanted = tuple(grad and x is not None and x.requires_grad for x in (student, weight, bias))
    rest = (*teacher, *vectors, *tensors, numbers, *settings, *how, wanted)
    direct = ops._direct(student)
    if not any(wanted):
        made = (_op if direct else ops._ops.chunked_loss)(None, student, weight, bias, *rest)
        return made[0], made[1], made[2]
    if settings.reduction == "none":
        return _Recomputed.apply(student, weight, bias, *rest)
    if direct:
        return _Stored.apply(student, weight, bias, rest)
    return _Traced.apply(student, weight, bias, *rest)
