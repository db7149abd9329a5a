"""Runs of the benchmark as one HTML page that needs nothing else, not even a script: numbers, plots, tables, machine.

Several suites' runs stand below each other. It measures nothing and draws nothing itself. Next: html_plots.py for the
plots, report.py, whose tables these are; distil_fast/training/html_page.py for the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from rich.table import Table
from rich.text import Text

from distil_fast.bench import html_plots, report
from distil_fast.bench.hosts import BEFORE
from distil_fast.bench.results import Results, Row
from distil_fast.bench.tables import MIB, number
from distil_fast.training.atomic import replacing
from distil_fast.training.html_page import cards, definitions, document, figures, section, table

TITLE = "distil_fast: the benchmark"
SPEED = (
    "Bars are logarithmic, on one scale for all cases; the dashed line is the first contender's speed. Per cent: the "
    "time that a copy of memory takes for the operation's least traffic, over the contender's time."
)


def write(runs: Sequence[Results], path: Path) -> None:
    """Writes the page; the file appears whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(page(runs), "utf-8")


def page(runs: Sequence[Results]) -> str:
    """The whole page."""
    style = resources.files(__package__).joinpath("html_report.css").read_text("utf-8")
    shown = [number for run in runs for number in _summary(run)]
    return document(TITLE, cards(shown) + "\n" + "".join(map(_run, runs)), style)


def _summary(results: Results) -> list[tuple[str, str, str]]:
    """The first case of the run: ours beside its yardstick."""
    for case, rows in results.by_case():
        first = html_plots.yardstick(rows)
        ours = next((row for row in rows if html_plots.kind(row.contender) == "ours" and row.timing), None)
        if first and ours and first is not ours:
            return [*_compared(case, first, ours)]
    return []


def _compared(case: str, first: Row, ours: Row) -> list[tuple[str, str, str]]:
    assert first.timing is not None
    assert ours.timing is not None
    than = "the host's own" if first.contender == BEFORE else first.contender
    ms = (first.timing.p50, ours.timing.p50)
    found = [(f"{number(ms[0] / ms[1])} x", f"as fast as {than}", f"{case}: {number(ms[0])} to {number(ms[1])} ms")]
    if first.peak_extra_bytes and ours.peak_extra_bytes:
        mib = [row.peak_extra_bytes / MIB for row in (first, ours) if row.peak_extra_bytes]
        saved = f"{number(mib[0] / mib[1])} x"
        found.append(
            (saved, f"less memory than {than}", f"{case}: {number(mib[0])} to {number(mib[1])} MiB at the peak")
        )
    return found


def _run(results: Results) -> str:
    """All of one run."""
    lines = report.header(results)
    parts = [
        "".join(f"<p{_warned(line)}>{escape(line)}</p>" for line in lines[1:]),
        html_plots.legend(results),
        _headed("Speed", f'<p class="notes">{SPEED}</p>' + figures(html_plots.speed(results))),
        _headed("Time and memory over the sizes", figures(html_plots.over_sizes(results))),
        _headed("Rates under the copy's roof", figures(html_plots.roofline(results))),
        _headed("Error and time", figures(html_plots.error_over_time(results))),
        _headed("Numbers", "".join(map(_table, report.tables(results)))),
        "".join(f'<p class="notes">{escape(note)}</p>' for note in report.notes(results)),
        _headed("Not timed", _refused(results)),
        _headed(
            "Machine and versions", definitions({"command": results.command, "date": results.date} | results.machine)
        ),
    ]
    return section(f"{results.command}, {results.date[:10]}", "".join(parts))


def _warned(line: str) -> str:
    return ' class="warning"' if line.isupper() or line.startswith("THE ") else ""


def _headed(title: str, content: str) -> str:
    return f"<h3>{escape(title)}</h3>{content}" if content else ""


def _refused(results: Results) -> str:
    reasons = [(row.case, row.contender, row.refused) for row in results.rows if row.refused]
    reasons += [(case, "everyone", reason) for case, reason in results.left_out.items()]
    items = (f"<li>{escape(case)}: <b>{escape(who)}</b>: {escape(reason)}</li>" for case, who, reason in reasons)
    return f'<ul class="refused">{"".join(items)}</ul>' if reasons else ""


def _table(made: Table) -> str:
    """A table of the terminal as HTML; a line with a bold name heads those below it."""
    columns = [[Text.from_markup(str(cell)) for cell in column.cells] for column in made.columns]
    lines = list(zip(*columns, strict=True))
    headings = frozenset(number for number, line in enumerate(lines) if line[0].spans)
    rows = [[cell.plain.strip() for cell in line] for line in lines]
    return table([str(column.header) for column in made.columns], rows, "numbers", headings)
