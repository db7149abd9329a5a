"""Fine-tunes models on GLUE tasks, scores them on what is held out, and says how much of the teacher a student keeps.

Each model is fine-tuned with each seed and learning rate, on the same examples. It knows tasks, models and numbers;
nothing of distillation. Next: glue_tasks.py for the examples, judge.py, which calls it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from distil_fast.training.classification import ClassificationObjective, classifier_inputs
from distil_fast.training.classification_feed import ClassificationFeed, Examples, in_order, tokenise
from distil_fast.training.glue_metrics import Array
from distil_fast.training.glue_tasks import (
    HELD_OUT,
    TRAIN,
    Labelled,
    Task,
    find_file,
    read_dataset,
    read_file,
    task_named,
)
from distil_fast.training.settings import GlueConfig, InputError, LossConfig

CLAIM = 0.97  # of the teacher's score: Sanh et al. 2019, abstract
LABELS_ONLY = LossConfig(alpha_ce=0.0, alpha_mlm=1.0, alpha_cos=0.0)
Report = Callable[[str], None]


class Scores(NamedTuple):
    """Of one model on one task; shares of 1, but correlations may be negative."""

    learning_rate: float  # the one with the best mean score
    metrics: dict[str, list[float]]  # by name, one entry a seed
    scores: list[float]  # the mean of the metrics, one entry a seed

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds; 0 of a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0


class TaskData(NamedTuple):
    """What a task is learnt and scored on, as texts."""

    task: Task
    train: Labelled
    held_out: Labelled


def read_tasks(config: GlueConfig) -> list[TaskData]:
    """The examples of all tasks of the configuration.

    Raises:
        InputError: an unknown task, files that are not there or not as expected, `train` without `held_out` or with
            several tasks.
    """
    tasks = [task_named(name) for name in config.tasks]
    single = config.train is not None, config.held_out is not None
    if any(single) and (not all(single) or len(tasks) != 1):
        raise InputError(
            f"glue.train and glue.held_out: expected both, with one task, got {sum(single)} of them and {len(tasks)} "
            "tasks. Use glue.folder for several tasks."
        )
    for name in ("epochs", "batch_size", "max_length"):
        if getattr(config, name) < 1:
            raise InputError(f"glue.{name}: expected at least 1, got {getattr(config, name)}.")
    for name in ("seeds", "learning_rates"):
        if not getattr(config, name):
            raise InputError(f"glue.{name}: expected at least one, got none.")
    return [TaskData(task, _examples(task, TRAIN, config), _examples(task, HELD_OUT, config)) for task in tasks]


def _examples(task: Task, part: str, config: GlueConfig) -> Labelled:
    given = config.train if part == TRAIN else config.held_out
    if given is not None:
        return read_file(given, task)
    if config.folder is not None:
        return read_file(find_file(config.folder, task, part), task)
    return read_dataset(task, part)


def load_classifier(source: str, task: Task) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The encoder of a checkpoint under a classifier for the task; a head that is not in the checkpoint is random.

    Raises:
        InputError: nothing to load there.
    """
    names: dict[str, Any] = {"num_labels": task.outputs}
    if task.classes:
        names |= {"id2label": dict(enumerate(task.classes)), "label2id": {c: i for i, c in enumerate(task.classes)}}
    try:
        model = AutoModelForSequenceClassification.from_pretrained(source, dtype="float32", **names)
        return model, AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"model: {source} could not be loaded for {task.name}: {error}") from error


def fine_tune(source: str, data: TaskData, config: GlueConfig, report: Report = lambda words: None) -> Scores:
    """Fine-tune a checkpoint with every seed and learning rate, and score it on what the task holds out.

    Args:
        source: a folder, or a name on the hub.
        data: the task and its examples.
        config: the numbers of the fine-tuning.
        report: told in words of each run that is done.

    Raises:
        InputError: the checkpoint cannot be loaded.
        FloatingPointError: a loss was not finite.
    """
    found: dict[float, Scores] = {}
    for rate in config.learning_rates:
        runs = []
        for seed in config.seeds:
            runs.append(_one_run(source, data, config, rate, seed))
            metrics = ", ".join(f"{name} {value:.1%}" for name, value in runs[-1].items())
            report(f"{data.task.name}, learning rate {rate:g}, seed {seed}: {metrics}")
        metrics_of = {name: [run[name] for run in runs] for name in runs[0]}
        found[rate] = Scores(rate, metrics_of, [statistics.fmean(run.values()) for run in runs])
    return max(found.values(), key=lambda scores: scores.mean)


def _one_run(source: str, data: TaskData, config: GlueConfig, rate: float, seed: int) -> dict[str, float]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the new classifier, and dropout
        model, tokenizer = load_classifier(source, data.task)
        length = min(config.max_length, getattr(model.config, "max_position_embeddings", config.max_length))
        train = tokenise(data.train.texts, data.train.labels, tokenizer, length)
        held_out = tokenise(data.held_out.texts, data.held_out.labels, tokenizer, length)
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        model.to(device)  # type: ignore[arg-type]  # decorated without types in transformers
        _fit(model, ClassificationFeed(train, config.batch_size, seed, device=device), config, rate)
    return data.task.score(predict(model, held_out, config.batch_size), held_out.labels.numpy())


def _fit(model: PreTrainedModel, feed: ClassificationFeed, config: GlueConfig, rate: float) -> None:
    """Cross-entropy (squared error) on the labels alone, AdamW, linear warm-up and decay."""
    objective = ClassificationObjective(model, None, LABELS_ONLY)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, rate, fused=True)
    steps = config.epochs * len(feed)
    schedule = get_linear_schedule_with_warmup(optimizer, round(config.warmup * steps), steps)
    model.train(True)
    total = torch.zeros((), device=model.device)
    for _ in range(steps):
        batch = next(feed)
        loss, _ = objective(batch, objective.counts(batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        total += loss.detach()
    model.train(False)
    if not total.isfinite():
        raise FloatingPointError(f"The loss of the fine-tuning is not finite; lower the learning rate ({rate:g}).")


@torch.inference_mode()
def predict(model: PreTrainedModel, examples: Examples, batch_size: int) -> Array:
    """The likeliest class of each example, or the output of a regression, in the examples' order."""
    order = np.argsort(-np.diff(examples.starts), kind="stable")
    outputs = []
    for batch in in_order(examples, batch_size, model.device):
        logits = model(**classifier_inputs(model, batch)).logits.float()
        outputs.append((logits.squeeze(1) if model.config.num_labels == 1 else logits.argmax(-1)).cpu())
    found = torch.cat(outputs).numpy()
    predictions = np.empty_like(found)
    predictions[order] = found
    return predictions


# ------------------------------------------------------------------------------------------------ retention


def retention(scores: Mapping[str, tuple[Scores, Scores]]) -> dict[str, Any]:
    """The table as plain data: per task the student, the teacher, and student / teacher; and their means.

    Args:
        scores: (student's, teacher's) of each task.

    The mean retention is the ratio of the mean scores (over tasks), which is what the paper's 97 % are. A ratio to a
    teacher of 0 or below is None.
    """
    tasks = {
        name: {
            "student": student.mean,
            "teacher": teacher.mean,
            "retention": _retained(student.mean, teacher.mean),
            "student_runs": student._asdict(),
            "teacher_runs": teacher._asdict(),
        }
        for name, (student, teacher) in scores.items()
    }
    student_mean, teacher_mean = (statistics.fmean(pair[i].mean for pair in scores.values()) for i in (0, 1))
    mean = {
        "student": student_mean,
        "teacher": teacher_mean,
        "retention": _retained(student_mean, teacher_mean),
    }
    return {"tasks": tasks, "mean": mean, "claim": CLAIM}


def _retained(student: float, teacher: float) -> float | None:
    return student / teacher if teacher > 0.0 else None


def retention_table(found: Mapping[str, Any], scores: Mapping[str, tuple[Scores, Scores]]) -> Table:
    """The same for the screen; scores in percent, with their standard deviations over seeds."""
    table = Table(title="GLUE, held-out examples", title_justify="left")
    for name, justify in (("task", "left"), ("metrics", "left"), ("teacher", "right"), ("student", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("retention", justify="right")
    for name, (student, teacher) in scores.items():
        cells = [f"{100 * one.mean:.1f} ± {100 * one.deviation:.1f}" for one in (teacher, student)]
        table.add_row(name, ", ".join(student.metrics), *cells, _percent(found["tasks"][name]["retention"]))
    table.add_section()
    mean = found["mean"]
    table.add_row(
        "mean", "", f"{100 * mean['teacher']:.1f}", f"{100 * mean['student']:.1f}", _percent(mean["retention"])
    )
    table.caption = f"retention: student / teacher; the paper's claim is {CLAIM:.0%} of the mean"
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def run(
    student: str, teacher: str, config: GlueConfig, console: Console, tasks: Sequence[TaskData] | None = None
) -> dict[str, Any]:
    """Fine-tune and score both models on all tasks, print the retention table, and return it as plain data.

    Args:
        student, teacher: folders, or names on the hub.
        config: the numbers of the fine-tuning, and the tasks.
        console: of rich.
        tasks: their examples, where they have been read; None: `read_tasks`.

    Raises:
        InputError: as `read_tasks` and `fine_tune`; nothing is trained before all examples are read.
    """
    scores: dict[str, tuple[Scores, Scores]] = {}
    for data in read_tasks(config) if tasks is None else tasks:
        counts = f"{len(data.train.texts):,} examples, {len(data.held_out.texts):,} held out"
        if malformed := data.train.malformed + data.held_out.malformed:
            counts += f", {malformed} malformed rows left out"
        console.print(f"{data.task.name}: {counts}", highlight=False)
        pair = []
        for role, source in (("student", student), ("teacher", teacher)):
            console.print(f"Fine-tuning the {role}", highlight=False)
            pair.append(fine_tune(source, data, config, partial(console.print, highlight=False, markup=False)))
        scores[data.task.name] = pair[0], pair[1]
    found = retention(scores)
    console.print(retention_table(found, scores))
    return found
