"""The divergences: what each is, its parameters and their ranges, and the table of their names.

A divergence is D = sum_j f_j, f_j a function of log p, log q, r = log q - log p, p and q, with p the teacher's
probability and q the student's. Here autograd derives the gradient; the kernels' twins state it as a second term. They
know neither logits nor rows. Next: reference.py, which makes r; csrc/divergences.h, the fused twin; docs/math.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distil_fast.reference_pairs import times


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
        return -times(p, r)


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(student || teacher) = sum_j q_j (log q_j - log p_j). Gu et al. 2023 (MiniLLM), section 2.1."""

    name: ClassVar[str] = "reverse_kl"

    @property
    def shift(self) -> float:
        return -1.0

    def f(self, log_p: Tensor, log_q: Tensor, r: Tensor, p: Tensor, q: Tensor) -> Tensor:
        return times(q, r)


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
        return -self.beta * times(p, m_p) - (1.0 - self.beta) * times(q, m_q)


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
        return -times(p, _log_mixed(self.alpha, r))


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
        return -times(q, _log_mixed(self.alpha, -r))


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
        return -times(p, log_q)


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
