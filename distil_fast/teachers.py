"""What may stand in the place of `teacher_logits`: log-probabilities, probabilities, the top k, or hidden states.

Plain holders of tensors: what they mean to a loss is said here, the checks are made where a loss takes them. It knows
nothing of kernels. Next: functional.py; docs/math.md, "Forms of teacher".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True)
class LogProbs:
    """A teacher's log-probabilities `[..., V]`, already at temperature T: T then divides the student's logits alone.

    Each row is normalised; one whose probabilities sum to more than 1 is an error (above rounding).
    """

    log_probs: Tensor


@dataclass(frozen=True)
class Probs:
    """A teacher's probabilities `[..., V]`, already at temperature T: T then divides the student's logits alone.

    Each row is normalised; one that sums to more than 1 is an error (above rounding). Log-probabilities are more
    exact: of a probability near 0 a half precision keeps nothing.
    """

    probs: Tensor


@dataclass(frozen=True)
class TopK:
    """The k likeliest columns of a teacher's distribution, already at temperature T.

    Args:
        ids: `[..., k]` integers, different within a row; -1 pads a row of fewer than k entries.
        log_probs: `[..., k]` their log-probabilities in the whole distribution, at temperature T.
        tail: what becomes of the mass that is missing to 1. "bucket": one more outcome, compared with the student's
            mass outside the k. "renormalise": both models are renormalised over the k. "ignore": the sum over the k
            stops there; the student keeps its own normalisation.
    """

    ids: Tensor
    log_probs: Tensor
    tail: str = "bucket"


@dataclass(frozen=True)
class Hidden:
    """A teacher's last hidden states and its head: logits = softcap(scale (hidden weight^T + bias)), made in chunks.

    Args:
        hidden: `[..., H]`, of the student's leading shape.
        weight: `[V, H]`, of the same dtype.
        bias: `[V]`, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


Teacher: TypeAlias = LogProbs | Probs | TopK | Hidden
