"""A masked language model in its two halves, encoder and head, and the precision it computes in.

Kept apart so that the head, the larger half at a vocabulary of 30522, can run on a few positions or on stored hidden
states. It knows the two architectures' head layouts; nothing of losses. Next: mlm_head.py, trainer.py.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from transformers import BertForMaskedLM, DistilBertForMaskedLM

MaskedLM: TypeAlias = "BertForMaskedLM | DistilBertForMaskedLM"

PRECISIONS = ("auto", "fp32", "bf16")
# Without these instructions torch multiplies bf16 matrices more slowly than fp32 ones.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16")


def encode(model: MaskedLM, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The last hidden states [B, S, H] of int64 token ids [B, S]."""
    hidden: Tensor = model.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return hidden


def apply_head(model: MaskedLM, hidden: Tensor) -> Tensor:
    """The logits [..., V] of hidden states [..., H]."""
    logits: Tensor
    if isinstance(model, BertForMaskedLM):
        logits = model.cls(hidden)
    else:
        logits = model.vocab_projector(model.vocab_layer_norm(model.activation(model.vocab_transform(hidden))))
    return logits


def resolve_precision(precision: str) -> str:
    """ "fp32" or "bf16"; "auto" is bf16 where the processor multiplies bf16 matrices natively.

    Raises:
        ValueError: not one of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if precision != "auto":
        return precision
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if any(capabilities.get(name) for name in BF16_INSTRUCTIONS) else "fp32"


def autocast(model: MaskedLM, precision: str) -> torch.autocast:
    """The context for forward passes of `model` in "fp32" or "bf16"; weights stay in fp32."""
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
