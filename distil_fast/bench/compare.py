"""Two runs side by side: how much slower or faster everyone is, and what of that is more than noise.

A time is compared twice: as it is, and in copies of memory made beside it, so that neither a slow hour of the machine's
memory nor a copy that is unlike the code counts as a change of the code. It measures nothing. Next: results.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from distil_fast.bench.peers import ABSENT
from distil_fast.bench.results import Results, Row
from distil_fast.bench.tables import empty, number

MARGIN = 1.05  # beyond the samples' intervals
SLOWER, FASTER, SAME, REFUSED, UNJUDGED = "slower", "faster", "", "refused now", "slower?"
SAME_MACHINE = ("cpu", "threads", "gpu")


class Change(NamedTuple):
    """One contender of one case in both runs. Times in milliseconds, None where it was refused; `ratio`: new over old,
    `by_copy`: the same in copies of memory; `verdict`: one of the words above."""

    case: str
    contender: str
    old_ms: float | None
    new_ms: float | None
    ratio: float | None
    by_copy: float | None
    verdict: str

    @property
    def is_regression(self) -> bool:
        """Whether this fails a comparison: ours, beyond noise."""
        return self.contender.partition(" ")[0] == "ours" and self.verdict in (SLOWER, REFUSED)


def unlike(old: Results, new: Results) -> list[str]:
    """Why the runs' times are not those of the same thing; no verdict stands then."""
    told = []
    for name in SAME_MACHINE:
        before, after = old.machine.get(name), new.machine.get(name)
        if before != after:
            told.append(f"{name} was {before} and is {after}")
    for when, run in (("the old run", old), ("this run", new)):
        if run.canary and run.canary.noisy:
            told.append(f"the machine was too noisy in {when}")
    return told


def changes(old: Results, new: Results) -> list[Change]:
    """Everyone who was timed in the old run and was asked for again."""
    judged = not unlike(old, new)
    return list(_changes(old, new, judged))


def _changes(old: Results, new: Results, judged: bool) -> Iterator[Change]:
    for row in new.rows:
        before = old.row(row.case, row.contender)
        if before is None or before.timing is None:
            continue
        if row.timing is None:
            if row.refused and row.refused.startswith(ABSENT):
                continue
            yield Change(row.case, row.contender, before.timing.p50, None, None, None, REFUSED)
            continue
        plain, by_copy = row.timing.p50 / before.timing.p50, _in_copies(row, before)
        verdict = _verdict(before, row, by_copy / plain)
        if verdict == SLOWER and not judged:
            verdict = UNJUDGED
        yield Change(row.case, row.contender, before.timing.p50, row.timing.p50, plain, by_copy, verdict)


def _in_copies(new: Row, old: Row) -> float:
    """New time over old, each multiplied by the rate of the copy beside it."""
    assert new.timing
    assert old.timing
    scale = new.copy_gb_per_s / old.copy_gb_per_s if old.copy_gb_per_s and new.copy_gb_per_s else 1.0
    return new.timing.p50 / old.timing.p50 * scale


def _verdict(old: Row, new: Row, scale: float) -> str:
    """Slower or faster where the intervals from p20 to p80 lie apart by more than the margin, by both measures."""
    assert old.timing
    assert new.timing
    scales = (1.0, scale)
    if all(new.timing.p20 * by > MARGIN * old.timing.p80 for by in scales):
        return SLOWER
    if all(MARGIN * new.timing.p80 * by < old.timing.p20 for by in scales):
        return FASTER
    return SAME


def table(found: list[Change]) -> Table:
    """Both times, both ratios and the verdict of everyone, by case."""
    shown = empty("new / old", "old ms", "new ms", "ratio", "in copies", "")
    for case in dict.fromkeys(change.case for change in found):
        shown.add_row(f"[bold]{escape(case)}[/bold]")
        for change in (change for change in found if change.case == case):
            numbers = (change.old_ms, change.new_ms, change.ratio, change.by_copy)
            shown.add_row(f"  {escape(change.contender)}", *(number(value) for value in numbers), change.verdict)
        shown.add_section()
    return shown


def summary(old: Results, new: Results, found: list[Change]) -> list[str]:
    """What the table comes to."""
    if not found:
        return ["Nothing in common with the old run: no contender of any case was timed in both."]
    regressions = [change for change in found if change.is_regression]
    lines = [f"REGRESSION: {c.case}: {c.contender} is {c.verdict}" for c in regressions]
    reasons = unlike(old, new)
    if reasons:
        lines.append(f"Times are not judged: {'; '.join(reasons)}.")
    judged = "beyond noise" if not reasons else "that could be judged"
    return [*lines, f"{len(found)} times compared, {len(regressions)} regressions of ours {judged}."]
