"""The maths in plain differentiable torch: the definition, the oracle of the tests, the backend of last resort.

It knows nothing of kernels, and copies [rows, V] as often as torch likes. In fp64 it is exact; in fp32 it has the
rounding of any autograd formula. Next: docs/math.md for the derivations, csrc/divergences.h for the fused twin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

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
# A divergence is D = sum_j f_j, f_j a function of log p, log q, r = log q - log p, p and q, with p the teacher's
# probability and q the student's. Here autograd derives the gradient; the kernels' twins state it as a second term.


def _log_mixed(weight: float, r: Tensor) -> Tensor:
    """log m - log p of m = weight p + (1 - weight) q, by whichever of p and q is the larger: no exponential overflows,
    and -inf on one side is fine."""
    from_p = torch.log1p((1.0 - weight) * torch.expm1(r.clamp(max=0)))
    from_q = torch.log1p(weight * torch.expm1((-r).clamp(max=0)))
    return torch.where(r > 0, r + from_q, from_p)


def _inside(name: str, parameter: object, what: str) -> None:
    """A mixture's weight: a number inside (0, 1)."""
    if not isinstance(parameter, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(parameter).__name__}.")
    if not 0.0 < parameter < 1.0:
        raise ValueError(f"{name}: expected a number inside (0, 1), got {parameter}. {what}")


@dataclass(frozen=True)
class Divergence:
    """Base of the divergences: a name for the kernels' tables, and at most two run-time parameters.

    `shift` says what the kernels' twins add so that no term is negative and g = 0 where p = q: shift (q - p) to f and
    shift q to g. Over a whole distribution both come to nothing; over a part of one they are taken off again.
    """

    name: ClassVar[str]

    @property
    def parameters(self) -> tuple[float, float]:
        return 0.0, 0.0

    @property
    def shift(self) -> float:
        return 0.0

    def f(self, log_p: Tensor, log_q: Tensor, r: Tensor, p: Tensor, q: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(teacher || student) = sum_j p_j (log p_j - log q_j). Hinton et al. 2015, section 2."""

    name: ClassVar[str] = "forward_kl"

    @property
    def shift(self) -> float:
        return 1.0

    def f(self, log_p: Tensor, log_q: Tensor, r: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return -_times(p, r)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(student || teacher) = sum_j q_j (log q_j - log p_j). Gu et al. 2023 (MiniLLM), section 2.1."""

    name: ClassVar[str] = "reverse_kl"

    @property
    def shift(self) -> float:
        return -1.0

    def f(self, log_p: Tensor, log_q: Tensor, r: Tensor, p: Tensor, q: Tensor) -> Tensor:
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
        _inside(
            "JSD(beta)",
            self.beta,
            "The divergence is 0 for every pair of models at both ends; where other libraries switch to a KL there, "
            "say 'forward_kl' (their beta = 0) or 'reverse_kl' (their beta = 1).",
        )

    @property
    def parameters(self) -> tuple[float, float]:
        return self.beta, 0.0

    def f(self, log_p: Tensor, log_q: Tensor, r: Tensor, p: Tensor, q: Tensor) -> Tensor:
        m_p = _log_mixed(self.beta, r)
        m_q = _log_mixed(1.0 - self.beta, -r)
        return -self.beta * _times(p, m_p) - (1.0 - self.beta) * _times(q, m_q)


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """Total variation distance: sum_j |p_j - q_j| / 2. Wen et al. 2023 (f-DISTILL), section 3.

    Its gradient jumps where p_j = q_j, and is 0 there.
    """

    name: ClassVar[str] = "total_variation"

    def f(self, log_p: Tensor, log_q: Tensor, r: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return 0.5 * (p - q).abs()


@dataclass(frozen=True)
class SkewedKL(Divergence):
    """Skewed KL(teacher || alpha teacher + (1 - alpha) student), 0 < alpha < 1. Ko et al. 2024 (DistiLLM), equation 4.

    Raises:
        ValueError: alpha is not inside (0, 1).
    """

    alpha: float = 0.1
    name: ClassVar[str] = "skewed_kl"

    def __post_init__(self) -> None:
        _inside("SkewedKL(alpha)", self.alpha, "At 0 it is 'forward_kl', at 1 it is 0 for every pair of models.")

    @property
    def parameters(self) -> tuple[float, float]:
        return self.alpha, 0.0

    @property
    def shift(self) -> float:
        return 1.0 - self.alpha

    def f(self, log_p: Tensor, log_q: Tensor, r: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return -_times(p, _log_mixed(self.alpha, r))


@dataclass(frozen=True)
class SkewedReverseKL(Divergence):
    """Skewed reverse KL(student || alpha student + (1 - alpha) teacher), 0 < alpha < 1. Ko et al. 2024, section 3.1.

    Raises:
        ValueError: alpha is not inside (0, 1).
    """

    alpha: float = 0.1
    name: ClassVar[str] = "skewed_reverse_kl"

    def __post_init__(self) -> None:
        _inside("SkewedReverseKL(alpha)", self.alpha, "At 0 it is 'reverse_kl', at 1 it is 0 for every pair of models.")

    @property
    def parameters(self) -> tuple[float, float]:
        return self.alpha, 0.0

    @property
    def shift(self) -> float:
        return self.alpha - 1.0

    def f(self, log_p: Tensor, log_q: Tensor, r: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return -_times(q, _log_mixed(self.alpha, -r))


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """sum_j (a/(a+b) p_j^(a+b) + b/(a+b) q_j^(a+b) - p_j^a q_j^b) / (a b), a = alpha > 0, b = beta > 0.

    Cichocki et al. 2011, equation 19; for distillation Wang et al. 2025 (ABKD), equation 5. (1, 0) would be the forward
    KL, (0, 1) the reverse one, (1/2, 1/2) is four times the squared Hellinger distance.

    Raises:
        ValueError: alpha or beta is not a finite number above 0.
    """

    alpha: float = 0.2
    beta: float = 0.7
    name: ClassVar[str] = "alpha_beta"

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not isinstance(value, (int, float)):
                raise TypeError(f"AlphaBeta({name}): expected a number, got {type(value).__name__}.")
            if not 1e-3 <= value <= 1e3:
                raise ValueError(
                    f"AlphaBeta({name}): expected a number from 0.001 to 1000, got {value}. The limits at 0 are "
                    "'forward_kl' (alpha = 1, beta = 0) and 'reverse_kl' (alpha = 0, beta = 1)."
                )

    @property
    def parameters(self) -> tuple[float, float]:
        return self.alpha, self.beta

    def f(self, log_p: Tensor, log_q: Tensor, r: Tensor, p: Tensor, q: Tensor) -> Tensor:
        a, b, both = self.alpha, self.beta, self.alpha + self.beta
        pure = a / both * (both * log_p).exp() + b / both * (both * log_q).exp()
        return (pure - (a * log_p + b * log_q).exp()) / (a * b)


@dataclass(frozen=True)
class Hellinger(Divergence):
    """Squared Hellinger distance: sum_j (sqrt p_j - sqrt q_j)^2 / 2 = 1 - sum_j sqrt(p_j q_j). Hellinger 1909."""

    name: ClassVar[str] = "hellinger"

    def f(self, log_p: Tensor, log_q: Tensor, r: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square()


@dataclass(frozen=True)
class SoftCrossEntropy(Divergence):
    """Cross-entropy with the teacher's probabilities: -sum_j p_j log q_j = KL(teacher || student) + H(teacher).

    The form of Hinton et al. 2015, and of libraries whose "KD loss" is not 0 for equal models; the gradient is the
    forward KL's.
    """

    name: ClassVar[str] = "soft_cross_entropy"

    @property
    def shift(self) -> float:
        return 1.0

    def f(self, log_p: Tensor, log_q: Tensor, r: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return -_times(p, log_q)


DIVERGENCES: dict[str, type[Divergence]] = {
    d.name: d
    for d in (
        ForwardKL,
        ReverseKL,
        JSD,
        TotalVariation,
        SkewedKL,
        SkewedReverseKL,
        AlphaBeta,
        Hellinger,
        SoftCrossEntropy,
    )
}


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
