"""The row loss with a top-k teacher in plain differentiable torch: definition, oracle, backend of last resort.

It knows nothing of kernels, and copies [rows, V] as often as torch likes. Next: reference.py, whose divergences,
options and hard term it shares; docs/math.md, "A top-k teacher".
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from distil_fast.reference import Divergence, LossTerms, Number, as_divergence, student_rows, two_terms

NEGLIGIBLE = 0.01  # of mass that is missing to 1 where the student has none outside the k: rounding, no outcome


def _logsumexp(values: Tensor) -> Tensor:
    """logsumexp over the last dimension, kept; -inf without a gradient where every entry is -inf."""
    empty = (values == -math.inf).all(-1, keepdim=True)
    return torch.where(empty, -math.inf, torch.where(empty, 0.0, values).logsumexp(-1, keepdim=True))


def _difference(log_q: Tensor, log_p: Tensor) -> Tensor:
    """r = log q - log p; 0 for an outcome that is impossible in both models."""
    impossible = (log_q == -math.inf) & (log_p == -math.inf)
    return torch.where(impossible, 0.0, log_q) - torch.where(impossible, 0.0, log_p)


def _outside(scaled: Tensor, index: Tensor, given: Tensor) -> Tensor:
    """The student's logits with -inf at the ids."""
    times = torch.zeros_like(scaled, dtype=torch.int32).scatter_add(-1, index, given.to(torch.int32))
    return scaled.masked_fill(times > 0, -math.inf)


def _bucket(log_p: Tensor, log_q_tail: Tensor) -> Tensor:
    """log of the teacher's missing mass, max(0, 1 - sum p); none where it is negligible and the student has none."""
    missing = 1.0 - log_p.exp().sum(-1, keepdim=True)
    negligible = (missing <= NEGLIGIBLE) & (log_q_tail == -math.inf)
    return torch.where(negligible, 0.0, missing.clamp(min=0.0)).log()


def _topk_rows(
    student: Tensor, ids: Tensor, log_probs: Tensor, temperature: Tensor, divergence: Divergence, tail: str
) -> Tensor:
    """D of each row, shape [...] of logits [..., V], ids and log_probs [..., k] and temperatures [...]."""
    scaled = student / temperature.unsqueeze(-1)
    given = ids >= 0
    index = torch.where(given, ids, 0).long()
    log_p = torch.where(given, log_probs, -math.inf)
    log_q = torch.where(given, scaled.gather(-1, index), -math.inf)
    if tail == "renormalise":
        empty = ~given.any(-1, keepdim=True)
        log_p = log_p - torch.where(empty, 0.0, log_p.logsumexp(-1, keepdim=True))
        log_q = log_q - torch.where(empty, 0.0, torch.where(empty, 0.0, log_q).logsumexp(-1, keepdim=True))
    else:
        lse = scaled.logsumexp(-1, keepdim=True)
        log_q = log_q - lse
        if tail == "bucket":
            log_q_tail = _logsumexp(_outside(scaled, index, given)) - lse
            log_p = torch.cat([log_p, _bucket(log_p, log_q_tail)], -1)
            log_q = torch.cat([log_q, log_q_tail], -1)
    return divergence.f(log_p, log_q, _difference(log_q, log_p), log_p.exp(), log_q.exp()).sum(-1)


def topk_loss(
    student_logits: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None = None,
    *,
    tail: str = "bucket",
    temperature: Number = 2.0,
    divergence: str | Divergence = "forward_kl",
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    vocab_size: int | None = None,
    **options: Any,
) -> LossTerms:
    """`distil_fast.distillation_loss` with a `TopK` teacher in plain torch; `options` are its other ones.

    Of each row the outcomes are its ids i (-1: no entry), with p_i = exp(log_probs_i) and q = softmax(s / T):

        bucket       D = sum_i f(p_i, q_i) + f(1 - sum_i p_i, 1 - sum_i q_i)
        renormalise  D = sum_i f(p_i / sum p, q_i / sum q)
        ignore       D = sum_i f(p_i, q_i)
    """
    student = student_rows(student_logits, vocab_size, student_logit_scale, student_softcap)
    given = log_probs.to(student.dtype)

    def soft_rows(student: Tensor, used: Tensor, temperature: Tensor) -> Tensor:
        used_ids = torch.where(used.unsqueeze(-1), ids, -1)
        return _topk_rows(student, used_ids, given, temperature, as_divergence(divergence), tail)

    return two_terms(student, soft_rows, labels, temperature=temperature, **options)
