"""What may stand in the place of `teacher_logits`: log-probabilities, probabilities, the top k, or hidden states.

Plain holders of tensors: what they mean to a loss is said here, the checks are made where a loss takes them. It knows
nothing of kernels. Next: functional.py; docs/math.md, "Forms of teacher".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
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
    """The k likeliest columns of a teacher's distribution, at temperature T: T then divides the student's logits alone.

    A row costs the loss one reading and one writing of the student's row; "renormalise" without a hard term reads k
    logits only. Any k columns will do; they need no order.

    Args:
        ids: `[..., k]` integers in [0, V), different within a row; -1 pads a row of fewer than k entries.
        log_probs: `[..., k]` their log-probabilities in the whole distribution, at temperature T, in any floating
            dtype (float64 only beside float64); without gradient. A row whose probabilities sum to more than 1, by
            more than rounding (0.1 %; 1 % in float16, 5 % in bfloat16), is an error. Beside an id of -1: anything.
        tail: what becomes of the mass that is missing to 1. "bucket": one more outcome, compared with the student's
            mass outside the k. "renormalise": both models are renormalised over the k. "ignore": the sum over the k
            stops there; the student keeps its own normalisation. docs/math.md, "A top-k teacher".
    """

    ids: Tensor
    log_probs: Tensor
    tail: str = "bucket"

    @classmethod
    def from_logits(cls, teacher_logits: Tensor, k: int, temperature: float | Tensor, tail: str = "bucket") -> TopK:
        """The k largest of a teacher's logits: ids (int64) and log softmax(t / T) there (float32; float64 of float64).

        For offline distillation store `ids.int()` and `log_probs.half()`, 6 bytes an entry, and later pass
        `TopK(ids, log_probs)`; the loss must then use the same T.

        Args:
            teacher_logits: `[..., V]`; no gradient flows into them.
            k: 1 to V.
            temperature: T, a number or one per row `[...]`: that of the loss.
            tail: as above.

        Raises:
            ValueError: k is not in 1 to V; a temperature that is not above 0.
        """
        if not 1 <= k <= teacher_logits.shape[-1]:
            raise ValueError(f"k: expected 1 to {teacher_logits.shape[-1]}, the teacher's columns, got {k}.")
        if not isinstance(temperature, Tensor) and not temperature > 0.0:
            raise ValueError(f"temperature: expected a number > 0, got {temperature}.")
        with torch.no_grad():
            values = teacher_logits if teacher_logits.dtype == torch.float64 else teacher_logits.float()
            by = torch.as_tensor(temperature, dtype=values.dtype, device=values.device).unsqueeze(-1)
            scaled = values / by
            top, ids = scaled.topk(k, -1)
            return cls(ids, top - scaled.logsumexp(-1, keepdim=True), tail)


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
