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
from typing import NamedTuple, cast

import torch
import transformers
from rich.console import Console
from torch import Tensor
from transformers import BertForMaskedLM, DistilBertForMaskedLM, PreTrainedTokenizerBase

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
from distil_fast.training.simple import Trainer
from distil_fast.training.student import evenly_spaced_layers, student_from_teacher
from distil_fast.training.teacher import Teacher, load_teacher

EVALUATION_BATCH = 16  # sequences


class Text(NamedTuple):
    """The packed sequences of both parts."""

    training: list[Tensor]
    held_out: list[Tensor]
    counts: dict[str, int]  # of documents, sequences and tokens, for the reader


class Session(NamedTuple):
    """What the steps of one run share."""

    config: DemoConfig
    head: HeadConfig
    training: TrainingConfig
    precision: str
    teacher: Teacher
    text: Text
    console: Console

    def masking(self, masking: MaskingConfig) -> DynamicMasking:
        tokenizer = self.teacher.tokenizer
        frequencies = token_counts(self.text.training, self.teacher.model.config.vocab_size)
        ids = tokenizer.all_special_ids, tokenizer.mask_token_id
        return DynamicMasking(frequencies, *ids, masking, self.config.seed)

    def training_stream(self, masking: MaskingConfig, batch_size: int) -> Iterator[MaskedBatch]:
        order = torch.Generator().manual_seed(self.config.seed)
        stream = endless_batches(self.text.training, batch_size, self.teacher.tokenizer.pad_token_id, order)
        return map(self.masking(masking), stream)


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
    seconds: dict[str, float] = {}
    with _timed(seconds, "total"):
        with _timed(seconds, "text"), console.status("Reading the text"):
            session = _prepare(config, console)
        with _timed(seconds, "head"):
            if not session.teacher.has_head:
                _give_head(session)
        untrained = student_from_teacher(session.teacher.model)
        untrained.set_attn_implementation("eager")  # as the teacher's
        with _timed(seconds, "distillation"):
            distilled, history = _distil(session, untrained)
        _save(distilled, session.teacher.tokenizer, config.output / "student")
        report.plot_losses(history, config.output / "losses.png")
        with _timed(seconds, "evaluation"), console.status("Evaluating"):
            models = _compare(session, untrained, distilled)
            loss_speeds, step_speeds = _speeds(session, untrained)
    results = report.Results(
        environment=_environment(),
        configuration=_configuration(session),
        text=session.text.counts,
        models=models,
        loss_tokens_per_second=loss_speeds,
        step_tokens_per_second=step_speeds,
        seconds=seconds,
    )
    report.write_results(results, config.output / "results.json")
    console.print(report.quality_table(results), report.throughput_table(results))
    console.print(f"{seconds['total']:.0f} s. Student, results.json and losses.png are in {config.output}.")
    return results


def _make_writable(folder: Path, what: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{what}: the folder {folder} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{what}: the folder {folder} is not writable.")


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def _prepare(config: DemoConfig, console: Console) -> Session:
    precision = resolve_precision(config.precision)
    teacher = load_teacher(config.teacher)
    length = min(config.sequence_length, teacher.model.config.max_position_embeddings)
    documents = documents_from_file(config.text) if config.text else documents_from_installed_packages()
    parts = dict(zip(("training", "held_out"), split_documents(documents), strict=True))
    sequences = {name: pack(part, teacher.tokenizer, length) for name, part in parts.items()}
    counts = {f"{name}_documents": len(part) for name, part in parts.items()}
    counts |= {f"{name}_sequences": len(packed) for name, packed in sequences.items()}
    counts |= {f"{name}_tokens": sum(map(len, packed)) for name, packed in sequences.items()}
    source = config.text or "documentation of installed packages"
    console.print(
        f"Text: {source}; {counts['training_tokens']:,} tokens to train on, {counts['held_out_tokens']:,} held out."
    )
    return Session(
        config=config,
        head=config.head or short_head_fit(precision),
        training=config.training or short_training(precision),
        precision=precision,
        teacher=teacher,
        text=Text(**sequences, counts=counts),
        console=console,
    )


def _give_head(session: Session) -> None:
    config, teacher = session.config, session.teacher
    model = cast(BertForMaskedLM, teacher.model)  # load_teacher refuses others without a head
    cache = config.cache or cache_folder()
    _make_writable(cache, "the cache")
    settings = (session.head, config.seed, session.precision)
    path = cache / f"{cache_key(model, session.text.training, settings)}.safetensors"
    if load_fitted(model, path):
        session.console.print(f"Teacher: {teacher.name}; its masked-LM head was fitted before ({path}).")
    else:
        session.console.print(
            f"Teacher: {teacher.name} is an encoder without a masked-LM head. One is fitted on the text now, encoder "
            "and all, and kept for the next time."
        )
        stream = session.training_stream(session.head.masking, session.head.batch_size)
        with report.progress(session.console, "Fitting the head", session.head.steps) as advance:
            fit_head(model, stream, session.head, session.precision, advance)
        save_fitted(model, path)
    _save(model, teacher.tokenizer, config.output / "teacher")


def _distil(session: Session, untrained: MaskedLM) -> tuple[MaskedLM, Tensor]:
    training, teacher = session.training, session.teacher
    layers = evenly_spaced_layers(teacher.model.config.num_hidden_layers)
    session.console.print(f"Student: {len(layers)} layers, copied from the teacher's {layers}; {session.precision}.")
    student = copy.deepcopy(untrained)
    stream = session.training_stream(training.masking, training.micro_batch_size)
    with report.progress(session.console, "Distilling", training.steps) as advance:
        history = Trainer(student, teacher.model, training, session.precision).fit(stream, advance)
    return student, history


def _save(model: MaskedLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    if isinstance(model, DistilBertForMaskedLM):
        # it has no token types; of attributes, a tokenizer saves those that are among its initial arguments
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = ["input_ids", "attention_mask"]
    with replacing(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def _compare(session: Session, untrained: MaskedLM, distilled: MaskedLM) -> dict[str, report.ModelResults]:
    masking, held_out = session.masking(EVALUATION_MASKING), session.text.held_out
    masked = [masking(batch) for batch in batches(held_out, EVALUATION_BATCH, session.teacher.tokenizer.pad_token_id)]
    models: dict[str, MaskedLM] = {"teacher": session.teacher.model, "untrained": untrained, "distilled": distilled}
    predictions = {name: evaluate.predict(model, masked) for name, model in models.items()}
    longest = max(held_out, key=len).unsqueeze(0)
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


def _speeds(session: Session, student: MaskedLM) -> tuple[dict[str, float], dict[str, float]]:
    training = session.training
    stream = session.training_stream(training.masking, training.micro_batch_size)
    micro_batches = [next(stream) for _ in range(training.accumulation_steps)]
    arguments = (student, session.teacher.model, micro_batches, training, session.precision)
    return throughput.loss_throughput(*arguments), throughput.step_throughput(*arguments)


def _environment() -> dict[str, str | int]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": str(torch.cpu.get_capabilities().get("cpu_name", platform.machine())),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _configuration(session: Session) -> dict[str, object]:
    config = session.config
    given = asdict(config) | {"text": config.text and str(config.text), "output": str(config.output)}
    used = {"head": asdict(session.head), "training": asdict(session.training), "precision": session.precision}
    return given | used | {"teacher": session.teacher.name, "cache": str(config.cache or cache_folder())}
