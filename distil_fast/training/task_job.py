"""A run's parts for task distillation: a fine-tuned classifier, a task's examples, student, objective, and the score.

It knows where each part comes from; nothing of the loop or of files written. Next: glue_tasks.py, classification.py,
classifier_student.py; run.py, which runs the job.
"""

from __future__ import annotations

import copy
import statistics
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from transformers import PreTrainedModel

from distil_fast.training import glue, latency, masked_lm_job
from distil_fast.training.classification import ClassificationObjective
from distil_fast.training.classification_feed import ClassificationFeed, Examples, Unchanged, tokenise
from distil_fast.training.classifier_student import classifier_student
from distil_fast.training.comparison import DISTILLED, TEACHER
from distil_fast.training.job import Job
from distil_fast.training.masked_lm_job import TIMED_LENGTH, UNTRAINED
from distil_fast.training.protocols import Objective
from distil_fast.training.results import ModelResults
from distil_fast.training.settings import GlueConfig, InputError, TrainConfig
from distil_fast.training.student import evenly_spaced_layers

SCORED_TOGETHER = 32  # examples


def make(config: TrainConfig, accelerator: Accelerator, console: Console) -> Job:
    """The job that a configuration with a task describes.

    Raises:
        InputError: teacher, examples or student cannot be used.
    """
    if config.teacher is None:
        raise InputError("teacher: expected a classifier that was fine-tuned on the task, got none. Name its folder.")
    if config.student.config is not None or config.student.initialisation == "random":
        raise InputError(
            "student: expected layers of its teacher for a classifier, got a configuration or random weights."
        )
    assert config.task.name is not None
    chosen = GlueConfig(tasks=[config.task.name], train=config.task.train, held_out=config.task.held_out)
    with accelerator.main_process_first():  # the others find what the hub gave in the cache
        (data,) = glue.read_tasks(chosen)
        teacher, tokenizer = glue.load_classifier(config.teacher, data.task)
    layers = config.student.layers
    if not isinstance(layers, list):
        layers = evenly_spaced_layers(teacher.config.num_hidden_layers, layers)
    student = classifier_student(teacher, layers)
    untrained = copy.deepcopy(student)
    length = min(config.data.sequence_length, getattr(teacher.config, "max_position_embeddings", 512))
    train, held_out = (tokenise(part.texts, part.labels, tokenizer, length) for part in (data.train, data.held_out))
    console.print(f"{data.task.name}: {len(train):,} examples to train on, {len(held_out):,} held out.")
    console.print(f"Student: {len(layers)} layers, copied from the teacher's {layers}.")
    device = accelerator.device
    objective = ClassificationObjective(student, teacher.to(device), config.loss)
    place = {"rank": accelerator.process_index, "ranks": accelerator.num_processes, "device": device}
    feed = ClassificationFeed(train, config.micro_batch_size, config.seed, **place)

    def compare() -> dict[str, ModelResults]:
        models = {TEACHER: teacher, UNTRAINED: untrained.to(device), DISTILLED: student}
        speeds = latency.encoder_speeds(models, min(TIMED_LENGTH, length))
        found = masked_lm_job.described(models, {}, speeds)
        for name, model in models.items():
            found[name].tasks[data.task.name] = statistics.fmean(_scores(model, held_out, data).values())
        return found

    def while_training(trained: Objective) -> dict[str, float]:
        return _scores(trained.student, held_out, data)

    return Job(
        title=f"A student of {Path(config.teacher).name} for {data.task.name}",
        objective=objective,
        feed=feed,
        prepare=Unchanged(),
        micro_batches=len(feed),
        evaluate=while_training,
        save_student=lambda folder: masked_lm_job.save(student, tokenizer, folder),
        compare=compare,
        text={"training_examples": len(train), "held_out_examples": len(held_out)},
    )


@torch.no_grad()
def _scores(model: PreTrainedModel, examples: Examples, data: glue.TaskData) -> dict[str, float]:
    """The task's measures on held-out examples, in evaluation mode."""
    mode = model.training
    predictions = glue.predict(model.train(False), examples, SCORED_TOGETHER)
    model.train(mode)
    return data.task.score(predictions, examples.labels.numpy())
