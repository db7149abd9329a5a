"""Divergences of logits as users of eager torch write them, for every problem that has one.

Each is TRL's, torchtune's or DistilBERT's formula without their masks, mean over rows. It knows neither cases nor
inputs. Next: problems.py and linear.py, which use them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import distil_fast

BETA = 0.5  # of Jensen-Shannon divergences: TRL's default
LOG_SPACE_SLACK = 10.0  # where both models' rounded log-probabilities count, bfloat16 costs the gradient 5 %
Kind = str | distil_fast.JSD


def eager_divergence(kind: Kind, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The mean over rows of D(teacher, student) at a temperature, without T^2.

    `kind`: as the argument `divergence` of distil_fast's losses: "forward_kl", "reverse_kl", "soft_cross_entropy" or
    a JSD.
    """
    log_q = F.log_softmax(student / temperature, -1)
    if kind == "forward_kl":
        return F.kl_div(log_q, F.softmax(teacher / temperature, -1), reduction="batchmean")
    if kind == "soft_cross_entropy":
        return -(F.softmax(teacher / temperature, -1) * log_q).sum(-1).mean()
    log_p = F.log_softmax(teacher / temperature, -1)
    if kind == "reverse_kl":
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    assert isinstance(kind, distil_fast.JSD)
    return _jensen_shannon(log_q, log_p, kind.beta)


def _jensen_shannon(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """TRL's: both divergences from the mixture by log-sum-exp."""
    log_m = torch.logsumexp(torch.stack([log_q + math.log1p(-beta), log_p + math.log(beta)]), 0)
    of_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    of_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    return (beta * of_teacher + (1 - beta) * of_student).sum() / len(log_q)


def eager_top_k(student: Tensor, ids: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """The mean over rows of sum_k p (log p - log q) over the teacher's k columns, whose p stand at that temperature."""
    log_q = F.log_softmax(student / temperature, -1).gather(-1, ids)
    return (log_probs.exp() * (log_probs - log_q)).sum(-1).mean()
