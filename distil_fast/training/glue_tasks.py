"""GLUE's tasks: their columns, classes and measures, and their examples out of files or a Hugging Face dataset.

The files are those that GLUE is distributed as (TSV of several layouts), CSV, or JSON lines. It knows texts and labels;
nothing of tokens or models. Wang et al. 2019. Next: classification_feed.py for tokens, glue.py for the scores.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distil_fast.training.glue_metrics import METRICS, Array
from distil_fast.training.settings import InputError

TRAIN, HELD_OUT = "train", "held_out"
MALFORMED = 0.01  # share of the rows that may be; some of GLUE's own files (QQP) have a few


class Task(NamedTuple):
    """One of `TASKS`."""

    name: str
    folder: str  # of GLUE's archive
    texts: tuple[tuple[str, ...], ...]  # one or two texts, each with the names that its column has, ours first
    label: tuple[str, ...]  # likewise
    classes: tuple[str, ...]  # in the order of their numbers; none: a regression
    metrics: tuple[str, ...]  # names in METRICS; the task's score is their mean, as GLUE's is
    headless: tuple[str, ...] = ()  # the columns of a TSV file without a first line that names them

    @property
    def outputs(self) -> int:
        """Of a classifier for this task."""
        return len(self.classes) or 1

    def score(self, predictions: Array, labels: Array) -> dict[str, float]:
        """The task's measures, as shares of 1."""
        return {name: METRICS[name](predictions, labels) for name in self.metrics}


SENTENCE, SENTENCES, LABEL = ("sentence",), (("sentence1",), ("sentence2",)), ("label",)
ENTAILED = ("entailment", "not_entailment")
TASKS = {
    task.name: task
    for task in (
        Task(
            "cola",
            "CoLA",
            (SENTENCE,),
            LABEL,
            ("unacceptable", "acceptable"),
            ("matthews",),
            headless=("source", "label", "mark", "sentence"),
        ),
        Task("sst2", "SST-2", (SENTENCE,), LABEL, ("negative", "positive"), ("accuracy",)),
        Task(
            "mrpc",
            "MRPC",
            (("sentence1", "#1 String"), ("sentence2", "#2 String")),
            ("label", "Quality"),
            ("not_equivalent", "equivalent"),
            ("f1", "accuracy"),
        ),
        Task("stsb", "STS-B", SENTENCES, ("label", "score"), (), ("pearson", "spearman")),
        Task(
            "qqp",
            "QQP",
            (("question1",), ("question2",)),
            ("label", "is_duplicate"),
            ("not_duplicate", "duplicate"),
            ("f1", "accuracy"),
        ),
        Task(
            "mnli",
            "MNLI",
            (("premise", "sentence1"), ("hypothesis", "sentence2")),
            ("gold_label", "label"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
        ),
        Task("qnli", "QNLI", (("question",), ("sentence",)), LABEL, ENTAILED, ("accuracy",)),
        Task("rte", "RTE", SENTENCES, LABEL, ENTAILED, ("accuracy",)),
        Task("wnli", "WNLI", SENTENCES, LABEL, ("not_entailment", "entailment"), ("accuracy",)),
    )
}
HUB_SPLITS = {TRAIN: "train", HELD_OUT: "validation"}
FILE_STEMS = {TRAIN: ("train",), HELD_OUT: ("held_out", "dev", "dev_matched", "validation", "validation_matched")}
SUFFIXES = (".tsv", ".csv", ".jsonl")


class Labelled(NamedTuple):
    """The texts (one or two each) of a task, and a class number or a value each."""

    texts: list[tuple[str, ...]]
    labels: list[int] | list[float]
    malformed: int  # rows left out


def task_named(name: str) -> Task:
    """The task of that name; "SST-2" is "sst2".

    Raises:
        InputError: there is none.
    """
    task = TASKS.get(name.lower().replace("-", ""))
    if task is None:
        raise InputError(f"task: expected one of {', '.join(TASKS)}, got {name!r}.")
    return task


def find_file(folder: Path, task: Task, part: str) -> Path:
    """The file of a part ("train", "held_out") in a folder that holds a folder for each task.

    Raises:
        InputError: no such file.
    """
    tried = [
        folder / name / (stem + s) for name in (task.folder, task.name) for stem in FILE_STEMS[part] for s in SUFFIXES
    ]
    for path in tried:
        if path.is_file():
            return path
    raise InputError(f"glue.folder: expected the examples of {task.name} in {tried[0]} or {tried[-1]}, found neither.")


def read_file(path: Path, task: Task) -> Labelled:
    """The examples in a TSV, CSV or JSONL file, by the names of its columns; labels are numbers or names of classes.

    A TSV file has no quotes, as GLUE's have none; one of CoLA has no line of names either. Rows that lack a column are
    left out and counted.

    Raises:
        InputError: unreadable, not UTF-8, another suffix, a column or label that is not the task's, no examples, or
            more malformed rows than `MALFORMED`.
    """
    readers: dict[str, Callable[[str, Task], Iterator[Mapping[str, Any]]]] = {
        ".tsv": _tsv,
        ".csv": lambda text, _: csv.DictReader(text.splitlines(keepends=True)),
        ".jsonl": _json_lines,
    }
    if path.suffix not in readers:
        raise InputError(f"{path}: expected a file {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}.")
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, got the byte {error.object[error.start]:#04x}.") from error
    try:
        return _labelled(readers[path.suffix](text, task), task, str(path))
    except (csv.Error, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as {path.suffix[1:].upper()}: {error}.") from error


def _tsv(text: str, task: Task) -> Iterator[Mapping[str, Any]]:
    lines = text.split("\n")  # not splitlines(): sentences hold other separators
    first = lines[0].rstrip("\r").split("\t")
    named = not task.headless or "sentence" in first
    names = first if named else list(task.headless)
    for line in lines[1 if named else 0 :]:
        if line.strip():
            cells = line.rstrip("\r").split("\t")
            yield dict(zip(names, cells, strict=False))  # a short row lacks columns, and is left out later


def _json_lines(text: str, task: Task) -> Iterator[Mapping[str, Any]]:
    for line in text.split("\n"):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise InputError(f"{task.name}: expected an object on each line, got {line[:60]!r}.")
            yield row


def read_dataset(task: Task, part: str, name: str = "glue") -> Labelled:
    """The examples of a Hugging Face dataset with a configuration for each task, from the hub or its cache.

    Raises:
        InputError: it cannot be loaded.
    """
    import datasets

    split = HUB_SPLITS[part] + ("_matched" if task.name == "mnli" and part == HELD_OUT else "")
    try:
        rows = datasets.load_dataset(name, task.name, split=split)
    except Exception as error:  # of the hub, the network, the file system and pyarrow: each has its own
        raise InputError(
            f"{name}:{task.name}: the dataset cannot be loaded: {error} Without the hub, give GLUE's files by "
            "glue.folder, or a task's by train and held_out."
        ) from error
    return _labelled(rows, task, f"{name}:{task.name}")


# ------------------------------------------------------------------------------------------------ rows to examples


def _labelled(rows: Iterable[Mapping[str, Any]], task: Task, source: str) -> Labelled:
    texts: list[tuple[str, ...]] = []
    labels: list[Any] = []
    malformed = 0
    for row in rows:
        found = [_cell(row, names) for names in task.texts]
        label = _cell(row, task.label)
        if label is None or any(text is None for text in found):
            malformed += 1
            if not texts and malformed == 1:
                _check_columns(row, task, source)
            continue
        texts.append(tuple(str(text) for text in found))
        labels.append(_label(label, task, source))
    total = len(texts) + malformed
    if not texts:
        raise InputError(f"{source}: expected examples of {task.name}, found none in {total} rows.")
    if malformed > max(1, MALFORMED * total):
        raise InputError(
            f"{source}: expected rows with {_columns(task)}, but {malformed} of {total} lack one. Is it a file of "
            f"{task.name}, and whole?"
        )
    return Labelled(texts, labels, malformed)


def _cell(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _columns(task: Task) -> str:
    return ", ".join(" or ".join(names) for names in (*task.texts, task.label))


def _check_columns(row: Mapping[str, Any], task: Task, source: str) -> None:
    """Raises where a column is missing altogether, by the first row."""
    if not all(any(name in row for name in names) for names in (*task.texts, task.label)):
        raise InputError(f"{source}: expected the columns {_columns(task)} of {task.name}, found {', '.join(row)}.")


def _label(given: Any, task: Task, source: str) -> int | float:
    if not task.classes:
        try:
            value = float(given)
        except ValueError:
            value = np.nan
        if not np.isfinite(value):
            raise InputError(f"{source}: expected a number as the label of {task.name}, got {given!r}.")
        return value
    if given in task.classes:
        return task.classes.index(given)
    number = str(given)
    if number.isdecimal() and int(number) < len(task.classes):
        return int(number)
    raise InputError(
        f"{source}: expected a label of {task.name} ({', '.join(task.classes)}, or 0 to {len(task.classes) - 1}), got "
        f"{given!r}."
    )
