"""Where the parts of a masked language model are: one table, the only file that a new family touches.

Names of modules inside Hugging Face's classes, nothing of weights, layers to copy, or losses. Next: masked_lm.py, which
runs the parts; student.py, which copies them.
"""

from __future__ import annotations

from typing import NamedTuple

import transformers
from torch import nn
from transformers import PreTrainedModel

from distil_fast.training.settings import InputError


class Architecture(NamedTuple):
    """Dotted names of modules, from the masked language model down.

    The head is decoder(norm(activation(dense(hidden)))); the decoder is a linear layer with a bias, and its bias in the
    module is the one that is trained, under whatever other name a checkpoint has it.
    """

    model: str  # the class in transformers
    embeddings: str  # holds word_embeddings, position_embeddings, LayerNorm, and token_type_embeddings if there are any
    layers: str  # the list of encoder layers
    dense: str
    activation: str | None  # None: gelu, which the class does not hold as a module
    norm: str
    decoder: str


_ROBERTA = Architecture(
    model="RobertaForMaskedLM",
    embeddings="roberta.embeddings",
    layers="roberta.encoder.layer",
    dense="lm_head.dense",
    activation=None,
    norm="lm_head.layer_norm",
    decoder="lm_head.decoder",
)

ARCHITECTURES: dict[str, Architecture] = {  # by the model_type of a configuration
    "bert": Architecture(
        model="BertForMaskedLM",
        embeddings="bert.embeddings",
        layers="bert.encoder.layer",
        dense="cls.predictions.transform.dense",
        activation="cls.predictions.transform.transform_act_fn",
        norm="cls.predictions.transform.LayerNorm",
        decoder="cls.predictions.decoder",
    ),
    "distilbert": Architecture(
        model="DistilBertForMaskedLM",
        embeddings="distilbert.embeddings",
        layers="distilbert.transformer.layer",
        dense="vocab_transform",
        activation="activation",
        norm="vocab_layer_norm",
        decoder="vocab_projector",
    ),
    "roberta": _ROBERTA,
    "camembert": _ROBERTA._replace(model="CamembertForMaskedLM"),
    "xlm-roberta": _ROBERTA._replace(model="XLMRobertaForMaskedLM"),
    "electra": Architecture(  # the generator; embeddings and the head's output may be narrower than the layers
        model="ElectraForMaskedLM",
        embeddings="electra.embeddings",
        layers="electra.encoder.layer",
        dense="generator_predictions.dense",
        activation="generator_predictions.activation",
        norm="generator_predictions.LayerNorm",
        decoder="generator_lm_head",
    ),
    "mpnet": Architecture(
        model="MPNetForMaskedLM",
        embeddings="mpnet.embeddings",
        layers="mpnet.encoder.layer",
        dense="lm_head.dense",
        activation=None,
        norm="lm_head.layer_norm",
        decoder="lm_head.decoder",
    ),
}


def of_type(model_type: str, what: str) -> Architecture:
    """The row of a configuration's `model_type`; `what` begins the message of the error.

    Raises:
        InputError: none of `ARCHITECTURES`.
    """
    if model_type not in ARCHITECTURES:
        raise InputError(
            f"{what}: expected a masked language model of one of the types {', '.join(ARCHITECTURES)}, got a "
            f"{model_type!r}. Other families need a row in distil_fast/training/architectures.py."
        )
    return ARCHITECTURES[model_type]


def architecture(model: PreTrainedModel) -> Architecture:
    """The row of a masked language model.

    Raises:
        InputError: a family that is not supported, or a model of one without its masked-LM head.
    """
    row = of_type(model.config.model_type, "model")
    if not isinstance(model, model_class(row)):
        raise InputError(f"model: expected a {row.model}, which has a masked-LM head, got a {type(model).__name__}.")
    return row


def model_class(row: Architecture) -> type[PreTrainedModel]:
    found: type[PreTrainedModel] = getattr(transformers, row.model)
    return found


def layer_count(model: PreTrainedModel) -> int:
    layers = model.get_submodule(architecture(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return len(layers)


def longest_sequence(model: PreTrainedModel) -> int:
    """Tokens that the position embeddings reach; RoBERTa's and its like begin after the padding's own position."""
    positions = model.get_submodule(f"{architecture(model).embeddings}.position_embeddings")
    assert isinstance(positions, nn.Embedding)
    return positions.num_embeddings - (0 if positions.padding_idx is None else positions.padding_idx + 1)
