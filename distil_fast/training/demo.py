"""The demo, start to end: a pretrained BERT distilled into a student of half its depth, measured and saved.

It alone knows the order of things; each thing is a file of its own. Next: trainer.py.
"""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from rich.console import Console
from torch import Tensor
from transformers import DistilBertForMaskedLM, PreTrainedTokenizerBase

from distil_fast.training import evaluate, report, throughput
from distil_fast.training.atomic import replacing
from distil_fast.training.config import (
    EVALUATION_MASKING,
    DemoConfig,
    HeadConfig,
    InputError,
    MaskingConfig,
    TrainingConfig,
    short_head_fit,
    short_training,
)
from distil_fast.training.corpus import documents_from_installed_packages
from distil_fast.training.data import batches, documents_from_file, endless_batches, pack, split_documents, token_counts
from distil_fast.training.masked_lm import MaskedLM, resolve_precision
from distil_fast.training.masking import DynamicMasking, MaskedBatch
from distil_fast.training.mlm_head import cache_folder, cache_key, fit_head, load_fitted, save_fitted
from distil_fast.training.student import evenly_spaced_layers, student_from_teacher
from distil_fast.training.teacher import Teacher, load_teacher
from distil_fast.training.trainer import Trainer

EVALUATION_BATCH = 16  # sequences


class Text(NamedTuple):
    """The packed sequences of both parts."""

    training: list[Tensor]
    held_out: list[Tensor]
    counts: dict[str, int]  # of documents, sequences and tokens, for the reader


def run(config: DemoConfig, console: Console) -> report.Results:
    """Do all of it, and print it on `console`.

    Leaves in `config.output`: `student/` and, if its head had to be fitted, `teacher/` (Hugging Face checkpoints with
    their tokenizer), `results.json` and `losses.png`.

    Raises:
        InputError: teacher, text, cache or output folder cannot be used.
        FloatingPointError: a loss was inf or nan; what an earlier run left in the output folder stays.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _make_writable(config.output, "--output")
    torch.manual_seed(config.seed)
    precision = resolve_precision(config.precision)
    head, training = config.head or short_head_fit(precision), config.training or short_training(precision)
    seconds: dict[str, float] = {}

    with _timed(seconds, "text"), console.status("Reading the text"):
        teacher = load_teacher(config.teacher)
        text = _read_text(config, teacher.tokenizer)
    counts = text.counts
    console.print(
        f"Text: {counts['training_tokens']:,} tokens to train on, {counts['held_out_tokens']:,} held out "
        f"({config.text or 'documentation of installed packages'})."
    )
    with _timed(seconds, "head"):
        if not teacher.has_head:
            _give_head(config, head, teacher, text, precision, console)
    untrained = student_from_teacher(teacher.model)
    untrained.set_attn_implementation("eager")  # as the teacher's
    student = copy.deepcopy(untrained)
    with _timed(seconds, "distillation"):
        layers = evenly_spaced_layers(teacher.model.config.num_hidden_layers)
        console.print(f"Student: {len(layers)} layers, from layers {layers} of {teacher.name}; {precision}.")
        stream = _masked_stream(config, teacher, text, training.masking, training.micro_batch_size)
        trainer = Trainer(student, teacher.model, training, precision)
        with report.progress(console, "Distilling", training.steps) as advance:
            history = trainer.fit(stream, advance)
    _save(student, teacher.tokenizer, config.output / "student")
    report.plot_losses(history, config.output / "losses.png")

    with _timed(seconds, "evaluation"), console.status("Evaluating"):
        models = _compare(config, teacher, text, untrained, student)
        micro_batches = [next(stream) for _ in range(training.accumulation_steps)]
        arguments = (untrained, teacher.model, micro_batches, training, precision)
        results = report.Results(
            environment=_environment(),
            configuration=_configuration(config, head, training, teacher, precision),
            text=counts,
            models=models,
            loss_tokens_per_second=throughput.loss_throughput(*arguments),
            step_tokens_per_second=throughput.step_throughput(*arguments),
            seconds=seconds,
        )
    report.write_results(results, config.output / "results.json")
    console.print(report.quality_table(results), report.throughput_table(results))
    console.print(f"{sum(seconds.values()):.0f} s in all. Student, results.json and losses.png are in {config.output}.")
    return results


def _make_writable(folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option}: the folder {folder} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option}: the folder {folder} is not writable.")


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def _read_text(config: DemoConfig, tokenizer: PreTrainedTokenizerBase) -> Text:
    documents = documents_from_file(config.text) if config.text else documents_from_installed_packages()
    parts = dict(zip(("training", "held_out"), split_documents(documents), strict=True))
    sequences = {name: pack(part, tokenizer, config.sequence_length) for name, part in parts.items()}
    counts = {f"{name}_documents": len(part) for name, part in parts.items()}
    counts |= {f"{name}_sequences": len(packed) for name, packed in sequences.items()}
    counts |= {f"{name}_tokens": sum(map(len, packed)) for name, packed in sequences.items()}
    return Text(**sequences, counts=counts)


def _masking(config: DemoConfig, teacher: Teacher, text: Text, masking: MaskingConfig) -> DynamicMasking:
    tokenizer = teacher.tokenizer
    frequencies = token_counts(text.training, teacher.model.config.vocab_size)
    return DynamicMasking(frequencies, tokenizer.all_special_ids, tokenizer.mask_token_id, masking, config.seed)


def _masked_stream(
    config: DemoConfig, teacher: Teacher, text: Text, masking: MaskingConfig, batch_size: int
) -> Iterator[MaskedBatch]:
    order = torch.Generator().manual_seed(config.seed)
    stream = endless_batches(text.training, batch_size, teacher.tokenizer.pad_token_id, order)
    return map(_masking(config, teacher, text, masking), stream)


def _give_head(
    config: DemoConfig, head: HeadConfig, teacher: Teacher, text: Text, precision: str, console: Console
) -> None:
    cache = config.cache or cache_folder()
    _make_writable(cache, "the cache")
    settings = (head, config.seed, precision)
    path = cache / f"{cache_key(teacher.model, text.training, settings)}.safetensors"
    if load_fitted(teacher.model, path):
        console.print(f"Teacher: {teacher.name}; its masked-LM head was fitted before ({path}).")
    else:
        console.print(
            f"Teacher: {teacher.name} is an encoder without a masked-LM head. One is fitted on the text now, encoder "
            "and all, and kept for the next time."
        )
        stream = _masked_stream(config, teacher, text, head.masking, head.batch_size)
        with report.progress(console, "Fitting the head", head.steps) as advance:
            fit_head(teacher.model, stream, head, precision, advance)
        save_fitted(teacher.model, path)
    _save(teacher.model, teacher.tokenizer, config.output / "teacher")


def _save(model: MaskedLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    if isinstance(model, DistilBertForMaskedLM):
        # it has no token types; of attributes, a tokenizer saves those that are among its initial arguments
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = ["input_ids", "attention_mask"]
    with replacing(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def _compare(
    config: DemoConfig, teacher: Teacher, text: Text, untrained: MaskedLM, distilled: MaskedLM
) -> dict[str, report.ModelResults]:
    masking = _masking(config, teacher, text, EVALUATION_MASKING)
    masked = [masking(b) for b in batches(text.held_out, EVALUATION_BATCH, teacher.tokenizer.pad_token_id)]
    models: dict[str, MaskedLM] = {"teacher": teacher.model, "untrained": untrained, "distilled": distilled}
    predictions = {name: evaluate.predict(model, masked) for name, model in models.items()}
    longest = max(text.held_out, key=len).unsqueeze(0)
    latencies = dict(zip(models, evaluate.encoder_latencies(list(models.values()), longest), strict=True))
    return {
        name: report.ModelResults(
            parameters=evaluate.parameter_count(model),
            weight_bytes=evaluate.weight_bytes(model),
            latency=latencies[name],
            **evaluate.quality(predictions[name], predictions["teacher"])._asdict(),
        )
        for name, model in models.items()
    }


def _environment() -> dict[str, str | int]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": str(torch.cpu.get_capabilities().get("cpu_name", platform.machine())),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _configuration(
    config: DemoConfig, head: HeadConfig, training: TrainingConfig, teacher: Teacher, precision: str
) -> dict[str, object]:
    given = asdict(config) | {"text": config.text and str(config.text), "output": str(config.output)}
    resolved = {"cache": str(config.cache or cache_folder()), "teacher": teacher.name, "precision": precision}
    return given | resolved | {"head": asdict(head), "training": asdict(training)}
