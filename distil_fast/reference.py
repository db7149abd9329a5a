"""The maths in plain differentiable torch: the definition, the oracle of the tests, the backend of last resort.

It knows nothing of kernels, and copies [rows, V] as often as torch likes. In fp64 it is exact; in fp32 it has the
rounding of any autograd formula. Next: docs/math.md for the derivations, csrc/divergences.h for the fused twin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

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


# ---------------------------------------------------------------------------------------------- divergences
# A divergence is D = sum_j f_j with f_j a function of (log p, r, p, q), where p is the teacher's probability, q the
# student's and r = log q - log p. Here autograd derives the gradient; the kernels' twins state it as a second term.


@dataclass(frozen=True)
class Divergence:
    """Base of the divergences: a name for the kernels' tables, and at most one run-time parameter."""

    name: ClassVar[str]

    @property
    def parameter(self) -> float:
        return 0.0

    def f(self, log_p: Tensor, r: Tensor, p: Tensor, q: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(teacher || student) = sum_j p_j (log p_j - log q_j). Hinton et al. 2015, section 2."""

    name: ClassVar[str] = "forward_kl"

    def f(self, log_p: Tensor, r: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return -_times(p, r)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(student || teacher) = sum_j q_j (log q_j - log p_j). Gu et al. 2023 (MiniLLM), section 2.1."""

    name: ClassVar[str] = "reverse_kl"

    def f(self, log_p: Tensor, r: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return _times(q, r)


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon divergence: beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S.

    0 < beta < 1. Agarwal et al. 2023 (GKD), equation 1. Both ends are 0 everywhere and therefore refused.

    Raises:
        ValueError: beta is not inside (0, 1).
    """

    beta: float = 0.5
    name: ClassVar[str] = "jsd"

    def __post_init__(self) -> None:
        if not isinstance(self.beta, (int, float)):
            raise TypeError(f"JSD(beta): expected a number, got {type(self.beta).__name__}.")
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"JSD(beta): expected 0 < beta < 1, got {self.beta}. The divergence is 0 for every pair of models "
                "at both ends; where other libraries switch to a KL there, say 'forward_kl' (their beta = 0) or "
                "'reverse_kl' (their beta = 1)."
            )

    @property
    def parameter(self) -> float:
        return self.beta

    def f(self, log_p: Tensor, r: Tensor, p: Tensor, q: Tensor) -> Tensor:
        # log m by whichever of p and q is the larger, so that no exponential overflows and -inf on one side is fine
        from_p = -torch.log1p((1.0 - self.beta) * torch.expm1(r.clamp(max=0)))  # log p - log m where r <= 0
        from_q = -torch.log1p(self.beta * torch.expm1((-r).clamp(max=0)))  # log q - log m where r >= 0
        log_p_m = torch.where(r > 0, from_q - r, from_p)
        log_q_m = torch.where(r > 0, from_q, from_p + r)
        return self.beta * _times(p, log_p_m) + (1.0 - self.beta) * _times(q, log_q_m)


DIVERGENCES: dict[str, type[Divergence]] = {d.name: d for d in (ForwardKL, ReverseKL, JSD)}


def as_divergence(divergence: str | Divergence) -> Divergence:
    """The divergence of a name (with its default parameter), or the object itself.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a divergence.
    """
    if isinstance(divergence, Divergence):
        return divergence
    if not isinstance(divergence, str):
        raise TypeError(
            f"divergence: expected a name or an object such as JSD(0.5), got {type(divergence).__name__}. "
            f"The names are {', '.join(DIVERGENCES)}."
        )
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: expected one of {', '.join(DIVERGENCES)}, got {divergence!r}.")
    return DIVERGENCES[divergence]()


# ---------------------------------------------------------------------------------------------- rows


def _divergence_rows(
    student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor, divergence: Divergence
) -> Tensor:
    """D of each row, shape [...] of logits [..., V] and temperatures [...]."""
    temperature = temperature.unsqueeze(-1)
    scaled_student, scaled_teacher = student_logits / temperature, teacher_logits / temperature
    lse_student = scaled_student.logsumexp(-1, keepdim=True)
    lse_teacher = scaled_teacher.logsumexp(-1, keepdim=True)
    log_p = scaled_teacher - lse_teacher
    # r is never the difference of two rounded log-probabilities; masked in both models, it does not matter
    masked = (student_logits == -math.inf) & (teacher_logits == -math.inf)
    difference = torch.where(masked, 0.0, student_logits) - torch.where(masked, 0.0, teacher_logits)
    r = difference / temperature - (lse_student - lse_teacher)
    return divergence.f(log_p, r, log_p.exp(), (scaled_student - lse_student).exp()).sum(-1)


def _cross_entropy_rows(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of each row, shape [...] of logits [..., V] and labels [...]."""
    log_q = logits.log_softmax(-1)
    loss = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        loss = (1.0 - label_smoothing) * loss - label_smoothing * log_q.mean(-1)
    return loss


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = None,
    *,
    temperature: Number = 2.0,
    soft_weight: Number = 1.0,
    hard_weight: Number | None = None,
    soft_mask: Tensor | None = None,
    soft_count: Number | None = None,
    hard_count: Number | None = None,
    ignore_index: int = -100,
    divergence: str | Divergence = "forward_kl",
    t_squared: bool = True,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> LossTerms:
    """`distil_fast.distillation_loss` in plain torch; the arguments mean the same (`inplace` does not exist here)."""
    student = _working(student_logits)
    leading = student.shape[:-1]
    zero = student.new_zeros(leading)
    hard_weight = (0.0 if labels is None else 1.0) if hard_weight is None else hard_weight
    soft_weight, hard_weight = (
        torch.as_tensor(w, dtype=student.dtype, device=student.device) for w in (soft_weight, hard_weight)
    )

    soft, soft_share = zero, zero
    if teacher_logits is not None:
        temperature = torch.as_tensor(temperature, dtype=student.dtype, device=student.device).expand(leading)
        rows = zero + 1.0 if soft_mask is None else soft_mask.to(student.dtype)
        soft_share = _share(rows, soft_count, reduction) * (soft_weight != 0)
        used = soft_share != 0
        soft = _divergence_rows(
            _used_rows_only(student, used),
            _used_rows_only(_working(teacher_logits).to(student.dtype), used),
            torch.where(used, temperature, 1.0),
            as_divergence(divergence),
        )
        soft_share = soft_share * temperature**2 if t_squared else soft_share
        soft_share = torch.where(used, soft_share, 0.0)

    hard, hard_share = zero, zero
    if labels is not None:
        valid = labels != ignore_index
        hard_share = _share(valid.to(student.dtype), hard_count, reduction) * (hard_weight != 0)
        used = hard_share != 0
        hard = _cross_entropy_rows(_used_rows_only(student, used), torch.where(used, labels, 0).long(), label_smoothing)

    soft, hard = _times(soft_share, soft), _times(hard_share, hard)
    loss = _reduce(soft_weight * soft + hard_weight * hard, reduction)
    return LossTerms(loss, _reduce(soft, reduction).detach(), _reduce(hard, reduction).detach())


def divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: Number = 1.0,
    mask: Tensor | None = None,
    count: Number | None = None,
    t_squared: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """`distil_fast.divergence_loss` in plain torch."""
    return distillation_loss(
        student_logits,
        teacher_logits,
        temperature=temperature,
        soft_mask=mask,
        soft_count=count,
        divergence=divergence,
        t_squared=t_squared,
        reduction=reduction,
    ).loss


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    count: Number | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
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
