"""TRL's two divergence losses with TRL's arguments and meaning, computed by ours: from logits, and from hidden states.

M = (1 - beta) S + beta T; beta = 0 is KL(T || S), beta = 1 is KL(S || T), between them beta KL(T || M) +
(1 - beta) KL(S || M) (Agarwal et al. 2023, equation 1); never times T^2. They know no trainer. Next: trl.py, which puts
them in their places; docs/integrations.md for where TRL's own numbers differ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distil_fast import JSD, divergence_loss, linear_divergence_loss

IGNORED = -100


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | float | None = None,
) -> Tensor:
    """The divergence of the rows whose label is not -100: their sum over `num_items_in_batch`, or as `reduction` says.

    Args:
        student_logits, teacher_logits: `[..., V]`, already shifted; the teacher's without gradient.
        labels: `[...]`, shifted likewise; only -100 matters. None: every row counts.
        beta: 0 to 1, as above.
        reduction: "batchmean", over the rows that count (with labels None: over the first dimension, as in TRL); "sum";
            "mean", over the elements of those rows; "rows", a number a row, `[rows that count]`, or `[...]` without
            labels, which stands for TRL's `[..., V]` wherever that is only masked and summed. `num_items_in_batch`
            overrides all four, as in TRL.

    Returns:
        float32 (float64 for float64 logits). No row that counts: 0 with zero gradient.

    Raises:
        ValueError, TypeError: as `distil_fast.divergence_loss`.
    """
    mask = None if labels is None else labels != IGNORED
    count: Tensor | float | None = None
    kind = "mean"
    if num_items_in_batch is not None:
        count = _scalar(num_items_in_batch, student_logits)
    elif reduction == "batchmean":
        count = float(student_logits.shape[0]) if mask is None else None
    elif reduction == "mean":
        rows = math.prod(student_logits.shape[:-1]) if mask is None else mask.sum()
        count = rows * float(student_logits.shape[-1])
    else:
        kind = "none" if reduction == "rows" else "sum"
    loss = divergence_loss(
        student_logits,
        teacher_logits,
        divergence=_divergence(float(beta)),
        temperature=temperature,
        mask=mask,
        count=count,
        reduction=kind,
    )
    return loss[mask] if kind == "none" and mask is not None else loss


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | float | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence of the tokens whose mask is not 0, from hidden states, without the logits of a batch.

    Args:
        student_hidden_states, teacher_hidden_states: `[B, K, H]`, each of its own width; no gradient for the teacher.
        student_lm_head_weight, teacher_lm_head_weight: `[V, H]`; a DTensor is gathered. Of a teacher's head with more
            rows than the student's the first V take part, as in TRL.
        completion_mask: `[B, K]`.
        num_items_in_batch: the sum is divided by it. None: by the number of tokens that count.

    Returns:
        The loss; the sum over those tokens of the student's entropy at `temperature`, in nats, without gradient; their
        number. No token that counts: 0, 0, 0, with zero gradient.

    Raises:
        ValueError, TypeError: as `distil_fast.linear_divergence_loss`.
    """
    weight, bias = _whole(student_lm_head_weight, student_lm_head_bias, student_hidden_states.dtype)
    teacher_weight, teacher_bias = _whole(teacher_lm_head_weight, teacher_lm_head_bias, teacher_hidden_states.dtype)
    valid = completion_mask.flatten() != 0
    rows = valid.nonzero().squeeze(1)  # the call's one wait for a GPU: both losses below get the rows that count alone
    student = student_hidden_states.flatten(0, -2)[rows]
    vocab = weight.shape[0]
    loss = linear_divergence_loss(
        student,
        weight,
        teacher_hidden_states.flatten(0, -2)[rows],
        teacher_weight,
        student_bias=bias,
        teacher_bias=teacher_bias,
        divergence=_divergence(float(beta)),
        temperature=temperature,
        count=None if num_items_in_batch is None else _scalar(num_items_in_batch, student),
        student_logit_scale=student_logit_scale,
        student_softcap=student_final_logit_softcapping,
        teacher_logit_scale=teacher_logit_scale,
        teacher_softcap=teacher_final_logit_softcapping,
        vocab_size=vocab if teacher_weight.shape[0] > vocab else None,
    )
    entropy = _entropy(student, weight, bias, student_logit_scale, student_final_logit_softcapping, temperature)
    return loss, entropy, valid.sum()


@torch.no_grad()
def _entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, temperature: float
) -> Tensor:
    """Summed over the rows: log V - KL(q || uniform), a loss whose teacher is one row of zeros, the same for all.

    It costs one more product with the student's head, and one reading of each chunk of logits.
    """
    vocab = weight.shape[0]
    divergence = linear_divergence_loss(
        hidden,
        weight,
        hidden.new_zeros(vocab).expand(hidden.shape[0], vocab),
        None,
        student_bias=bias,
        divergence="reverse_kl",
        temperature=temperature,
        student_logit_scale=scale,
        student_softcap=softcap,
        reduction="sum",
    )
    return hidden.shape[0] * math.log(vocab) - divergence


def _divergence(beta: float) -> str | JSD:
    return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta) or JSD(beta)


def _scalar(count: Tensor | float, values: Tensor) -> Tensor | float:
    """As ours take a count: transformers' may be on another device, or of shape [1]."""
    return count.to(values.device).reshape(()) if isinstance(count, Tensor) else count


def _whole(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A head that FSDP2 shards, gathered once; another as it is."""
    if isinstance(weight, DTensor):
        weight = weight.full_tensor().to(dtype)
    return weight, bias.full_tensor() if isinstance(bias, DTensor) else bias
