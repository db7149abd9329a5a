"""What the reader sees: the progress bar, the final table, the loss curves, and results.json.

It knows the screen and the shape of the results; nothing of how they came about. Next: demo.py, which fills them in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from distil_fast.training.comparison import column_titles, in_columns, measures
from distil_fast.training.results import ModelResults


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


def comparison_table(models: Mapping[str, ModelResults]) -> Table:
    """The comparison of a run's models, one row a measure; the same rows as the page's."""
    ordered = in_columns(models)
    table = Table(title="Size, speed, and quality on held-out examples", title_justify="left")
    table.add_column("")
    for title in column_titles(ordered):
        table.add_column(title, justify="right")
    for measure in measures(ordered):
        table.add_row(measure.title, *measure.cells())
    return table


def speeds_table(speeds: Mapping[str, Mapping[str, float]]) -> Table:
    """Tokens a second by what was timed, one row each, and by contender."""
    table = Table(title="Tokens a second", title_justify="left")
    table.add_column("")
    contenders = list(next(iter(speeds.values())))
    for name in (*contenders, "ratio"):
        table.add_column(name, justify="right")
    for title, found in speeds.items():
        first, *others = (found[name] for name in contenders)
        cells = [f"{value:,.0f}" for value in (first, *others)]
        table.add_row(title, *cells, f"{first / others[0]:.1f}")
    return table
