"""What the reader sees: the progress bar, the final table, the loss curves, and results.json.

It knows the screen and the shape of the results; nothing of how they came about. Next: demo.py, which fills them in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # without pyplot, and so without a display
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from distil_fast.training.atomic import replacing
from distil_fast.training.simple import TERMS

CURVE_TITLES = {
    "loss": "total",
    "ce": "KL to the teacher, times T²",
    "mlm": "masked-LM cross-entropy",
    "cos": "1 - cosine of the last hidden states",
}
SMOOTHING = 20  # steps


@dataclass(frozen=True)
class ModelResults:
    """One model's column of the table; shares are of 1."""

    parameters: int
    weight_bytes: int
    latency: float  # seconds of the encoder, batch 1
    accuracy: float
    pseudo_perplexity: float
    agreement: float


@dataclass(frozen=True)
class Results:
    """Everything the demo found out; `results.json` holds exactly this."""

    environment: dict[str, str | int]
    configuration: dict[str, Any]
    text: dict[str, int]  # documents, sequences and tokens of both parts
    models: dict[str, ModelResults]  # teacher, untrained, distilled
    loss_tokens_per_second: dict[str, float]
    step_tokens_per_second: dict[str, float]
    seconds: dict[str, float]  # by phase


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar; the function it yields sets how much is done and a word on how it goes."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, words="")
        yield lambda done, words: bar.update(task, completed=done, words=words)


def quality_table(results: Results) -> Table:
    """The comparison of the three models, one row a measure."""
    teacher = results.models["teacher"]
    models = [teacher, results.models["untrained"], results.models["distilled"]]
    table = Table(title="On held-out text, under fixed masks", title_justify="left")
    table.add_column("")
    for name in ("teacher", "student, untrained", "student, distilled"):
        table.add_column(name, justify="right")
    table.add_row("parameters", *(f"{m.parameters / 1e6:.2f} M" for m in models))
    table.add_row("size on disk", *(f"{m.weight_bytes / 1e6:.1f} MB" for m in models))
    table.add_row("latency, batch 1", *(f"{m.latency * 1e3:.2f} ms" for m in models))
    table.add_row("  times faster", *(f"{teacher.latency / m.latency:.2f}" for m in models))
    table.add_row("MLM top-1 accuracy", *(f"{m.accuracy:.1%}" for m in models))
    table.add_row("pseudo-perplexity", *(f"{m.pseudo_perplexity:,.1f}" for m in models))
    table.add_row("agreement with teacher", *(f"{m.agreement:.1%}" for m in models))
    return table


def throughput_table(results: Results) -> Table:
    """Tokens a second with either library's losses."""
    table = Table(title=f"Tokens a second, {results.configuration['precision']}", title_justify="left")
    table.add_column("")
    for name in ("distil_fast", "plain PyTorch", "ratio"):
        table.add_column(name, justify="right")
    for title, speeds in (
        ("loss and its gradient", results.loss_tokens_per_second),
        ("whole training step", results.step_tokens_per_second),
    ):
        ours, theirs = speeds["distil_fast"], speeds["pytorch"]
        table.add_row(title, f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.1f}")
    return table


def write_results(results: Results, path: Path) -> None:
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(asdict(results), indent=2) + "\n", "utf-8")


def plot_losses(history: Tensor, path: Path) -> None:
    """The four terms over the optimiser steps, [steps, 4], as a PNG: every step pale, a running mean over it."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    steps = range(1, len(history) + 1)
    for axes, name, values in zip(figure.subplots(2, 2).flat, TERMS, history.T, strict=True):
        axes.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        window = min(SMOOTHING, len(values))
        smooth = values.unfold(0, window, 1).mean(1)
        axes.plot(steps[window - 1 :], smooth, color="tab:blue", linewidth=1.6)
        axes.set_title(CURVE_TITLES[name], fontsize=10)
        axes.set_xlabel("optimiser step")
        axes.set_ylim(bottom=0, top=1.05 * float(smooth.max()))
        axes.grid(alpha=0.3)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
