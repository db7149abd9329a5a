"""The suite of the integrations: each host's own loss, and ours in its place, on one batch; and its tables.

Checked against float64 first, as everything here: a host that is wrong is not timed. Next: hosts.py for the table of
hosts, suite.py, which measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata

from rich.markup import escape
from rich.table import Table

from distil_fast.bench import suite
from distil_fast.bench.cases import Case
from distil_fast.bench.hosts import AFTER, BEFORE, HOSTS
from distil_fast.bench.measure import Effort
from distil_fast.bench.results import Results, Row
from distil_fast.bench.tables import MIB, empty, number

LINES = "lines to change"  # Row.facts
NOTES = (
    "Loss and gradient, the host's own and ours in its place, on one batch of 4 sequences of 128 tokens, every eighth "
    "without a label. Peak MiB: beyond the inputs, the gradient among them. Errors are relative, against float64: of "
    "the loss, of the gradient, and of the gradient where student and teacher nearly agree (p~q).",
)


def run(chosen: Sequence[Case], effort: Effort, *, processes: int, command: str, note: suite.Note) -> Results:
    """Measures the cases; `note` is told what is going on."""
    found = suite.run(chosen, (), effort, processes=processes, command=command, note=note)
    lines = {host.name: float(host.lines) for host in HOSTS}
    problems = {case.name: case.problem for case in chosen}
    rows = [replace(row, facts={**row.facts, LINES: lines[problems[row.case]]}) for row in found.rows]
    return replace(found, rows=rows, machine={**found.machine, "hosts": versions()})


def versions() -> dict[str, str]:
    """The installed hosts."""
    found = {}
    for package in dict.fromkeys(host.package for host in HOSTS):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def tables(results: Results) -> list[Table]:
    """Of a run of this suite: a line for each case; none of another run."""
    if not any(row.contender == BEFORE for row in results.rows):
        return []
    table = empty("", "lines", "ms before", "after", "x", "MiB before", "after", "x")
    errors = empty("relative error", "loss before", "after", "gradient before", "after", "p~q before", "after")
    for case, _ in results.by_case():
        before, after = results.row(case, BEFORE), results.row(case, AFTER)
        if before and after:
            table.add_row(escape(case), f"{after.facts[LINES]:.0f}", *_times(before, after), *_peaks(before, after))
            errors.add_row(escape(case), *_errors(before, after))
    return [table, errors]


def _times(before: Row, after: Row) -> list[str]:
    both = [row.timing.p50 if row.timing else None for row in (before, after)]
    return _beside(both, "not timed")


def _peaks(before: Row, after: Row) -> list[str]:
    return _beside([row.peak_extra_bytes / MIB if row.peak_extra_bytes else None for row in (before, after)], "")


def _beside(both: list[float | None], missing: str) -> list[str]:
    """Two numbers and their ratio."""
    cells = [missing if value is None else number(value) for value in both]
    return [*cells, number(both[0] / both[1]) if both[0] and both[1] else ""]


def _errors(before: Row, after: Row) -> list[str]:
    def cell(error: float | None) -> str:
        return "-" if error is None else f"{error:.1e}"

    # of the loss, the array and the array where the models nearly agree; nobody measures a host's loss there
    both = [row.errors[:3] if row.errors else (None,) * 3 for row in (before, after)]
    return [cell(error) for pair in zip(*both, strict=True) for error in pair]
