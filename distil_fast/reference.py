"""The maths in plain differentiable torch: the definition, the oracle of the tests, the backend of last resort.

It knows nothing of kernels, and copies [rows, V] as often as torch likes. In fp64 it is exact; in fp32 it has the
rounding of any autograd formula. Next: reference_divergences.py and reference_pairs.py, whose names are names of this
file too; docs/math.md for the derivations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distil_fast.reference_divergences import DIVERGENCES as DIVERGENCES
from distil_fast.reference_divergences import JSD as JSD
from distil_fast.reference_divergences import AlphaBeta as AlphaBeta
from distil_fast.reference_divergences import Divergence as Divergence
from distil_fast.reference_divergences import ForwardKL as ForwardKL
from distil_fast.reference_divergences import Hellinger as Hellinger
from distil_fast.reference_divergences import ReverseKL as ReverseKL
from distil_fast.reference_divergences import SkewedKL as SkewedKL
from distil_fast.reference_divergences import SkewedReverseKL as SkewedReverseKL
from distil_fast.reference_divergences import SoftCrossEntropy as SoftCrossEntropy
from distil_fast.reference_divergences import TotalVariation as TotalVariation
from distil_fast.reference_divergences import as_divergence as as_divergence
from distil_fast.reference_pairs import Number as Number
from distil_fast.reference_pairs import attention_loss as attention_loss
from distil_fast.reference_pairs import cosine_loss as cosine_loss
from distil_fast.reference_pairs import hidden_loss as hidden_loss
from distil_fast.reference_pairs import logit_mse as logit_mse
from distil_fast.reference_pairs import mse_loss as mse_loss
from distil_fast.reference_pairs import pair_loss as pair_loss
from distil_fast.reference_pairs import reduce as _reduce
from distil_fast.reference_pairs import share as _share
from distil_fast.reference_pairs import times as _times
from distil_fast.reference_pairs import used_rows_only as _used_rows_only
from distil_fast.reference_pairs import working as _working


class LossTerms(NamedTuple):
    """The loss to call backward on, and its two terms, detached and before their weights, for logging."""

    loss: Tensor
    soft: Tensor
    hard: Tensor


class TripleTerms(NamedTuple):
    """DistilBERT's loss, and its three terms, detached and before their weights, for logging."""

    loss: Tensor
    ce: Tensor
    mlm: Tensor
    cos: Tensor


# ---------------------------------------------------------------------------------------------- rows


def _cut(logits: Tensor, vocab_size: int | None) -> Tensor:
    """The columns that take part."""
    return logits if vocab_size is None else logits[..., :vocab_size]


def _transformed(logits: Tensor, scale: float, cap: float) -> Tensor:
    """cap tanh(scale logits / cap), or scale logits where cap is 0; -inf, a masked column, stays."""
    if cap:
        masked = logits == -math.inf
        return torch.where(masked, -math.inf, cap * torch.tanh(torch.where(masked, 0.0, logits) * (scale / cap)))
    return logits * scale if scale != 1.0 else logits


def _as_logits(teacher: Tensor, form: str, temperature: Tensor) -> Tensor:
    """Logits that give, at this temperature, the distribution that the teacher's tensor holds."""
    if form == "logits":
        return teacher
    return (teacher if form == "log_probs" else teacher.log()) * temperature.unsqueeze(-1)


def _divergence_rows(
    student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor, divergence: Divergence
) -> Tensor:
    """D of each row, shape [...] of logits [..., V] and temperatures [...]."""
    temperature = temperature.unsqueeze(-1)
    scaled_student, scaled_teacher = student_logits / temperature, teacher_logits / temperature
    lse_student = scaled_student.logsumexp(-1, keepdim=True)
    lse_teacher = scaled_teacher.logsumexp(-1, keepdim=True)
    log_p, log_q = scaled_teacher - lse_teacher, scaled_student - lse_student
    # r is never the difference of two rounded log-probabilities; masked in both models, it does not matter
    masked = (student_logits == -math.inf) & (teacher_logits == -math.inf)
    difference = torch.where(masked, 0.0, student_logits) - torch.where(masked, 0.0, teacher_logits)
    r = difference / temperature - (lse_student - lse_teacher)
    return divergence.f(log_p, log_q, r, log_p.exp(), log_q.exp()).sum(-1)


def _hard_rows(logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    """Cross-entropy of each row, and z_loss times the square of its logsumexp: shape [...] of logits [..., V]."""
    lse = logits.logsumexp(-1)
    loss = lse - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        loss = (1.0 - label_smoothing) * loss + label_smoothing * (lse - logits.mean(-1))
    return loss + z_loss * lse.square() if z_loss else loss


def two_terms(
    student: Tensor,
    soft_rows: Callable[[Tensor, Tensor, Tensor], Tensor] | None,
    labels: Tensor | None,
    *,
    temperature: Number = 2.0,
    soft_weight: Number = 1.0,
    hard_weight: Number | None = None,
    soft_mask: Tensor | None = None,
    soft_count: Number | None = None,
    hard_count: Number | None = None,
    ignore_index: int = -100,
    t_squared: bool = True,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> LossTerms:
    """Soft and hard term of rows of logits: masks, denominators and weights, whatever the soft term is.

    soft_rows(student, used, temperature) is the soft term of each row; `used` says which rows count, and the others'
    logits are zeros, their temperatures 1.
    """
    leading = student.shape[:-1]
    zero = student.new_zeros(leading)
    hard_weight = (0.0 if labels is None else 1.0) if hard_weight is None else hard_weight
    soft_weight, hard_weight = (
        torch.as_tensor(w, dtype=student.dtype, device=student.device) for w in (soft_weight, hard_weight)
    )

    soft, soft_share = zero, zero
    if soft_rows is not None:
        temperature = torch.as_tensor(temperature, dtype=student.dtype, device=student.device).expand(leading)
        rows = zero + 1.0 if soft_mask is None else soft_mask.to(student.dtype)
        soft_share = _share(rows, soft_count, reduction) * (soft_weight != 0)
        used = soft_share != 0
        temperature = torch.where(used, temperature, 1.0)
        soft = soft_rows(_used_rows_only(student, used), used, temperature)
        soft_share = soft_share * temperature**2 if t_squared else soft_share
        soft_share = torch.where(used, soft_share, 0.0)

    hard, hard_share = zero, zero
    if labels is not None:
        valid = labels != ignore_index
        rows = valid.to(student.dtype)
        if class_weights is not None:
            rows = torch.where(valid, class_weights.to(student.dtype)[torch.where(valid, labels, 0).long()], 0.0)
        hard_share = _share(rows, hard_count, reduction) * (hard_weight != 0)
        used = hard_share != 0
        hard = _hard_rows(_used_rows_only(student, used), torch.where(used, labels, 0).long(), label_smoothing, z_loss)

    soft, hard = _times(soft_share, soft), _times(hard_share, hard)
    loss = _reduce(soft_weight * soft + hard_weight * hard, reduction)
    return LossTerms(loss, _reduce(soft, reduction).detach(), _reduce(hard, reduction).detach())


def student_rows(logits: Tensor, vocab_size: int | None, scale: float, softcap: float | None) -> Tensor:
    """The student's logits as both terms see them: cut, scaled and capped, in the precision of the sums."""
    return _transformed(_cut(_working(logits), vocab_size), scale, softcap or 0.0)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = None,
    *,
    temperature: Number = 2.0,
    divergence: str | Divergence = "forward_kl",
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    teacher_form: str = "logits",
    **options: Any,
) -> LossTerms:
    """`distil_fast.distillation_loss` in plain torch; the arguments mean the same (`inplace` does not exist here).

    teacher_form says what `teacher_logits` holds: "logits", "log_probs" or "probs".
    """
    student = student_rows(student_logits, vocab_size, student_logit_scale, student_softcap)
    if teacher_logits is None:
        return two_terms(student, None, labels, **options)
    given = _cut(_working(teacher_logits).to(student.dtype), vocab_size)

    def soft_rows(student: Tensor, used: Tensor, temperature: Tensor) -> Tensor:
        teacher = _transformed(_used_rows_only(given, used), teacher_logit_scale, teacher_softcap or 0.0)
        return _divergence_rows(
            student, _as_logits(teacher, teacher_form, temperature), temperature, as_divergence(divergence)
        )

    return two_terms(student, soft_rows, labels, temperature=temperature, **options)


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """hidden weight^T + bias, in float32 at least."""
    hidden = _working(hidden)
    return torch.nn.functional.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    **options: Any,
) -> LossTerms:
    """`distil_fast.linear_distillation_loss` in plain torch, with the whole logits; `options`: distillation_loss's."""
    student = head_logits(student_hidden, student_weight, student_bias)
    return distillation_loss(student, head_logits(teacher_hidden, teacher_weight, teacher_bias), labels, **options)


def divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: Number = 1.0,
    mask: Tensor | None = None,
    count: Number | None = None,
    t_squared: bool = False,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    teacher_form: str = "logits",
    reduction: str = "mean",
) -> Tensor:
    """`distil_fast.divergence_loss` in plain torch; `teacher_form` as in `distillation_loss`."""
    return distillation_loss(
        student_logits,
        teacher_logits,
        temperature=temperature,
        soft_mask=mask,
        soft_count=count,
        divergence=divergence,
        t_squared=t_squared,
        student_logit_scale=student_logit_scale,
        student_softcap=student_softcap,
        teacher_logit_scale=teacher_logit_scale,
        teacher_softcap=teacher_softcap,
        vocab_size=vocab_size,
        teacher_form=teacher_form,
        reduction=reduction,
    ).loss


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    count: Number | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`distil_fast.cross_entropy` in plain torch."""
    return distillation_loss(
        logits,
        None,
        labels,
        hard_count=count,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        z_loss=z_loss,
        student_logit_scale=logit_scale,
        student_softcap=softcap,
        vocab_size=vocab_size,
        reduction=reduction,
    ).loss


def softmax(logits: Tensor, temperature: Number = 1.0) -> Tensor:
    """`distil_fast.softmax` in plain torch."""
    return log_softmax(_working(logits), temperature).exp().to(logits.dtype)


def log_softmax(logits: Tensor, temperature: Number = 1.0) -> Tensor:
    """`distil_fast.log_softmax` in plain torch."""
    values = _working(logits)
    temperature = torch.as_tensor(temperature, dtype=values.dtype, device=values.device)
    return (values / (temperature.unsqueeze(-1) if temperature.dim() else temperature)).log_softmax(-1).to(logits.dtype)


# ---------------------------------------------------------------------------------------------- both together


def triple_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    attention_mask: Tensor,
    *,
    temperature: Number = 2.0,
    alpha_ce: Number = 5.0,
    alpha_mlm: Number = 2.0,
    alpha_cos: Number = 1.0,
    ce_count: Number | None = None,
    mlm_count: Number | None = None,
    cos_count: Number | None = None,
    restrict_ce_to_mask: bool = False,
) -> TripleTerms:
    """`distil_fast.triple_loss` in plain torch."""
    attention = attention_mask.bool()
    terms = distillation_loss(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        soft_weight=alpha_ce,
        hard_weight=alpha_mlm,
        soft_mask=labels != -100 if restrict_ce_to_mask else attention,
        soft_count=ce_count,
        hard_count=mlm_count,
    )
    cos = cosine_loss(student_hidden, teacher_hidden, attention, cos_count)
    return TripleTerms(terms.loss + alpha_cos * cos, terms.soft, terms.hard, cos.detach())
