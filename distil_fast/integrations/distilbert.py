"""The original DistilBERT distiller's loss block in one call: what `Distiller.step` does between forward and backward.

It knows that block, its options and their names; nothing of models, masking or optimisers. Next: functional.py, which
has the terms; docs/integrations.md for the lines that it replaces.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from distil_fast import cosine_loss, distillation_loss, logit_mse

IGNORED = -100


class StepLosses(NamedTuple):
    """The weighted sum, with a gradient, and its terms before their weights, 0-d; a term of weight 0 is 0."""

    loss: Tensor
    ce: Tensor
    mlm: Tensor
    clm: Tensor
    mse: Tensor
    cos: Tensor


def step_losses(
    s_logits: Tensor,
    t_logits: Tensor,
    s_hidden_states: tuple[Tensor, ...] | None,
    t_hidden_states: tuple[Tensor, ...] | None,
    attention_mask: Tensor,
    lm_labels: Tensor,
    *,
    temperature: float = 2.0,
    alpha_ce: float = 0.5,
    alpha_mlm: float = 0.0,
    alpha_clm: float = 0.5,
    alpha_mse: float = 0.0,
    alpha_cos: float = 0.0,
    restrict_ce_to_mask: bool = False,
) -> StepLosses:
    """The losses of a micro-batch, as the authors' training code computes them (`Distiller.step`; Sanh et al. 2019).

    With A the tokens under the attention mask, or those with a label under `restrict_ce_to_mask`; M the tokens with a
    label, M' likewise after the shift to the next token; h the last hidden states of the tokens under the mask:

        ce   = T^2 / |A| sum_A KL(softmax(t / T) || softmax(s / T))    mse = 1 / |A| sum_A |s - t|^2
        mlm  = 1 / |M| sum_M -log softmax(s)[label]                    clm = the same over M', labels shifted
        cos  = 1 - cos(h_s, h_t), a mean over the tokens under the mask
        loss = alpha_ce ce + alpha_mlm mlm + alpha_clm clm + alpha_mse mse + alpha_cos cos

    Each term's mean is over its own positions of this micro-batch, as in the original: of ragged micro-batches that
    are accumulated the sum is not one large batch's. `triple_loss` takes counts, with which it is.

    Args:
        s_logits, t_logits: `[B, S, V]`, of one dtype or two, as in `distillation_loss`.
        s_hidden_states, t_hidden_states: as the models return them; the last are read. None is enough without
            `alpha_cos`.
        attention_mask: `[B, S]`, bool or integers, 0 for padding.
        lm_labels: `[B, S]`, -100 where a token has none.
        temperature, alpha_ce, alpha_mlm, alpha_clm, alpha_mse, alpha_cos, restrict_ce_to_mask: the original's options
            with its defaults. DistilBERT was trained with 2, 5, 2, 0, 0, 1 and False.

    Returns:
        StepLosses, float32 (float64 for float64 logits), to be read with `.item()` once in a while and not at every
        step. A term without a position is 0, where the original's is nan and ends the run.

    Raises:
        ValueError: both of `alpha_mlm` and `alpha_clm`, which the original excludes; no hidden states for `alpha_cos`.
        ValueError, TypeError, NotImplementedError: as `distillation_loss`.
    """
    if alpha_mlm > 0.0 and alpha_clm > 0.0:
        raise ValueError(f"alpha_clm: expected 0 beside alpha_mlm={alpha_mlm}, got {alpha_clm}. Pass alpha_clm=0.")
    if alpha_cos > 0.0 and (s_hidden_states is None or t_hidden_states is None):
        raise ValueError("s_hidden_states, t_hidden_states: expected both for alpha_cos, got None. Pass alpha_cos=0.")
    mask = lm_labels != IGNORED if restrict_ce_to_mask else attention_mask.bool()
    labels, alpha = lm_labels, alpha_mlm
    if alpha_clm > 0.0:  # each position's label is the next token; logits stay where they are
        labels, alpha = F.pad(lm_labels[..., 1:], (0, 1), value=IGNORED), alpha_clm
    soft_and_hard = distillation_loss(
        s_logits,
        t_logits,
        labels,
        temperature=temperature,
        soft_weight=alpha_ce,
        hard_weight=alpha,
        soft_mask=mask,
        ignore_index=IGNORED,
    )
    loss, hard, zero = soft_and_hard.loss, soft_and_hard.hard, torch.zeros_like(soft_and_hard.hard)
    mse = cos = zero
    if alpha_mse > 0.0:
        mse = logit_mse(s_logits, t_logits, mask)
        loss = loss + alpha_mse * mse
    if s_hidden_states is not None and t_hidden_states is not None and alpha_cos > 0.0:
        cos = cosine_loss(s_hidden_states[-1], t_hidden_states[-1], attention_mask.bool())
        loss = loss + alpha_cos * cos
    mlm, clm = (zero, hard) if alpha_clm > 0.0 else (hard, zero)
    return StepLosses(loss, soft_and_hard.soft, mlm, clm, mse.detach(), cos.detach())
