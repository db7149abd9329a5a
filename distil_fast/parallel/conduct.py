"""From a shard of the logits to a row's values, totals and gradient: local steps, with all-reduces between them.

Two sums over the ranks serve the cross-entropy and both KL divergences, a third the other divergences. It knows rows,
and no reduction over them, no autograd, no option's default. Next: agreement.py for the all-reduces, rows.py for what
is made of the sums, backends/shards.py for the local steps.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from distil_fast import reference
from distil_fast.backends import shards, shards_plain
from distil_fast.backends.shards import Shard
from distil_fast.parallel import agreement, rows
from distil_fast.parallel.agreement import Place, Ranks

FROM_SUMS = ("forward_kl", "reverse_kl")  # what needs no third all-reduce


class Measured(NamedTuple):
    """Each row's divergence and hard term, unweighted, and what its gradient needs: float64 [rows]."""

    soft: Tensor
    hard: Tensor
    totals: Tensor  # [rows, TOTALS]
    labels: Tensor | None  # int64 [rows]: the column of this shard, or -1


def _steps(shard: Shard) -> ModuleType:
    return shards if shards.native_serves(shard) else shards_plain


def statistics(shard: Shard) -> tuple[Tensor, Tensor]:
    """Maxima [rows, 2] and sums of this shard alone: one read of the logits."""
    maxima, sums = _steps(shard).statistics(shard)
    return maxima, sums


def measure(
    ranks: Ranks, place: Place, shard: Shard, labels: Tensor | None, own: tuple[Tensor, Tensor], largest: Tensor
) -> Measured:
    """The rows' values, the same on every rank: one all-reduce, or two.

    labels: int64 [rows] in the whole vocabulary, any in rows without one; own: this shard's `statistics`; largest:
    maxima [rows, 2] of all shards.
    """
    maxima, sums = own
    columns = rows.to_largest(shard, sums, maxima, largest)
    names: list[str] = []
    local = None
    if shard.teacher is not None:
        names += ["z_s", "z_t", "gap", "tail", "lean"]
    if labels is not None:
        local, here, logit = _label(place, shard, labels)
        columns["label"] = torch.where(here, logit - largest[:, 0], 0.0)
        exponential = torch.where(here, columns["label"].exp(), 0.0)
        columns["rest"] = rows.rest_of(columns, maxima, here, logit, exponential)
        names += ["z_h", "rest", "label", *(["shifted"] if shard.settings.label_smoothing else [])]
    summed = agreement.total(ranks, torch.stack([columns[name] for name in names]))
    columns = dict(zip(names, summed.unbind(), strict=True))
    return _values(ranks, place, shard, columns, largest, local)


def _values(
    ranks: Ranks, place: Place, shard: Shard, sums: rows.Columns, largest: Tensor, local: Tensor | None
) -> Measured:
    soft = hard = torch.zeros_like(largest[:, 0])
    found = {name: x for name, x in sums.items() if name in shards.TOTALS} | {"ref_s": largest[:, 0]}
    if local is not None:
        hard, found["lse_slope"] = rows.hard_values(shard, sums, sums["label"], largest[:, 0], place.vocabulary)
    if shard.teacher is not None:
        more, soft = rows.soft_totals(shard, sums, largest)
        found.update(more)
        if shard.settings.divergence not in FROM_SUMS:
            f_g = agreement.total(ranks, _steps(shard).divergence(shard, rows.as_totals(**found)))
            soft, found["g_sum"] = f_g.unbind(-1)
    return Measured(soft, hard, rows.as_totals(**found), local)


def _label(place: Place, shard: Shard, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The label's column in this shard or -1, whether it is here, and its logit."""
    local = labels - place.offset
    here = (shard.hard_weights != 0) & (local >= 0) & (local < place.width)
    local = torch.where(here, local, -1)
    index = local.clamp(min=0).view(*shard.student.shape[:-1], 1)
    logit = shard.student.detach().gather(-1, index).flatten().double()
    return local, here, reference._transformed(logit, *shard.settings.transforms[:2])


def gradient(place: Place, shard: Shard, found: Measured, out: Tensor) -> None:
    """The gradient of the student's shard, weighed as the shard's rows are: no communication."""
    _steps(shard).gradient(shard, found.totals, found.labels, place.vocabulary, out)
