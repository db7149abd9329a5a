"""A run's parts for masked-LM distillation: teacher, text, student, objective, and how it is judged.

It knows where each part comes from; nothing of the loop or of files written. Next: teacher.py, text.py, student.py,
objective.py, evaluate.py; run.py, which runs the job.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

import torch
from accelerate import Accelerator
from rich.console import Console
from transformers import BertForMaskedLM, DistilBertConfig, PreTrainedModel, PreTrainedTokenizerBase

from distil_fast.training import evaluate, latency, mlm_head
from distil_fast.training.architectures import layer_count, longest_sequence
from distil_fast.training.arrange import evaluation_batches
from distil_fast.training.atomic import replacing
from distil_fast.training.batch import MaskedBatch
from distil_fast.training.cache import cache_folder
from distil_fast.training.comparison import DISTILLED, TEACHER
from distil_fast.training.feed import TokenFeed
from distil_fast.training.job import Job
from distil_fast.training.objective import MaskedLMObjective
from distil_fast.training.precision import resolve_precision
from distil_fast.training.protocols import Objective
from distil_fast.training.results import ModelResults
from distil_fast.training.settings import EVALUATION_MASKING, TrainConfig
from distil_fast.training.sources import Source
from distil_fast.training.student import make_student, teacher_layers
from distil_fast.training.teacher import Teacher, load_teacher, require_head
from distil_fast.training.text import Text, open_text, progress_bars

UNTRAINED = "untrained"
EVALUATION_BATCH = 16  # sequences
TIMED_LENGTH = 128  # tokens, of the sequences that latency is measured on


class Prepared(NamedTuple):
    """What the parts of a job are made of."""

    config: TrainConfig
    teacher: Teacher
    text: Text
    student: PreTrainedModel
    untrained: PreTrainedModel
    device: torch.device

    def judged(self) -> Iterator[MaskedBatch]:
        """Held-out text under fixed masks, made as they are asked for."""
        masking = self.text.masking(
            EVALUATION_MASKING, self.teacher.model.config.vocab_size, self.config.seed, self.device
        )
        held_out = evaluation_batches(self.text.held_out, EVALUATION_BATCH, self.device)
        return map(masking, held_out)

    def pairs(self) -> list[tuple[int, int]]:
        """The student's layers beside the teacher's that they are copies of."""
        layers = teacher_layers(self.teacher.model, self.config.student)
        return [] if layers is None else evaluate.copied_layers(layers)


def make(
    config: TrainConfig,
    accelerator: Accelerator,
    console: Console,
    documents: Source | None = None,
    head: mlm_head.HeadConfig | None = None,
) -> Job:
    """The job that a configuration describes.

    Args:
        config: all of it.
        accelerator: whose device and ranks the parts are for.
        console: for what the reader should know.
        documents: the text, where it is none that `config.data` can name.
        head: fit a masked-LM head to any encoder that has none, so; None: to the packaged one only.

    Raises:
        InputError: teacher, text or student cannot be used.
    """
    given = load_teacher(config.teacher)
    if head is None:
        require_head(given)
    length = min(config.data.sequence_length, longest_sequence(given.model))
    data = replace(config.data, sequence_length=length)
    with accelerator.main_process_first():  # the others find text and head in the cache
        with progress_bars(console) as progress:
            text = open_text(data, given.tokenizer, documents, progress)
        summary = text.summary
        if "training_tokens" in summary:
            console.print(
                f"Text: {summary['training_tokens']:,} tokens to train on, {summary['held_out_tokens']:,} held out."
            )
        if not given.has_head:
            _give_head(given, text, config, head, console, keep=accelerator.is_main_process)
    torch.manual_seed(config.seed)  # a student of random weights is the same on every rank
    student = make_student(given.model, config.student)
    student.set_attn_implementation(given.model.config._attn_implementation)
    layers = teacher_layers(given.model, config.student)
    origin = "of random weights" if layers is None else f"copied from the teacher's {layers}"
    console.print(f"Student: {layer_count(student)} layers, {origin}.")
    prepared = Prepared(config, given, text, student, copy.deepcopy(student), accelerator.device)
    return _job(prepared, accelerator)


def _job(prepared: Prepared, accelerator: Accelerator) -> Job:
    config, teacher, text = prepared.config, prepared.teacher, prepared.text
    rank, ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    objective = MaskedLMObjective(
        prepared.student, teacher.model, config.loss, teacher_precision=config.teacher_precision
    )
    if config.compile:
        objective.compile_models()
    feed = text.feed(config.micro_batch_size, config.seed, device, rank, ranks)
    watched = list(islice(prepared.judged(), config.evaluation_batches))

    def while_training(trained: Objective) -> dict[str, float]:
        found = evaluate.compare(teacher.model, {DISTILLED: trained.student}, watched)[DISTILLED]
        return evaluate.measures(found)

    return Job(
        title=f"A student of {Path(teacher.name).name}",
        objective=objective,
        feed=feed,
        prepare=text.masking(config.masking, teacher.model.config.vocab_size, config.seed + rank, device),
        micro_batches=len(feed) if isinstance(feed, TokenFeed) else None,
        evaluate=while_training,
        save_student=lambda folder: save(prepared.student, teacher.tokenizer, folder),
        compare=lambda: _compare(prepared),
        text=text.summary,
    )


def _give_head(
    teacher: Teacher, text: Text, config: TrainConfig, head: mlm_head.HeadConfig | None, console: Console, keep: bool
) -> None:
    precision = resolve_precision(config.precision, torch.device("cpu"))
    model = cast("BertForMaskedLM", teacher.model)
    cache = config.data.cache or cache_folder()
    head = head or mlm_head.short_fit("bf16" if precision == "bf16" else "fp32")
    mlm_head.give(model, text, head, precision, config.seed, cache, console)
    if keep:
        folder = config.output / "teacher"
        with replacing(folder) as scratch:
            save(model, teacher.tokenizer, scratch)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A Hugging Face checkpoint with its tokenizer."""
    tokenizer = copy.deepcopy(tokenizer)
    if isinstance(model.config, DistilBertConfig):
        # it has no token types; of attributes, a tokenizer saves those that are among its initial arguments
        tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _compare(prepared: Prepared) -> dict[str, ModelResults]:
    """Teacher, untrained and distilled student on all held-out text, and how fast their encoders are."""
    teacher = prepared.teacher.model
    students = {UNTRAINED: prepared.untrained.to(prepared.device), DISTILLED: prepared.student}  # type: ignore[arg-type]
    models = {TEACHER: teacher, **students}
    qualities = evaluate.compare(teacher, students, prepared.judged(), prepared.pairs())
    length = min(TIMED_LENGTH, *(longest_sequence(model) for model in models.values()))
    return described(models, qualities, latency.encoder_speeds(models, length))


def described(
    models: dict[str, PreTrainedModel],
    qualities: dict[str, evaluate.Quality],
    speeds: dict[str, Sequence[latency.Speed]] | dict[str, list[latency.Speed]],
) -> dict[str, ModelResults]:
    """What is known of each model, as the reports show it; quality and speed where they were measured."""
    return {
        name: ModelResults(
            parameters=evaluate.parameter_count(model),
            weight_bytes=evaluate.weight_bytes(model),
            latency={str(speed.batch_size): speed.seconds for speed in speeds.get(name, [])},
            tokens_per_second={str(speed.batch_size): speed.tokens_per_second for speed in speeds.get(name, [])},
            quality=evaluate.measures(qualities[name]) if name in qualities else {},
            cosines=list(qualities[name].cosines) if name in qualities else [],
        )
        for name, model in models.items()
    }
