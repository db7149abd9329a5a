"""What `distil-fast eval` does: a student beside its teacher, as masked language models, by size and speed, on GLUE.

It alone knows the order of these; each is a file of its own. Next: evaluate.py, latency.py, glue.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, cast

import torch
import transformers
from rich.console import Console
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

from distil_fast.training import evaluate, glue, latency
from distil_fast.training.architectures import longest_sequence
from distil_fast.training.arrange import evaluation_batches
from distil_fast.training.atomic import replacing
from distil_fast.training.comparison import TEACHER
from distil_fast.training.environment import environment
from distil_fast.training.masked_lm import MaskedLM
from distil_fast.training.masked_lm_job import described
from distil_fast.training.masking import DynamicMasking, MaskedBatch
from distil_fast.training.report import comparison_table
from distil_fast.training.results import ModelResults, plain
from distil_fast.training.settings import EVALUATION_MASKING, DataConfig, EvalConfig, InputError
from distil_fast.training.student import evenly_spaced_layers
from distil_fast.training.text import open_held_out

STUDENT = "student"
FILE = "evaluation.json"


def judge_run(config: EvalConfig, console: Console) -> dict[str, Any]:
    """Measure what the configuration asks for, print it, and write it to `config.output`/evaluation.json.

    Returns:
        The same as plain data: "models" (by "teacher" and "student", the fields of `ModelResults`), "glue" (as
        `glue.retention`, or None), "configuration", "environment".

    Raises:
        InputError: models, text, examples or output folder that cannot be used; GLUE's examples and the folder are
            looked at before anything is measured.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _check(config)
    data = glue.read_tasks(config.glue) if config.glue.tasks else []
    found: dict[str, Any] = {"models": {}, "glue": None}
    if config.text or config.latency:
        models = masked_lm_results(config, console)
        console.print(comparison_table(models))
        found["models"] = {name: asdict(model) for name, model in models.items()}
    if data:
        found["glue"] = glue.run(config.student, config.teacher, config.glue, console, data)
    found |= {"configuration": plain(asdict(config)), "environment": environment().as_dict()}
    found = cast("dict[str, Any]", plain(found))
    with replacing(config.output / FILE) as scratch:
        scratch.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", "utf-8")
    console.print(f"{FILE} is in {config.output}.", markup=False)
    return found


def _check(config: EvalConfig) -> None:
    for name in (STUDENT, TEACHER):
        if not getattr(config, name):
            raise InputError(f"{name}: expected a folder or a name on the Hugging Face hub, got none.")
    if not (config.text or config.latency or config.glue.tasks):
        raise InputError("text, latency, glue.tasks: expected something to measure, got none of them.")
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output: the folder {config.output} cannot be made: {error.strerror}.") from error
    if not os.access(config.output, os.W_OK):
        raise InputError(f"output: the folder {config.output} is not writable.")


def masked_lm_results(config: EvalConfig, console: Console) -> dict[str, ModelResults]:
    """Size, speed and, on the configuration's text, quality of both models.

    Raises:
        InputError: models or text that cannot be used, or that do not fit each other.
    """
    teacher, tokenizer = load_masked_lm(config.teacher, TEACHER)
    student, _ = load_masked_lm(config.student, STUDENT)
    models = {TEACHER: teacher, STUDENT: student}
    qualities: dict[str, evaluate.Quality] = {}
    if config.text:
        with console.status("Predicting the masked tokens"):
            pairs = evaluate.copied_layers(_layers(config, teacher, student))
            try:
                masked = masked_batches(config, tokenizer, teacher)
                qualities = evaluate.compare(teacher, {STUDENT: student}, masked, pairs)
            except ValueError as error:
                raise error if isinstance(error, InputError) else InputError(str(error)) from error
    speeds: dict[str, list[latency.Speed]] = {name: [] for name in models}
    if config.latency:
        with console.status("Timing the encoders"):
            positions = [getattr(model.config, "max_position_embeddings", 128) for model in models.values()]
            speeds = latency.encoder_speeds(models, min(128, *positions))
    return described(models, qualities, speeds)


def _layers(config: EvalConfig, teacher: MaskedLM, student: MaskedLM) -> list[int]:
    """None of a student of another width, whose hidden states cannot be compared."""
    depth, layers = teacher.config.num_hidden_layers, student.config.num_hidden_layers
    if student.config.hidden_size != teacher.config.hidden_size:
        return []
    if config.layers is None:
        return evenly_spaced_layers(depth, layers) if layers <= depth else []
    if len(config.layers) != layers or not all(0 <= layer < depth for layer in config.layers):
        raise InputError(
            f"layers: expected a layer from 0 to {depth - 1} for each of the student's {layers}, got {config.layers}."
        )
    return config.layers


def masked_batches(config: EvalConfig, tokenizer: PreTrainedTokenizerBase, model: MaskedLM) -> Iterator[MaskedBatch]:
    """The text's sequences under masks that depend on the text, the tokenizer and the seed alone."""
    length = min(config.sequence_length, longest_sequence(model))
    sequences = open_held_out(DataConfig(held_out=config.text, sequence_length=length), tokenizer)
    ids = tokenizer.all_special_ids, tokenizer.mask_token_id
    setting = replace(EVALUATION_MASKING, rate=config.rate)
    masking = DynamicMasking(torch.ones(model.config.vocab_size), *ids, setting, config.seed)
    return map(masking, evaluation_batches(sequences, config.batch_size))


def load_masked_lm(source: str, role: str) -> tuple[MaskedLM, PreTrainedTokenizerBase]:
    """A masked language model with its head, in fp32, and its tokenizer.

    Raises:
        InputError: nothing to load there, weights missing, or a tokenizer that does not fit.
    """
    try:
        model, report = AutoModelForMaskedLM.from_pretrained(source, dtype="float32", output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"{role}: {source} could not be loaded as a masked language model: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{role}: expected a masked language model with its head, and {source} lacks {', '.join(missing[:3])}. An "
            "encoder without one cannot be judged on text; leave text out, or train a head first."
        )
    if len(tokenizer) > model.config.vocab_size or tokenizer.mask_token_id is None:
        raise InputError(
            f"{role}: the tokenizer of {source} does not fit the model: {len(tokenizer)} tokens for a vocabulary of "
            f"{model.config.vocab_size}, mask token {tokenizer.mask_token!r}."
        )
    return model.eval(), tokenizer
