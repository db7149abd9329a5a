"""One shard of a vocabulary: its statistics, its part of a divergence, its gradient; by the C++ core or in plain torch.

The three steps know neither processes nor reductions: what they return is summed over the shards, and what they take
was. csrc/core.h says what the sums are; plain.py is the same in float64 torch, and serves what the core does not: GPUs,
and models with a logit scale or softcap. Next: distil_fast/parallel, which conducts them; docs/math.md, section
"Sharded vocabularies".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distil_fast import _C
from distil_fast.backends.layout import address, geometry, real_dtype
from distil_fast.backends.native import DIVERGENCE_CODE
from distil_fast.backends.settings import RowSettings

# Columns of a row's sums over a shard, and of its totals over all: ShardSums and ShardTotals of csrc/core.h.
SUMS = ("z_s", "z_t", "z_h", "gap", "tail", "lean", "rest", "shifted")
TOTALS = ("ref_s", "ref_t", "z_s", "z_t", "z_h", "rho", "centre", "g_sum", "rest", "lse_slope")
PLAIN_TRANSFORMS = (1.0, 0.0, 1.0, 0.0)

assert (len(SUMS), len(TOTALS)) == (_C.SHARD_SUMS, _C.SHARD_TOTALS)


class Shard(NamedTuple):
    """The columns that one process holds, and what each row weighs: float64 [rows], 0 where a term has no such row."""

    student: Tensor  # [..., V_r]
    teacher: Tensor | None
    temperatures: Tensor
    soft_weights: Tensor
    hard_weights: Tensor
    settings: RowSettings

    @property
    def of_teacher(self) -> bool:
        """Whether `tail` and `lean` are weighed by the teacher's probabilities (else by the student's)."""
        return self.settings.divergence == "forward_kl"


def distance(shard: Shard, ref_s: Tensor, ref_t: Tensor) -> tuple[Tensor, Tensor]:
    """What differences of the logits are relative to (Block::apart of csrc/cpu/table.h), and what that misses, over T,
    of the references' distance: 0 or nearly so, or all of it where they are too far apart to be subtracted."""
    real = real_dtype(shard.student)
    rounded = (ref_s.to(real) - ref_t.to(real)).double()
    rounded = torch.where(rounded.abs() < 1e6, rounded, 0.0)
    return rounded, (ref_s - ref_t - rounded) / shard.temperatures.view(-1, *(1,) * (ref_s.dim() - 1))


def native_serves(shard: Shard) -> bool:
    """Whether the C++ core computes a shard's steps; plain torch does otherwise."""
    settings = shard.settings
    return settings.backend == "native" and tuple(settings.transforms) == PLAIN_TRANSFORMS


def _rows(shard: Shard) -> tuple[int, int, int]:
    return shard.temperatures.data_ptr(), shard.soft_weights.data_ptr(), shard.hard_weights.data_ptr()


def _settings(shard: Shard) -> tuple[int, tuple[float, float], float]:
    first, second = shard.settings.parameters
    return DIVERGENCE_CODE[shard.settings.divergence], (first, second), shard.settings.label_smoothing


def statistics(shard: Shard) -> tuple[Tensor, Tensor]:
    """Maxima [rows, 2] of student and teacher, and SUMS relative to them: float64."""
    rows = shard.temperatures.shape[0]
    maxima = torch.empty(rows, 2, dtype=torch.float64)
    sums = torch.empty(rows, len(SUMS), dtype=torch.float64)
    shape, (student, teacher) = geometry(shard.student, shard.teacher)
    addresses = maxima.data_ptr(), sums.data_ptr()
    _C.shard_statistics(shape, student, teacher, _rows(shard), _settings(shard), shard.of_teacher, *addresses)
    return maxima, sums


def divergence(shard: Shard, totals: Tensor) -> Tensor:
    """Sums of f and of g over the shard: float64 [rows, 2]."""
    f_g = torch.empty(totals.shape[0], 2, dtype=torch.float64)
    shape, (student, teacher) = geometry(shard.student, shard.teacher)
    _C.shard_divergence(shape, student, teacher, _rows(shard), _settings(shard), totals.data_ptr(), f_g.data_ptr())
    return f_g


def gradient(shard: Shard, totals: Tensor, labels: Tensor | None, vocabulary: int, out: Tensor) -> None:
    """The gradient of the student's shard goes to `out`, which may be the student's tensor.

    labels: the column of this shard for each row, -1 where it is in another; `vocabulary` counts all shards' columns.
    """
    shape, (student, teacher, grad) = geometry(shard.student, shard.teacher, out)
    places = totals.data_ptr(), address(labels), vocabulary
    _C.shard_gradient(shape, student, teacher, _rows(shard), _settings(shard), *places, grad)
