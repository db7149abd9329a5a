"""The row losses over rows whose logits are made in chunks: never the whole `[rows, V]`, of student or teacher.

Rows that no term uses are gathered out first; the others go, chunk by chunk, from hidden states to logits, through a
backend's row kernel, which leaves the gradient where the student's logits were, and on to the gradients of hidden
states and head. It knows nothing of autograd or of argument checks. Next: heads.py; linear.py, which calls it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distil_fast import backends
from distil_fast.backends.layout import MASK, real_dtype
from distil_fast.backends.settings import RowSettings
from distil_fast.backends.values import check_labels, check_temperatures, check_weights
from distil_fast.heads import Gradients, Head, Wanted, places, slices, spread
from distil_fast.products import logits_dtype

Scalar = float | Tensor

CPU_BYTES = 32 << 20  # of both models' logits in a chunk: they stay near the caches
CPU_ROWS, GPU_ROWS = 128, 1024  # a chunk's, at least: fewer starve the products


class Given(NamedTuple):
    """A teacher that brings a tensor for each row: logits, probabilities, or the top k with their `ids`."""

    values: Tensor
    ids: Tensor | None

    def rows(self, part: slice | Tensor) -> Given:
        return Given(self.values[part], None if self.ids is None else self.ids[part])


class Rows(NamedTuple):
    """A call's rows, one entry each; `student` is a head, or the logits themselves."""

    student: Head | Tensor
    teacher: Head | Given | None
    labels: Tensor | None
    soft_mask: Tensor | None
    temperature: Scalar
    upstream: Tensor | None  # multiplies each row's gradient

    def part(self, part: slice | Tensor) -> Rows:
        """Some of the rows; what is one number for all stays."""

        def of(x: Any) -> Any:
            return x[part] if isinstance(x, Tensor) and x.dim() else x

        student = self.student.rows(part) if isinstance(self.student, Head) else self.student[part]
        teacher = None if self.teacher is None else self.teacher.rows(part)
        return Rows(student, teacher, of(self.labels), of(self.soft_mask), of(self.temperature), of(self.upstream))

    @property
    def values(self) -> Tensor:
        return self.student if isinstance(self.student, Tensor) else self.student.hidden

    @property
    def cols(self) -> int:
        return self.student.shape[-1] if isinstance(self.student, Tensor) else self.student.weight.shape[0]


class Terms(NamedTuple):
    """What all rows share: class weights, the terms' weights and counts (-1: counted), and the settings."""

    class_weights: Tensor | None
    soft_weight: Scalar
    hard_weight: Scalar
    soft_count: Scalar
    hard_count: Scalar
    settings: RowSettings
    tail: str = ""  # of a top-k teacher, and its divergence's shift
    shift: float = 0.0


class Made(NamedTuple):
    """Loss and its terms; the gradients, in units of `unit` (1 but for float16)."""

    loss: Tensor
    soft: Tensor
    hard: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    unit: Scalar


def chunked_loss(
    rows: Rows, terms: Terms, wanted: Wanted, *, wide: bool = True, chunk_bytes: int = 0, gather: bool = True
) -> Made:
    """The loss and the wanted gradients. wide: half-precision heads give float32 logits; chunk_bytes 0: by the device;
    gather: rows that no term uses are left out.

    Raises:
        ValueError: a label, token weight or temperature at fault, before any product is made (on a GPU: in the
            checking mode).
    """
    rows, terms = _without_idle_terms(rows, terms)
    labelled = None if rows.labels is None else rows.labels != terms.settings.ignore_index
    if not rows.values.is_cuda or backends.checking():
        _check(rows, labelled)
    terms = _counted(rows, labelled, terms)
    index = places(_used(rows, labelled)) if gather else None
    busy = rows if index is None else rows.part(index)
    loop = _Loop(busy, terms, wanted, wide)
    for part in slices(busy.values.shape[0], _most_rows(busy, wide, chunk_bytes)):
        loop.run(part)
    return loop.made(rows.values.shape[0], index)


# ------------------------------------------------------------------------------------------------ rows


def _off(weight: Scalar) -> bool:
    return not isinstance(weight, Tensor) and weight == 0.0


def _without_idle_terms(rows: Rows, terms: Terms) -> tuple[Rows, Terms]:
    """A term whose weight is the number 0 needs neither teacher nor labels."""
    if _off(terms.soft_weight):
        rows = rows._replace(teacher=None)
    if _off(terms.hard_weight):
        rows, terms = rows._replace(labels=None), terms._replace(class_weights=None)
    return rows, terms


def _used(rows: Rows, labelled: Tensor | None) -> Tensor | None:
    """Which rows a term uses; None: all of them."""
    if rows.teacher is None:
        return rows.values.new_zeros(rows.values.shape[0], dtype=torch.bool) if labelled is None else labelled
    if rows.soft_mask is None:
        return None
    used = rows.soft_mask != 0
    return used if labelled is None else used | labelled


def _check(rows: Rows, labelled: Tensor | None) -> None:
    """Values at fault, with the row of the whole call: the kernels see chunks."""
    if rows.labels is not None and labelled is not None:
        check_labels(rows.labels, labelled, rows.cols)
    if rows.teacher is None:
        return
    if rows.soft_mask is not None and rows.soft_mask.dtype != torch.bool:
        check_weights(MASK, rows.soft_mask)
    if isinstance(rows.temperature, Tensor):
        used = None if rows.soft_mask is None else rows.soft_mask != 0
        check_temperatures(rows.temperature.expand(rows.values.shape[0]), used)


def _counted(rows: Rows, labelled: Tensor | None, terms: Terms) -> Terms:
    """The denominators of all rows, which a chunk cannot know: a mean's only; tensors where waiting would cost."""
    if terms.settings.reduction != "mean":
        return terms
    soft, hard = terms.soft_count, terms.hard_count
    if rows.teacher is not None and not isinstance(soft, Tensor) and soft < 0:
        mask = rows.soft_mask
        soft = float(rows.values.shape[0]) if mask is None else _number(mask.sum(dtype=torch.float64))
    if rows.labels is not None and labelled is not None and not isinstance(hard, Tensor) and hard < 0:
        weights = labelled
        if terms.class_weights is not None:
            of_label = terms.class_weights[torch.where(labelled, rows.labels, 0).clamp(0, rows.cols - 1)]
            weights = torch.where(labelled, of_label, 0.0)
        hard = _number(weights.sum(dtype=torch.float64))
    return terms._replace(soft_count=soft, hard_count=hard)


def _float(x: Scalar) -> Scalar:
    return x.float() if isinstance(x, Tensor) else x


def _largest(x: Scalar) -> Scalar:
    return _float(x.abs().max()) if isinstance(x, Tensor) else abs(x)


def _inverse(count: Scalar) -> Scalar:
    """What a mean's rows are multiplied with: 0 where none counts."""
    if isinstance(count, Tensor):
        return torch.where(count > 0, 1.0 / count.float(), 0.0)
    return 1.0 / count if count > 0 else 0.0


def _number(total: Tensor) -> Scalar:
    return total.float() if total.is_cuda else total.item()


def _most_rows(rows: Rows, wide: bool, chunk_bytes: int) -> int:
    """Of a chunk."""
    by_row = 2 * rows.cols * logits_dtype(rows.values, wide).itemsize  # of both models' logits
    if chunk_bytes:
        return chunk_bytes // by_row
    return GPU_ROWS if rows.values.is_cuda else max(CPU_ROWS, CPU_BYTES // by_row)


# ------------------------------------------------------------------------------------------------ the loop


class _Loop:
    """Sums over chunks: the loss and its terms, and the gradients."""

    def __init__(self, rows: Rows, terms: Terms, wanted: Wanted, wide: bool) -> None:
        if isinstance(rows.student, Head):
            rows = rows._replace(student=rows.student.computed())
        if isinstance(rows.teacher, Head):
            rows = rows._replace(teacher=rows.teacher.computed())
        self.rows, self.terms, self.wanted, self.wide = rows, terms, wanted, wide
        self.kernels = backends.module(terms.settings.backend)
        self.unit = self._unit()
        values, count = rows.values, rows.values.shape[0]
        self.each = terms.settings.reduction == "none"
        shape, dtype = ((3, count), real_dtype(values)) if self.each else ((3,), torch.float64)
        self.totals = torch.zeros(shape, dtype=dtype, device=values.device)
        self.gradients = Gradients(values, rows.cols, wanted)

    def _unit(self) -> Scalar:
        """What an fp16 gradient is stored in units of, before upstream gradients: `unit_of` in csrc/cpu/shares.h says
        why. Made here, of the largest weight that a row of the call can have, because a kernel sees a chunk's rows; and
        without a number of the host's going to a GPU, which would wait for it."""
        rows, terms = self.rows, self.terms
        if rows.values.dtype != torch.float16 or not any(self.wanted) or rows.upstream is not None:
            return 1.0
        size: Scalar = 0.0
        mean = terms.settings.reduction == "mean"
        if rows.teacher is not None and rows.values.shape[0]:
            t = _float(rows.temperature)
            share = t if terms.settings.t_squared else 1.0 / t
            share = share if rows.soft_mask is None else share * rows.soft_mask
            size += _largest(share * terms.soft_weight) * (_inverse(terms.soft_count) if mean else 1.0)
        if rows.labels is not None and rows.values.shape[0]:
            most = 1.0 if terms.class_weights is None else _float(terms.class_weights.max())
            size += _largest(terms.hard_weight * most) * (_inverse(terms.hard_count) if mean else 1.0)
        size = size if isinstance(size, Tensor) else rows.values.new_full((), size, dtype=torch.float32)
        unit = torch.where((size > 0) & (size < math.inf), torch.exp2(torch.ceil(torch.log2(size)) - 6.0), 1.0)
        return unit if unit.is_cuda else unit.item()

    def run(self, part: slice) -> None:
        rows, terms = self.rows.part(part), self.terms
        if isinstance(rows.student, Head):
            student = rows.student.logits(self.wide)
        else:
            student = rows.student.clone() if any(self.wanted) else rows.student
        upstream = rows.upstream
        if not isinstance(self.unit, float) or self.unit != 1.0:
            upstream = student.new_full(student.shape[:1], 1.0, dtype=torch.float32) / self.unit
        scalars = rows.temperature, terms.soft_weight, terms.hard_weight, terms.soft_count, terms.hard_count
        vectors = rows.labels, rows.soft_mask, terms.class_weights
        how = {"gradient": "inplace" if any(self.wanted) else "no", "upstream": upstream}
        if isinstance(rows.teacher, Given) and rows.teacher.ids is not None:
            teacher = rows.teacher.ids, rows.teacher.values
            made = self.kernels.topk_loss(
                student, *teacher, *vectors, *scalars, terms.settings, terms.shift, terms.tail, **how
            )
        else:
            values = rows.teacher.logits(self.wide) if isinstance(rows.teacher, Head) else rows.teacher
            values = values.values if isinstance(values, Given) else values
            made = self.kernels.row_loss(student, values, *vectors, *scalars, terms.settings, **how)
            del values
        for total, value in zip(self.totals, made[:3], strict=True):
            if self.each:
                total[part] = value
            else:
                total += value
        if isinstance(rows.student, Head):
            self.gradients.add(part, rows.student, student)
        elif self.gradients.hidden is not None:
            self.gradients.hidden[part] = student

    def made(self, count: int, index: Tensor | None) -> Made:
        """The results for all `count` rows of the call, of which these are those at `index`."""
        hidden, weight, bias = self.gradients.results()
        totals = spread(self.totals, index, count, dim=1) if self.each else self.totals
        loss, soft, hard = totals.to(real_dtype(self.rows.values))
        return Made(loss, soft, hard, None if hidden is None else spread(hidden, index, count), weight, bias, self.unit)
