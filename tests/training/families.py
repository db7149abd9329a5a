"""A tiny random masked language model of every family that the trainer knows, and batches for it. No tests here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    MPNetConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
)

from distil_fast.training.architectures import ARCHITECTURES, model_class
from distil_fast.training.batch import IGNORED, MaskedBatch

VOCABULARY, WIDTH, LAYERS, POSITIONS = 67, 16, 3, 24
CONFIGURATIONS: dict[str, type[PreTrainedConfig]] = {
    "bert": BertConfig,
    "distilbert": DistilBertConfig,
    "roberta": RobertaConfig,
    "camembert": CamembertConfig,
    "xlm-roberta": XLMRobertaConfig,
    "electra": ElectraConfig,
    "mpnet": MPNetConfig,
}
FAMILIES = tuple(CONFIGURATIONS)
PADDING = {"roberta": 1, "camembert": 1, "xlm-roberta": 1, "mpnet": 1}  # token id, and offset of the positions


def configuration(family: str, **settings: Any) -> PreTrainedConfig:
    padding = PADDING.get(family, 0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "max_position_embeddings": POSITIONS + (padding + 1 if family in PADDING else 0),
        "initializer_range": 0.3,  # far from uniform logits, so that a wrong weight shows
        "pad_token_id": padding,
    }
    if family == "distilbert":
        extra: dict[str, Any] = {"hidden_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}
        for name, own in (
            ("hidden_size", "dim"),
            ("num_hidden_layers", "n_layers"),
            ("num_attention_heads", "n_heads"),
        ):
            shape[own] = settings.pop(name, shape.pop(name))
    else:
        extra = {"intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        extra |= {"layer_norm_eps": 1e-12}
    if family == "electra":
        extra["embedding_size"] = 8  # narrower than the layers, as in the small ones
    return CONFIGURATIONS[family](**(shape | extra | settings))


def make_model(family: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """In evaluation mode, with eager attention; biases and LayerNorms away from 0 and 1, so that one left out shows."""
    torch.manual_seed(seed)
    model = model_class(ARCHITECTURES[family])(configuration(family, **settings))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def make_batch(family: str, lengths: tuple[int, ...] = (13, 5, 9), *, surplus: int = 0, seed: int = 1) -> MaskedBatch:
    """A fifth of the tokens masked, with so many surplus entries in `masked`."""
    generator = torch.Generator().manual_seed(seed)
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    input_ids = torch.randint(5, VOCABULARY, attention_mask.shape, generator=generator)
    input_ids = torch.where(attention_mask.bool(), input_ids, PADDING.get(family, 0))
    tokens = attention_mask.flatten().nonzero().squeeze(1)
    labels = torch.full_like(input_ids, IGNORED)
    masked = tokens[2::5]
    labels.view(-1)[masked] = torch.randint(5, VOCABULARY, masked.shape, generator=generator)
    masked = torch.cat([masked, tokens[:1].expand(surplus)])
    return MaskedBatch(input_ids, attention_mask, tokens, labels, masked)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300))
