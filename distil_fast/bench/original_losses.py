"""The loss block of the original DistilBERT trainer alone, called as our integration is.

It makes no step. Next: original.py, whose losses these are; distil_fast/integrations/distilbert.py, ours.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from distil_fast.bench.original import Losses, Original, Output
from distil_fast.training.batch import MaskedBatch
from distil_fast.training.settings import LossConfig, OptimiserConfig


def step_losses(
    s_logits: Tensor,
    t_logits: Tensor,
    s_hidden_states: tuple[Tensor, ...] | None,
    t_hidden_states: tuple[Tensor, ...] | None,
    attention_mask: Tensor,
    lm_labels: Tensor,
    *,
    alpha_ce: float,
    alpha_mlm: float,
    alpha_clm: float = 0.0,
) -> Losses:
    """Those of masked language models at temperature 2, `[B, S, V]` logits, without the cosine.

    Raises:
        ValueError: `alpha_clm`, which original.py leaves out.
    """
    if alpha_clm:
        raise ValueError(f"alpha_clm: expected 0, got {alpha_clm}. original.py has masked language models only.")
    original = _original(alpha_ce, alpha_mlm)
    batch = MaskedBatch(lm_labels, attention_mask, attention_mask, lm_labels, None)
    return original.losses(Output(s_logits, s_hidden_states or ()), Output(t_logits, t_hidden_states or ()), batch)


@lru_cache
def _original(alpha_ce: float, alpha_mlm: float) -> Original:
    """With models that it holds and does not call; under autocast, which takes half precisions' losses to float32."""
    shape = BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    model = BertForMaskedLM(shape)
    terms = LossConfig(2.0, alpha_ce, alpha_mlm, alpha_cos=0.0)
    return Original(model, model, terms, OptimiserConfig(), steps=1, precision="bf16")
