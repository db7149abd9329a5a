"""Two tensors compared row by row, in plain torch, and what a row's share in a loss is: half of the reference.

It knows nothing of softmax, labels or divergences; in fp32 it has the rounding of any autograd formula, which is noise
where student and teacher all but meet. Next: reference.py, the other half; docs/math.md, sections 7 and 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = "float | Tensor"

# ---------------------------------------------------------------------------------------------- shares


def times(weight: Tensor, factor: Tensor) -> Tensor:
    """weight * factor, where a weight of 0 wins over an infinite factor, in the gradient too."""
    vanished = weight == 0
    return torch.where(vanished, 0.0, weight * torch.where(vanished, 0.0, factor))


def working(logits: Tensor) -> Tensor:
    """The logits in the precision of the sums: float64 stays, everything else becomes float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def used_rows_only(tensor: Tensor, used: Tensor) -> Tensor:
    """Unused rows become zeros, so that whatever they hold (nan, inf) reaches neither value nor gradient."""
    return torch.where(used.unsqueeze(-1), tensor, 0.0)


def share(rows: Tensor, count: Number | None, reduction: str) -> Tensor:
    """Each row's share in its term: rows / denominator, where the default denominator is the sum of the rows."""
    if reduction != "mean":
        return rows
    count = rows.sum() if count is None else torch.as_tensor(count, dtype=rows.dtype, device=rows.device)
    return torch.where(count == 0, 0.0, rows / torch.where(count == 0, 1.0, count))


def reduce(rows: Tensor, reduction: str) -> Tensor:
    return rows if reduction == "none" else rows.sum()


# ---------------------------------------------------------------------------------------------- two tensors, by rows

COSINE_EPS = 1e-12  # added to both squared norms, as ATen's cosine_embedding_loss does


def _cosine_rows(student: Tensor, teacher: Tensor) -> Tensor:
    squares = (student.square().sum(-1) + COSINE_EPS) * (teacher.square().sum(-1) + COSINE_EPS)
    return 1.0 - (student * teacher).sum(-1) / squares.sqrt()


def _squared_rows(student: Tensor, teacher: Tensor) -> Tensor:
    masked = (student == -math.inf) & (teacher == -math.inf)
    return torch.where(masked, 0.0, student - teacher).square().sum(-1)


def _kl_rows(student: Tensor, teacher: Tensor) -> Tensor:
    none = teacher == 0  # then it does not matter what the student has
    p, q = torch.where(none, 1.0, teacher), torch.where(none, 1.0, student)
    return torch.where(none, 0.0, p * (p.log() - q.log())).sum(-1)


_PAIRS = {"cosine": _cosine_rows, "squared": _squared_rows, "kl": _kl_rows}


def pair_loss(
    kind: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    count: Number | None = None,
    reduction: str = "mean",
    scale: float = 1.0,
) -> Tensor:
    """sum_r mask_r scale value(s_r, t_r) / sum_r mask_r; value: 1 - cos, |s - t|^2, or sum_j t_j log(t_j / s_j)."""
    student = working(student)
    rows = student.new_ones(student.shape[:-1]) if mask is None else mask.to(student.dtype)
    shares = share(rows, count, reduction)
    student, teacher = (used_rows_only(x.to(student.dtype), shares != 0) for x in (student, teacher))
    return reduce(times(shares, scale * _PAIRS[kind](student, teacher)), reduction)


def cosine_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    mask: Tensor | None = None,
    count: Number | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`distil_fast.cosine_loss` in plain torch."""
    return pair_loss("cosine", student_hidden, teacher_hidden, mask, count, reduction)


def mse_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    mask: Tensor | None = None,
    count: Number | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`distil_fast.mse_loss` in plain torch."""
    scale = 1.0 / student_hidden.shape[-1]
    return pair_loss("squared", student_hidden, teacher_hidden, mask, count, reduction, scale)


def logit_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    count: Number | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`distil_fast.logit_mse` in plain torch."""
    return pair_loss("squared", student_logits, teacher_logits, mask, count, reduction)


def hidden_loss(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    layer_map: Sequence[tuple[int, int]] | None = None,
    kind: str = "cosine",
    layer_weights: Sequence[Number] | None = None,
    projections: Sequence[Callable[[Tensor], Tensor] | None] | None = None,
    count: Number | None = None,
) -> Tensor:
    """`distil_fast.hidden_loss` in plain torch; projections: one, or None, for each pair of layers."""
    layers = [(i, i) for i in range(len(student_states))] if layer_map is None else layer_map
    weights = [1.0 / len(layers)] * len(layers) if layer_weights is None else layer_weights
    total = working(student_states[0]).new_zeros(())
    for (s, t), weight, project in zip(layers, weights, projections or [None] * len(layers), strict=True):
        student = student_states[s] if project is None else project(student_states[s])
        loss = cosine_loss if kind == "cosine" else mse_loss
        total = total + weight * loss(student, teacher_states[t], mask, count)
    return total


def attention_loss(
    student_attentions: Sequence[Tensor],
    teacher_attentions: Sequence[Tensor],
    attention_mask: Tensor | None = None,
    *,
    layer_map: Sequence[tuple[int, int]] | None = None,
    kind: str = "mse",
    count: Number | None = None,
) -> Tensor:
    """`distil_fast.attention_loss` in plain torch."""
    layers = [(i, i) for i in range(len(student_attentions))] if layer_map is None else layer_map
    total = working(student_attentions[0]).new_zeros(())
    for s, t in layers:
        student, teacher = student_attentions[s], teacher_attentions[t]
        mask = None if attention_mask is None else attention_mask.unsqueeze(1).expand(student.shape[:-1])
        rows = None if count is None else count * student.shape[1]
        how = ("kl", 1.0) if kind == "kl" else ("squared", 1.0 / student.shape[-1])
        total = total + pair_loss(how[0], student, teacher, mask, rows, "mean", how[1]) / len(layers)
    return total
