"""What is seen of a run while it goes on: one live block of loss terms, speed, time left and learning rate.

The training loop hands over a `Progress` whenever it reads its numbers, and knows nothing of the screen; this file
knows nothing of training. Next: report.py for the tables, html_report.py for the page at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class Progress(NamedTuple):
    """How far a run is, at a reading of its numbers; means over the steps since the reading before."""

    step: int  # optimiser steps done
    steps: int  # in the whole run
    terms: Mapping[str, float]  # the loss and its terms before their weights, by name
    tokens_per_second: float  # real ones, of all ranks
    seconds_left: float
    learning_rate: float
    gradient_norm: float  # before clipping
    skipped: int = 0  # updates left out because of a loss that was not finite


class Display:
    """A context and a callable: shows each `Progress` it is called with, in place; without a screen, a line for each.

    Args:
        console: of rich; its width is respected.
        title: such as "Distilling".
    """

    def __init__(self, console: Console, title: str) -> None:
        self.console = console
        self.title = title
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, progress: Progress) -> None:
        if self.live is None:
            self.console.print(f"{self.title}: {in_words(progress)}", highlight=False, markup=False, soft_wrap=True)
        else:
            self.live.update(self._block(progress), refresh=True)

    def _block(self, progress: Progress) -> Group:
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=progress.steps, completed=progress.step, width=24)
        head.add_row(
            Text(self.title, style="bold"),
            bar,
            f"{progress.step:,} / {progress.steps:,}",
            f"{progress.step / max(progress.steps, 1):.0%}",
            f"{duration(progress.seconds_left)} left" if progress.step < progress.steps else "done",
        )
        numbers = Table.grid(padding=(0, 2))
        cells = {name: f"{value:.4g}" for name, value in progress.terms.items()} | _rates(progress)
        for name in cells:
            numbers.add_column(justify="right", header=name)
        numbers.add_row(*(Text(name, style="dim") for name in cells))
        numbers.add_row(*cells.values())
        return Group(head, numbers)


def _rates(progress: Progress) -> dict[str, str]:
    rates = {
        "tokens/s": f"{progress.tokens_per_second:,.0f}",
        "lr": f"{progress.learning_rate:.2e}",
        "grad norm": f"{progress.gradient_norm:.3g}",
    }
    return rates | ({"skipped": str(progress.skipped)} if progress.skipped else {})


def in_words(progress: Progress) -> str:
    """One line, for logs."""
    terms = " ".join(f"{name} {value:.4g}" for name, value in progress.terms.items())
    rates = " ".join(f"{name} {value}" for name, value in _rates(progress).items())
    return f"step {progress.step:,} of {progress.steps:,}, {terms}, {rates}, {duration(progress.seconds_left)} left"


def duration(seconds: float) -> str:
    """ "45 s", "3 min 20 s", "2 h 05 min"; "?" for what is not finite."""
    if not 0 <= seconds < float("inf"):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
