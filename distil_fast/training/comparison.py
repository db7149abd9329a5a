"""What of a run's results is compared and summed up: the rows of the table of models, and the numbers at its top.

The screen (report.py) and the page (html_report.py) show the same. It knows results and words, no layout.
Next: results.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from distil_fast.training.progress import duration
from distil_fast.training.results import STEP, ModelResults, RunResults, retention

TEACHER, DISTILLED = "teacher", "distilled"
ROLES = {TEACHER: "Teacher", "student": "Student", "untrained": "Student, untrained", DISTILLED: "Student, distilled"}
TITLES = {  # of losses and measures, in the order in which they are shown; others follow by their names
    "loss": "Loss, weighted sum of its terms",
    "ce": "KL to the teacher, times T²",
    "mlm": "Masked-LM cross-entropy",
    "label": "Cross-entropy with the labels",
    "cos": "1 - cosine of the hidden states",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Tokens a second",
    "accuracy": "MLM top-1 accuracy",
    "pseudo_perplexity": "Pseudo-perplexity",
    "agreement": "Top-1 agreement with the teacher",
    "kl": "KL to the teacher, nats",
}
MISSING = "-"


def in_columns(models: Mapping[str, ModelResults]) -> dict[str, ModelResults]:
    """The models in the order of their columns: the roles', then others as they come."""
    roles = list(ROLES)
    return {name: models[name] for name in sorted(models, key=lambda n: roles.index(n) if n in ROLES else len(roles))}


def column_titles(models: Mapping[str, ModelResults]) -> list[str]:
    return [ROLES.get(name, name) for name in models]


class Measure(NamedTuple):
    """A row of the comparison."""

    title: str
    values: list[float | None]  # one a model
    shown: str  # a format for the number

    def cells(self) -> list[str]:
        return [MISSING if value is None else self.shown.format(value) for value in self.values]


def measures(models: Mapping[str, ModelResults]) -> list[Measure]:
    """The rows that all models together have something for, the teacher's column first where there is one."""
    columns = list(models.values())
    found = [
        Measure("Parameters", [m.parameters / 1e6 for m in columns], "{:.2f} M"),
        Measure("Size of the weights", [m.weight_bytes / 1e6 for m in columns], "{:.1f} MB"),
    ]
    for batch in _keys(m.latency for m in columns):
        seconds = [m.latency.get(batch) for m in columns]
        found.append(Measure(f"Latency, batch {batch}", [s and 1e3 * s for s in seconds], "{:,.1f} ms"))
        if len(seconds) > 1 and seconds[0] is not None:
            ratios = [seconds[0] / s if s else None for s in seconds]
            found.append(Measure("… times faster", ratios, "{:.2f}"))
    for batch in _keys(m.tokens_per_second for m in columns):
        speeds = [m.tokens_per_second.get(batch) for m in columns]
        found.append(Measure(f"Tokens/s, batch {batch}", speeds, "{:,.0f}"))
    shown = {"accuracy": "{:.1%}", "agreement": "{:.1%}", "pseudo_perplexity": "{:,.2f}"}
    for name in _keys(m.quality for m in columns):
        values = [m.quality.get(name) for m in columns]
        found.append(Measure(TITLES.get(name, name), values, shown.get(name, "{:.4g}")))
    cosines = [sum(m.cosines) / len(m.cosines) if m.cosines else None for m in columns]
    if any(value is not None for value in cosines):
        found.append(Measure("Cosine with the teacher's layers, mean", cosines, "{:.3f}"))
    tasks = list(_keys(m.tasks for m in columns))
    found += [Measure(f"GLUE {task}", [m.tasks.get(task) for m in columns], "{:.1%}") for task in tasks]
    if tasks and columns[0].tasks:
        kept = [retention(m, columns[0]) for m in columns]
        found.append(Measure("Retention, mean over tasks", kept, "{:.1%}"))
    return found


def _keys(dictionaries: Iterable[Mapping[str, Any]]) -> dict[str, None]:
    return {key: None for dictionary in dictionaries for key in dictionary}


def summary(results: RunResults) -> list[tuple[str, str, str]]:
    """The numbers at the top: (number, what it is, in other words)."""
    found = []
    teacher, student = results.models.get(TEACHER), results.models.get(DISTILLED)
    if teacher is not None and student is not None:
        smaller = 1 - student.parameters / teacher.parameters
        found.append(
            (
                f"{smaller:.0%}",
                "fewer parameters",
                f"{student.parameters / 1e6:.1f} M of {teacher.parameters / 1e6:.1f} M",
            )
        )
        if "1" in teacher.latency and student.latency.get("1"):
            ratio = teacher.latency["1"] / student.latency["1"]
            words = f"{1e3 * student.latency['1']:.1f} ms instead of {1e3 * teacher.latency['1']:.1f}"
            found.append((f"{ratio:.2f}x", "faster at batch 1", words))
        if (kept := retention(student, teacher)) is not None:
            found.append((f"{kept:.1%}", "of the teacher's GLUE score", f"{len(student.tasks)} tasks"))
    if student is not None:
        if (agreement := student.quality.get("agreement")) is not None:
            found.append((f"{agreement:.1%}", "agreement with the teacher", "top-1, on held-out text"))
        if (accuracy := student.quality.get("accuracy")) is not None:
            of = teacher.quality.get("accuracy") if teacher is not None else None
            found.append(
                (f"{accuracy:.1%}", "MLM accuracy", f"teacher {of:.1%}" if of is not None else "held-out text")
            )
    steps = results.history.get(STEP)
    if (total := results.seconds.get("total")) is not None:
        found.append((duration(total), "from start to end", f"{int(steps[-1]):,} steps" if steps else ""))
    return found
