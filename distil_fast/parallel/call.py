"""A call over sharded logits: what each row weighs, what the ranks must agree on, the loss, and its gradient.

Everything that can be wrong on one rank is found before the first all-reduce, in which every rank takes part. It knows
the options of a row loss, and no kernel. Next: conduct.py; linear.py, the same with the heads' matmuls inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distil_fast import backends, checks, ops
from distil_fast.backends.layout import CLASS_WEIGHT, MASK, real_dtype
from distil_fast.backends.settings import RowSettings
from distil_fast.backends.shards import Shard
from distil_fast.backends.values import check_labels, check_temperatures, check_weights
from distil_fast.options import row_options
from distil_fast.parallel import agreement, conduct
from distil_fast.parallel.agreement import Place
from distil_fast.reference import LossTerms
from distil_fast.reference_pairs import share, times


class Rows(NamedTuple):
    """What each row is and weighs, flat and float64: shares are 0 where a term has no such row."""

    labels: Tensor | None  # int64; any number where the hard share is 0
    temperatures: Tensor
    soft_shares: Tensor  # with T^2
    hard_shares: Tensor
    soft_weight: float
    hard_weight: float
    settings: RowSettings
    facts: dict[str, int]

    def part(self, part: slice | Tensor) -> Rows:
        """Some of the rows."""
        return self._replace(
            labels=None if self.labels is None else self.labels[part],
            temperatures=self.temperatures[part],
            soft_shares=self.soft_shares[part],
            hard_shares=self.hard_shares[part],
        )

    def weights(self, upstream: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
        """Of each row's gradient in both terms, times the gradient of its loss."""
        soft, hard = self.soft_shares * self.soft_weight, self.hard_shares * self.hard_weight
        return torch.where(soft == 0, 0.0, soft * upstream), torch.where(hard == 0, 0.0, hard * upstream)

    def shard(self, student: Tensor, teacher: Tensor | None, upstream: Tensor | float = 1.0) -> Shard:
        return Shard(student, teacher, self.temperatures, *self.weights(upstream), self.settings)

    def reduce(self, found: conduct.Measured, leading: torch.Size, real: torch.dtype) -> LossTerms:
        """Loss and terms from the rows' values."""
        soft = times(self.soft_shares, found.soft)
        hard = times(self.hard_shares, found.hard)
        loss = self.soft_weight * soft + self.hard_weight * hard
        none = self.settings.reduction == "none"
        return LossTerms(*((x.view(leading) if none else x.sum()).to(real) for x in (loss, soft, hard)))


def _number(name: str, quantity: float | Tensor, values: Tensor) -> float:
    """The value of a scalar, which the host must know: the ranks compare it."""
    if not isinstance(quantity, Tensor):
        return quantity
    number = checks.check_quantity(name, quantity.item(), values)
    assert isinstance(number, float)
    return number


def rows_of(
    values: Tensor,
    cols: int,
    dtypes: object,
    labels: Tensor | None,
    backend: str | None,
    soft: bool,
    **options: Any,
) -> Rows:
    """Options and rows, checked but for the vocabulary's size; `values` has one row for each label.

    cols: this shard's; dtypes: what else the ranks must have alike; soft: whether there is a teacher.
    """
    mask, class_weights = options["soft_mask"], options["class_weights"]
    if isinstance(class_weights, Tensor) and class_weights.dim() == 1:
        cols = class_weights.shape[0]  # of the whole vocabulary, whose size the ranks are yet to learn
    scalars, settings = row_options(values, cols, labels, **options, vocab_size=None)
    names = ("temperature", "soft_weight", "hard_weight", "soft_count", "hard_count")
    per_row = isinstance(scalars[0], Tensor) and scalars[0].dim() > 0
    numbers = [
        1.0 if name == "temperature" and per_row else _number(name, scalar, values)
        for name, scalar in zip(names, scalars, strict=True)
    ]
    settings = settings._replace(backend=backends.choose(values, backend))
    facts = agreement.facts(
        agreement.digest(tuple(values.shape[:-1])),
        agreement.digest(dtypes),
        agreement.digest((settings._replace(backend=""), numbers, labels is None, mask is None, class_weights is None)),
        agreement.checksum(labels),
        agreement.digest((agreement.checksum(mask), agreement.checksum(class_weights))),
        agreement.checksum(scalars[0]) if per_row and isinstance(scalars[0], Tensor) else 0,
    )
    rows = values.shape[:-1].numel()
    temperatures = torch.as_tensor(scalars[0], dtype=torch.float64, device=values.device).flatten().expand(rows)
    soft_shares = _soft_shares(values, mask, numbers, settings, soft)
    check_temperatures(temperatures, soft_shares != 0)
    if settings.t_squared:
        soft_shares = torch.where(soft_shares == 0, 0.0, soft_shares * temperatures.square())
    hard_shares = torch.zeros_like(soft_shares)
    if labels is not None:
        labels = labels.flatten().long()
        hard_shares = _hard_shares(labels, class_weights, numbers, settings)
    shares = soft_shares.contiguous(), hard_shares.contiguous()
    return Rows(labels, temperatures.contiguous(), *shares, numbers[1], numbers[2], settings, facts)


def _count(number: float) -> float | None:
    return None if number < 0 else number


def _soft_shares(
    values: Tensor, mask: Tensor | None, numbers: list[float], settings: RowSettings, soft: bool
) -> Tensor:
    shares = torch.ones(values.shape[:-1].numel(), dtype=torch.float64, device=values.device)
    if not soft or numbers[1] == 0:
        return torch.zeros_like(shares)
    if mask is not None:
        shares = mask.flatten().double()
        check_weights(MASK, shares)
    return share(shares, _count(numbers[3]), settings.reduction)


def _hard_shares(labels: Tensor, class_weights: Tensor | None, numbers: list[float], settings: RowSettings) -> Tensor:
    valid = labels != settings.ignore_index
    shares = valid.double()
    if numbers[2] == 0:
        return torch.zeros_like(shares)
    if class_weights is not None:
        weights = class_weights.double()
        check_weights(CLASS_WEIGHT, weights)
        check_labels(labels, valid, len(weights))
        shares = torch.where(valid, weights[torch.where(valid, labels, 0)], 0.0)
    return share(shares, _count(numbers[4]), settings.reduction)


def check_vocabulary(rows: Rows, place: Place, class_weights: Tensor | None) -> None:
    """What can be checked only when the vocabulary's size is known; raises on every rank alike."""
    if class_weights is not None:
        checks.check_class_weights(class_weights, class_weights, place.vocabulary, 0.0)
    if rows.labels is not None:
        check_labels(rows.labels, rows.hard_shares != 0, place.vocabulary)


def loss(
    group: dist.ProcessGroup | None,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    *,
    backend: str | None,
    **options: Any,
) -> LossTerms:
    """Any loss over rows of sharded logits; `options` are distillation_loss's that exist here, every one of them."""
    ranks = agreement.ranks_of(group)
    with torch.no_grad():
        try:
            rows, shard, own = _prepare(student_logits, teacher_logits, labels, backend, **options)
        except Exception as error:
            values = next((x for x in (student_logits, labels) if isinstance(x, Tensor)), torch.empty(0, 0))
            rows_there = values.shape[:-1].numel() if values is student_logits else values.numel()
            agreement.withdraw(ranks, error, rows_there, values.device)
        place, largest = agreement.agree(ranks, rows.facts, student_logits.shape[-1], own[0])
        check_vocabulary(rows, place, options["class_weights"])
        found = conduct.measure(ranks, place, shard, rows.labels, own, largest)
        terms = rows.reduce(found, student_logits.shape[:-1], real_dtype(student_logits))
    if not (student_logits.requires_grad and torch.is_grad_enabled()):
        return terms
    return LossTerms(_Sharded.apply(student_logits, shard.teacher, terms.loss, rows, place, found), *terms[1:])


def _prepare(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None, backend: str | None, **options: Any
) -> tuple[Rows, Shard, tuple[Tensor, Tensor]]:
    """All that one rank does by itself before it meets the others."""
    checks.check_values("student_logits", student_logits)
    if teacher_logits is not None:
        checks.check_pair("logits", student_logits, teacher_logits)
    student, teacher = (x if x is None else x.detach() for x in (student_logits, teacher_logits))
    assert student is not None
    dtypes = [None if x is None else (x.dtype, x.device.type) for x in (student, teacher)]
    rows = rows_of(student, student.shape[-1], dtypes, labels, backend, teacher is not None, **options)
    shard = rows.shard(student, teacher)
    return rows, shard, conduct.statistics(shard)


class _Sharded(torch.autograd.Function):
    """The gradient in backward, from the logits and the totals that forward found: without communication."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        value: Tensor,
        rows: Rows,
        place: Place,
        found: conduct.Measured,
    ) -> Tensor:
        ops._keep(ctx, student, teacher)
        ctx.call = rows, place, found
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        student, teacher = ops._kept(ctx)
        rows, place, found = ctx.call
        upstream = grads[0].detach().double().flatten().expand(len(rows.temperatures))
        with torch.no_grad():
            grad = torch.empty_like(student, memory_format=torch.contiguous_format)
            conduct.gradient(place, rows.shard(student.detach(), teacher, upstream), found, grad)
        return ops._final(grad), *(None,) * 5
