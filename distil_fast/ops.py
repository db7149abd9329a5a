"""The ops as torch sees them: schemas, fakes, and the autograd functions that hand gradients over.

Eager calls go straight to the backend that an argument names; where torch.compile or a dispatch mode looks on, they go
through the ops of torch.library, which is what can be traced. It knows nothing of argument checks or of the choice of a
backend (functional.py). Next: backends/native.py. docs/design.md says how a gradient reaches autograd, and why so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distil_fast import backends
from distil_fast.backends.layout import real_dtype
from distil_fast.backends.settings import SCHEMA, RowSettings

Scalar = float | Tensor

# ------------------------------------------------------------------------------------------------ schemas
# A scalar of a schema is a pair: a tensor, or else the number at its place in `numbers`.

_SCALARS = (
    "Tensor? temperature, Tensor? soft_weight, Tensor? hard_weight, Tensor? soft_count, Tensor? hard_count, "
    "float[] numbers"
)
_VECTORS = "Tensor? labels, Tensor? soft_mask, Tensor? class_weights"
_ROW = f"Tensor? teacher, {_VECTORS}, {_SCALARS}, {SCHEMA}"
_TOPK = f"Tensor ids, Tensor log_probs, {_VECTORS}, {_SCALARS}, float shift, str tail, {SCHEMA}"
_TAIL = "float[] numbers, str kind, float scale, str reduction, str backend"
_PAIR = f"Tensor student, Tensor teacher, Tensor? mask, Tensor? weight, Tensor? count, {_TAIL}"

_lib = torch.library.Library("distil_fast", "DEF")
_lib.define(f"row_loss(Tensor student, {_ROW}) -> (Tensor, Tensor, Tensor)")
_lib.define(f"row_loss_backward(Tensor upstream, Tensor student, {_ROW}) -> Tensor")
_lib.define(f"topk_loss(Tensor student, {_TOPK}) -> (Tensor, Tensor, Tensor)")
_lib.define(f"topk_loss_backward(Tensor upstream, Tensor student, {_TOPK}) -> Tensor")
_lib.define(f"pair_loss({_PAIR}) -> (Tensor, Tensor)")
_lib.define(f"pair_loss_backward(Tensor upstream, {_PAIR}) -> Tensor")
_lib.define("softmax(Tensor logits, Tensor? temperature, float number, bool logarithm, str backend) -> Tensor")
_lib.define(
    "softmax_backward(Tensor out, Tensor grad_out, Tensor? temperature, float number, bool logarithm, str backend) "
    "-> Tensor"
)
_ops = torch.ops.distil_fast


def _paired(tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> list[Any]:
    return [number if tensor is None else tensor for tensor, number in zip(tensors, numbers, strict=True)]


def _split(scalars: tuple[Scalar, ...]) -> tuple[list[Tensor | None], list[float]]:
    tensors = [s if isinstance(s, Tensor) else None for s in scalars]
    return tensors, [-1.0 if isinstance(s, Tensor) else s for s in scalars]


# How many tensors beside the student a loss over rows of logits has, before its five scalars.
_BESIDE = {"row_loss": 4, "topk_loss": 5}


def _rows(name: str, student: Tensor, args: tuple[Any, ...], **how: Any) -> tuple[Any, ...]:
    """A loss over rows of logits by its backend, from its schema's arguments."""
    tensors, numbers, more = _BESIDE[name], _BESIDE[name] + 5, len(args) - len(RowSettings._fields)
    settings = RowSettings(*args[more:])
    scalars = _paired(args[tensors:numbers], args[numbers])
    kernel = getattr(backends.module(settings.backend), name)
    out: tuple[Any, ...] = kernel(student, *args[:tensors], *scalars, settings, *args[numbers + 1 : more], **how)
    return out


def _row_loss(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _rows("row_loss", student, args)[:3]


def _row_loss_backward(upstream: Tensor, student: Tensor, *args: Any) -> Tensor:
    grad: Tensor = _rows("row_loss", student, args, gradient="fresh", upstream=upstream)[3]
    return grad


def _topk_loss(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _rows("topk_loss", student, args)[:3]


def _topk_loss_backward(upstream: Tensor, student: Tensor, *args: Any) -> Tensor:
    grad: Tensor = _rows("topk_loss", student, args, gradient="fresh", upstream=upstream)[3]
    return grad


def _pair(student: Tensor, teacher: Tensor, mask: Tensor | None, args: tuple[Any, ...], **how: Any) -> tuple[Any, ...]:
    *scalars, numbers, kind, scale, reduction, backend = args
    settings = *_paired(scalars, numbers), kind, scale, reduction
    return backends.module(backend).pair_loss(student, teacher, mask, *settings, **how)


def _pair_loss(student: Tensor, teacher: Tensor, mask: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return _pair(student, teacher, mask, args)[:2]


def _pair_loss_backward(upstream: Tensor, student: Tensor, teacher: Tensor, mask: Tensor | None, *args: Any) -> Tensor:
    grad: Tensor = _pair(student, teacher, mask, args, gradient=True, upstream=upstream)[2]
    return grad


def _softmax(logits: Tensor, temperature: Tensor | None, number: float, logarithm: bool, backend: str) -> Tensor:
    out: Tensor = backends.module(backend).softmax(logits, number if temperature is None else temperature, logarithm)
    return out


def _softmax_backward(
    out: Tensor, grad_out: Tensor, temperature: Tensor | None, number: float, logarithm: bool, backend: str
) -> Tensor:
    scalar = number if temperature is None else temperature
    grad: Tensor = backends.module(backend).softmax_backward(out, grad_out, scalar, logarithm)
    return grad


# ------------------------------------------------------------------------------------------------ fakes


def _fake_terms(values: Tensor, reduction: str, terms: int) -> tuple[Tensor, ...]:
    shape = values.shape[:-1] if reduction == "none" else ()
    return tuple(values.new_empty(shape, dtype=real_dtype(values)) for _ in range(terms))


def _fake_row_loss(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _fake_terms(student, args[-2], 3)


def _fake_pair_loss(student: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _fake_terms(student, args[-2], 2)


def _fake_rows_like_second(_: Tensor, values: Tensor, *args: Any) -> Tensor:
    return values.new_empty(values.shape)


def _fake_rows_like_first(values: Tensor, *args: Any) -> Tensor:
    return values.new_empty(values.shape)


for _name, _implementation, _fake in (
    ("row_loss", _row_loss, _fake_row_loss),
    ("row_loss_backward", _row_loss_backward, _fake_rows_like_second),
    ("topk_loss", _topk_loss, _fake_row_loss),
    ("topk_loss_backward", _topk_loss_backward, _fake_rows_like_second),
    ("pair_loss", _pair_loss, _fake_pair_loss),
    ("pair_loss_backward", _pair_loss_backward, _fake_rows_like_second),
    ("softmax", _softmax, _fake_rows_like_first),
    ("softmax_backward", _softmax_backward, _fake_rows_like_first),
):
    for _key in ("CPU", "CUDA"):  # AMD's GPUs are CUDA to torch
        _lib.impl(_name, _implementation, _key)
    torch.library.register_fake(f"distil_fast::{_name}", _fake, lib=_lib)


# ------------------------------------------------------------------------------------------------ autograd

_USED_UP = (
    "distil_fast: the gradient of this loss was handed over by the first backward and is not kept for a second one. "
    "Call the loss again, or use reduction='none', which computes it anew each time."
)
_ONCE = (
    "distil_fast: the losses have a first derivative only. For a second one use the same function of "
    "distil_fast.reference, which is plain torch."
)


class _FirstDerivative(torch.autograd.Function):
    """A gradient that says, when it is differentiated itself, that it cannot be."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_ONCE)


def _final(grad: Tensor) -> Tensor:
    """The gradient as backward returns it; under create_graph=True its own derivative is a clear error."""
    if torch.is_grad_enabled():
        return _FirstDerivative.apply(grad, torch.ones((), requires_grad=True))
    return grad


def _keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Save for backward; a tensor made under inference_mode, which autograd refuses to save, is held as it is."""
    held = (
        {}
        if torch.compiler.is_compiling()
        else {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
    )
    ctx.held = held
    ctx.save_for_backward(*(None if i in held else t for i, t in enumerate(tensors)))


def _kept(ctx: Any) -> list[Any]:
    return [ctx.held.get(i, t) for i, t in enumerate(ctx.saved_tensors)]


def _direct(values: Tensor) -> bool:
    """Whether a call may skip the dispatcher: nobody traces, and the tensor is nothing but a tensor."""
    return (
        not torch.compiler.is_compiling()
        and not values.is_meta
        and type(values) in (Tensor, torch.nn.Parameter)
        and not torch._C._len_torch_dispatch_stack()
    )


class _StoredRowLoss(torch.autograd.Function):
    """Gradient in forward, applied in backward: three elements of traffic per logit pair where grad_output is 1."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, inplace: bool, backend: str, name: str, args: tuple[Any, ...]
    ) -> tuple[Tensor, ...]:
        ctx.kernels = backends.module(backend)
        how = "inplace" if inplace else "fresh"
        loss, soft, hard, grad, ctx.unit = getattr(ctx.kernels, name)(student, *args, gradient=how)
        if inplace:
            torch.autograd.graph.increment_version(student)
            grad = student.detach()
        ctx.grad = grad
        ctx.mark_non_differentiable(soft, hard)
        ctx.set_materialize_grads(False)
        return loss, soft, hard

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            raise RuntimeError(_USED_UP)
        ctx.kernels.rescale(grad, grads[0], ctx.unit)
        return _final(grad), None, None, None, None


class _RecomputedRowLoss(torch.autograd.Function):
    """Gradient in backward, from the logits: for upstream gradients per row, and for traced code, where applying
    grad_output to a stored gradient would cost a second [rows, V] buffer."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, name: str, *args: Any) -> tuple[Tensor, ...]:
        if _direct(student):
            loss, soft, hard = _rows(name, student, args)[:3]
        else:
            loss, soft, hard = getattr(_ops, name)(student, *args)
        tensors = _BESIDE[name] + 5
        _keep(ctx, student, *args[:tensors])
        ctx.name, ctx.settings = name, args[tensors:]
        ctx.mark_non_differentiable(soft, hard)
        return loss, soft, hard

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        student, *tensors = _kept(ctx)
        assert student is not None
        student, args = student.detach(), (*tensors, *ctx.settings)
        if _direct(student):
            grad = _rows(ctx.name, student, args, gradient="fresh", upstream=grads[0])[3]
        else:
            grad = getattr(_ops, f"{ctx.name}_backward")(grads[0], student, *args)
        return _final(grad), None, *(None for _ in args)


def _by_rows(
    name: str,
    student: Tensor,
    vectors: tuple[Tensor | None, ...],
    scalars: tuple[Scalar, ...],
    settings: RowSettings,
    more: tuple[Any, ...],
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A loss over rows of logits, in the way that suits who looks on. more: what its kernels take behind settings."""
    direct = _direct(student)
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    if direct and not (needs_grad and settings.reduction == "none"):
        args = *vectors, *scalars, settings, *more
        if needs_grad:
            return _StoredRowLoss.apply(student, inplace, settings.backend, name, args)
        out: tuple[Tensor, Tensor, Tensor] = getattr(backends.module(settings.backend), name)(student, *args)[:3]
        return out
    tensors, numbers = _split(scalars)
    args = *vectors, *tensors, numbers, *more, *settings
    if not needs_grad:
        return getattr(_ops, name)(student, *args)
    return _RecomputedRowLoss.apply(student, name, *args)


def row_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    soft_mask: Tensor | None,
    class_weights: Tensor | None,
    scalars: tuple[Scalar, ...],
    settings: RowSettings,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and its two terms. scalars: temperature, weights, counts (-1: counted)."""
    vectors = teacher, labels, soft_mask, class_weights
    return _by_rows("row_loss", student, vectors, scalars, settings, (), inplace)


def topk_loss(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    soft_mask: Tensor | None,
    class_weights: Tensor | None,
    scalars: tuple[Scalar, ...],
    settings: RowSettings,
    shift: float,
    tail: str,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`row_loss` with a teacher of k columns a row; shift: the divergence's."""
    vectors = ids, log_probs, labels, soft_mask, class_weights
    return _by_rows("topk_loss", student, vectors, scalars, settings, (shift, tail), inplace)


class _StoredPairLoss(torch.autograd.Function):
    """Gradient in forward, applied in backward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        *rest, backend = args
        ctx.kernels = backends.module(backend)
        loss, term, ctx.grad, ctx.unit = ctx.kernels.pair_loss(student, *rest, gradient=True)
        ctx.mark_non_differentiable(term)
        ctx.set_materialize_grads(False)
        return loss, term

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            raise RuntimeError(_USED_UP)
        ctx.kernels.rescale(grad, grads[0], ctx.unit)
        return _final(grad), None


class _RecomputedPairLoss(torch.autograd.Function):
    """Gradient in backward, from the two tensors."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, *args: Any) -> tuple[Tensor, ...]:
        loss, term = (_pair_loss if _direct(student) else _ops.pair_loss)(student, *args)
        _keep(ctx, student, *args[:4])
        ctx.settings = args[4:]
        ctx.mark_non_differentiable(term)
        return loss, term

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        student, *tensors = _kept(ctx)
        assert student is not None
        compute = _pair_loss_backward if _direct(student) else _ops.pair_loss_backward
        return _final(compute(grads[0], student.detach(), *tensors, *ctx.settings)), *(None,) * 9


def pair_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None, weight: Scalar, count: Scalar, settings: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """The weighted loss and the term before its weight; count -1: counted; settings: the schema's tail."""
    direct = _direct(student)
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    if direct and not (needs_grad and settings[-2] == "none"):
        args = (teacher, mask, weight, count, *settings)
        if needs_grad:
            return _StoredPairLoss.apply(student, args)
        *rest, backend = args
        return backends.module(backend).pair_loss(student, *rest)[:2]
    tensors, numbers = _split((weight, count))
    if needs_grad:
        return _RecomputedPairLoss.apply(student, teacher, mask, *tensors, numbers, *settings)
    return _ops.pair_loss(student, teacher, mask, *tensors, numbers, *settings)


class _Softmax(torch.autograd.Function):
    """softmax or log_softmax; backward needs the output alone."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: Tensor | None, *settings: Any) -> Tensor:
        out = (_softmax if _direct(logits) else _ops.softmax)(logits, temperature, *settings)
        _keep(ctx, out, temperature)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        out, temperature = _kept(ctx)
        assert out is not None
        compute = _softmax_backward if _direct(out) else _ops.softmax_backward
        return _final(compute(out.detach(), grads[0], temperature, *ctx.settings)), *(None,) * 4


def softmax(logits: Tensor, temperature: Scalar, logarithm: bool, backend: str) -> Tensor:
    """softmax(logits / temperature), or its logarithm."""
    (tensor,), (number,) = _split((temperature,))
    if torch.is_grad_enabled() and logits.requires_grad:
        return _Softmax.apply(logits, tensor, number, logarithm, backend)
    return (_softmax if _direct(logits) else _ops.softmax)(logits, tensor, number, logarithm, backend)
