"""Heads whose weights are sharded along the vocabulary: chunks of rows go through the matmuls, the loss, the gradient.

A chunk's logits exist for that chunk alone; its gradient is written over the student's. What of the hidden states'
gradient the ranks hold is summed once, at the end. It knows no kernel. Next: call.py, which does the rest; heads.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distil_fast import checks, ops
from distil_fast.backends.layout import real_dtype
from distil_fast.heads import Gradients, Head, Wanted, places, slices, spread
from distil_fast.parallel import agreement, conduct
from distil_fast.parallel.agreement import Place, Ranks
from distil_fast.parallel.call import Rows, check_vocabulary, rows_of
from distil_fast.reference import LossTerms

CHUNK_BYTES = {"cpu": 64 << 20}
CHUNK_BYTES_ELSEWHERE = 1 << 30  # a device's matmuls want a thousand rows

OfHead = tuple[Tensor | None, Tensor | None, Tensor | None]  # what belongs to hidden states, weights and bias


class Heads(NamedTuple):
    """Both models, of the rows that some term uses; products and gradients are in the precision of the sums."""

    student: Head
    teacher: Head | None
    most: int  # rows of a chunk

    def chunks(self) -> Iterator[slice]:
        return slices(self.student.hidden.shape[0], self.most)

    def logits(self, chunk: slice) -> tuple[Tensor, Tensor | None]:
        teacher = self.teacher and self.teacher.rows(chunk).logits(wide=True)
        return self.student.rows(chunk).logits(wide=True), teacher

    def gradients(self, wanted: Wanted) -> Gradients:
        return Gradients(self.student.hidden, self.student.weight.shape[0], wanted, wide=True)


def _summed(ranks: Ranks, gradients: Gradients) -> OfHead:
    """The gradients, that of the hidden states summed over the ranks."""
    hidden, weight, bias = gradients.results()
    return None if hidden is None else agreement.total(ranks, hidden), weight, bias


def _prepare(
    student: tuple[Any, Any, Any],
    teacher: tuple[Any, Any, Any] | None,
    labels: Tensor | None,
    chunk_bytes: int | None,
    wants: Wanted,
    backend: str | None,
    options: dict[str, Any],
) -> Rows:
    """All that one rank does by itself before it meets the others."""
    checks.check_head("student_hidden", *student)
    if teacher is not None:
        checks.check_teacher_head(*teacher, student[0])
        for name, tensor in zip(("teacher_weight", "teacher_bias"), teacher[1:], strict=True):
            if tensor is not None:
                checks.check_constant(name, tensor)
        if teacher[1].shape[0] != student[1].shape[0]:
            raise ValueError(
                f"teacher_weight: expected this rank's rows of the head, {student[1].shape[0]} as student_weight has, "
                f"got {teacher[1].shape[0]}. Shard both heads alike."
            )
    checks.check_chunk_bytes(chunk_bytes)
    kinds = [None if x is None else (x.dtype, x.shape[1:]) for head in (student, teacher or ()) for x in head]
    alike = kinds, student[0].shape[-1], student[0].device.type, chunk_bytes, wants
    hidden = student[0].detach()
    return rows_of(hidden, student[1].shape[0], alike, labels, backend, teacher is not None, **options)


def _heads(used: Tensor | None, place: Place, chunk_bytes: int | None, student: Any, teacher: Any) -> Heads:
    """Detached, unused rows gathered out."""

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        bias = bias if bias is None else bias.detach()
        return Head(flat if used is None else flat[used], weight.detach(), bias)

    budget = chunk_bytes or CHUNK_BYTES.get(student[0].device.type, CHUNK_BYTES_ELSEWHERE)
    row_bytes = place.widest * real_dtype(student[0]).itemsize * (1 if teacher is None else 2)
    return Heads(head(*student), teacher and head(*teacher), max(1, budget // row_bytes))


class Call(NamedTuple):
    """What forward and backward share; `rows` are those that some term uses, `used` their places among all."""

    ranks: Ranks
    place: Place
    rows: Rows
    used: Tensor | None
    leading: torch.Size
    chunk_bytes: int | None


def _forward(call: Call, heads: Heads, gradients: Gradients | None) -> conduct.Measured:
    """Every used row's values, chunk after chunk, and what the gradients come to."""
    parts = []
    for chunk in heads.chunks():
        rows = call.rows.part(chunk)
        count = chunk.stop - chunk.start
        try:
            logits, teacher = heads.logits(chunk)
            shard = rows.shard(logits, teacher)
            own = conduct.statistics(shard)
        except Exception as error:
            nothing = torch.zeros(count, 2, dtype=torch.float64, device=heads.student.hidden.device)
            agreement.give_up(call.ranks, error, nothing)
        largest = agreement.largest(call.ranks, own[0])
        found = conduct.measure(call.ranks, call.place, shard, rows.labels, own, largest)
        parts.append(found)
        if gradients is not None:
            conduct.gradient(call.place, shard, found, logits)
            gradients.add(chunk, heads.student.rows(chunk), logits)
    return _joined(parts, call.rows)


def _joined(parts: list[conduct.Measured], rows: Rows) -> conduct.Measured:
    if not parts:
        nothing = rows.temperatures.new_zeros(0)
        return conduct.Measured(nothing, nothing, nothing, None)
    soft, hard, totals, labels = zip(*parts, strict=True)
    return conduct.Measured(
        torch.cat(soft), torch.cat(hard), torch.cat(totals), None if labels[0] is None else torch.cat(labels)
    )


def _backward(call: Call, heads: Heads, found: conduct.Measured, upstream: Tensor, gradients: Gradients) -> None:
    """The gradients of rows with upstream gradients of their own: the logits are made again."""
    for chunk in heads.chunks():
        logits, teacher = heads.logits(chunk)
        shard = call.rows.part(chunk).shard(logits, teacher, upstream[chunk])
        labels = None if found.labels is None else found.labels[chunk]
        part = conduct.Measured(found.soft[chunk], found.hard[chunk], found.totals[chunk], labels)
        conduct.gradient(call.place, shard, part, logits)
        gradients.add(chunk, heads.student.rows(chunk), logits)


def loss(
    group: dist.ProcessGroup | None,
    student: tuple[Any, Any, Any],
    teacher: tuple[Any, Any, Any] | None,
    labels: Tensor | None,
    *,
    chunk_bytes: int | None,
    backend: str | None,
    **options: Any,
) -> LossTerms:
    """A loss over hidden states and sharded heads, (hidden, weight, bias) of each model."""
    ranks = agreement.ranks_of(group)
    recording = torch.is_grad_enabled()
    wants = Wanted(*(recording and isinstance(x, Tensor) and x.requires_grad for x in student))
    kind = student[0].device.type if isinstance(student[0], Tensor) else "cpu"
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        try:
            all_rows = _prepare(student, teacher, labels, chunk_bytes, wants, backend, options)
        except Exception as error:
            device = student[0].device if isinstance(student[0], Tensor) else torch.device("cpu")
            agreement.withdraw(ranks, error, 0, device)
        nothing = torch.empty(0, 2, dtype=torch.float64, device=student[0].device)
        place, _ = agreement.agree(ranks, all_rows.facts, student[1].shape[0], nothing)
        check_vocabulary(all_rows, place, options["class_weights"])
        used = places((all_rows.soft_shares != 0) | (all_rows.hard_shares != 0))
        rows = all_rows if used is None else all_rows.part(used)
        leading = student[0].shape[:-1]
        call = Call(ranks, place, rows, used, leading, chunk_bytes)
        heads = _heads(used, place, chunk_bytes, student, teacher)
        stored = any(wants) and rows.settings.reduction != "none"
        sums = heads.gradients(wants) if stored else None
        found = _forward(call, heads, sums)
        gradients = None if sums is None else _summed(ranks, sums)
        everywhere = found._replace(
            soft=spread(found.soft, used, leading.numel()), hard=spread(found.hard, used, leading.numel())
        )
        terms = all_rows.reduce(everywhere, leading, real_dtype(student[0]))
    if not any(wants):
        return terms
    if stored:
        return LossTerms(_Stored.apply(*student, terms.loss, call, gradients), *terms[1:])
    return LossTerms(_Recomputed.apply(*student, teacher, terms.loss, call, found), *terms[1:])


def _as_given(gradients: OfHead, call: Call, given: tuple[Any, ...]) -> OfHead:
    """In the dtypes and shapes of hidden states, weight and bias."""
    hidden, weight, bias = gradients
    if hidden is not None:
        shape, dtype = given[0]
        hidden = spread(hidden.to(dtype), call.used, call.leading.numel()).view(shape)
    weight = weight if weight is None else weight.to(given[1][1])
    return hidden, weight, bias if bias is None else bias.to(given[2][1])


def _kinds(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    return tuple(None if x is None else (x.shape, x.dtype) for x in tensors)


class _Stored(torch.autograd.Function):
    """Gradients in forward, applied in backward: for a loss reduced to one number."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        hidden, weight, bias, value, ctx.call, ctx.gradients = args
        ctx.given = _kinds((hidden, weight, bias))
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(ops._USED_UP)
        with torch.no_grad():
            hidden, weight, bias = (x if x is None else x.mul_(grads[0].to(x.dtype)) for x in gradients)
            final = _as_given((hidden, weight, bias), ctx.call, ctx.given)
        return *(x if x is None else ops._final(x) for x in final), None, None, None


class _Recomputed(torch.autograd.Function):
    """Gradients in backward, from logits that are made again: for upstream gradients per row."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        hidden, weight, bias, teacher, value, ctx.call, ctx.found = args
        ctx.given = _kinds((hidden, weight, bias))
        ctx.has_teacher = teacher is not None
        ops._keep(ctx, hidden, weight, bias, *(teacher or ()))
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        kept, call = ops._kept(ctx), ctx.call
        with torch.no_grad(), torch.autocast(kept[0].device.type, enabled=False):
            teacher = tuple(kept[3:]) if ctx.has_teacher else None
            heads = _heads(call.used, call.place, call.chunk_bytes, tuple(kept[:3]), teacher)
            upstream = grads[0].double().flatten()
            upstream = upstream if call.used is None else upstream[call.used]
            sums = heads.gradients(Wanted(*ctx.needs_input_grad[:3]))
            _backward(call, heads, ctx.found, upstream, sums)
            final = _as_given(_summed(call.ranks, sums), call, ctx.given)
        return *(x if x is None else ops._final(x) for x in final), None, None, None, None
