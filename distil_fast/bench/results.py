"""What a run found, as plain data: rows of measurements, what follows from them, and the JSON that holds them.

Only what was measured is stored; rates and ratios are computed where they are shown. Several processes' results become
one by medians. It knows nothing of how things are measured or shown. Next: targets.py, report.py.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from distil_fast.bench.contenders import family
from distil_fast.bench.correctness import Errors
from distil_fast.bench.measure import Canary, Timing
from distil_fast.bench.peers import ABSENT

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One contender of one case. `floor_bytes`: its least traffic, 0 where data is in cache; `copy_gb_per_s`: how fast
    a copy was in the same rounds. `refused`: why it was not timed. Errors as in correctness.Errors. `facts`: numbers by
    name that are no times; `parts`: milliseconds by name, of a training step's parts."""

    case: str
    contender: str
    floor_bytes: int
    copy_gb_per_s: float = 0.0
    errors: Errors | None = None
    refused: str | None = None
    timing: Timing | None = None
    peak_extra_bytes: int | None = None
    facts: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def floor_ms(self) -> float:
        """The time that the least traffic takes at the speed of the copy."""
        return 1e-6 * self.floor_bytes / self.copy_gb_per_s

    @property
    def is_our_fault(self) -> bool:
        """Whether distil_fast was wrong or failed, which no one else's mistake may hide."""
        return family(self.contender) == "ours" and self.refused is not None and not self.refused.startswith(ABSENT)


@dataclass(frozen=True)
class Memory:
    """Peak memory of one call beyond the gradient, in place."""

    case: str
    peak_extra_bytes: int


@dataclass(frozen=True)
class Results:
    """A whole run: what was asked for, when and on what, how long it took, and what was found.

    `suite`: its name; `canary`: how steady the machine was; `left_out`: why a case did not run, by its name. Runs from
    before these were kept have none of them.
    """

    rows: list[Row]
    copy_method: str
    memory: list[Memory] = field(default_factory=list)
    command: str = ""
    date: str = ""
    seconds: float = 0.0
    processes: int = 1
    machine: dict[str, Any] = field(default_factory=dict)
    suite: str = ""
    canary: Canary | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def copy_range(self) -> tuple[float, float]:
        """The slowest and the fastest rate of the copy beside any case, in GB/s."""
        rates = [row.copy_gb_per_s for row in self.rows]
        return min(rates), max(rates)

    def row(self, case: str, contender: str) -> Row | None:
        return next((row for row in self.rows if (row.case, row.contender) == (case, contender)), None)

    def ms(self, case: str, contender: str) -> float | None:
        """The median time; None if it was not measured."""
        row = self.row(case, contender)
        return row.timing.p50 if row and row.timing else None

    def times_faster(self, row: Row, than: str) -> float | None:
        """How many times faster a row is than the first timed contender of a family in its case."""
        other = next((r for r in self.rows if r.case == row.case and family(r.contender) == than and r.timing), None)
        return other.timing.p50 / row.timing.p50 if row.timing and other and other.timing else None

    def by_case(self) -> Iterator[tuple[str, list[Row]]]:
        """The rows of each case, in the order of the table."""
        for case in dict.fromkeys(row.case for row in self.rows):
            yield case, [row for row in self.rows if row.case == case]


def merged(runs: Sequence[Results]) -> Results:
    """The runs of several processes as one: medians of times, the largest errors; refused where any run refused."""
    first = runs[0]
    rows = [_merged_row([run.rows[i] for run in runs]) for i in range(len(first.rows))]
    return replace(first, rows=rows, processes=len(runs), canary=_worst(runs))


def joined(first: Results, second: Results) -> Results:
    """Two runs of different cases, one after the other, as one that began as the first did."""
    return replace(
        first,
        rows=[*first.rows, *second.rows],
        memory=[*first.memory, *second.memory],
        seconds=round(first.seconds + second.seconds, 1),
        canary=_worst([first, second]),
        left_out={**first.left_out, **second.left_out},
    )


def _worst(runs: Sequence[Results]) -> Canary | None:
    canaries = [run.canary for run in runs if run.canary]
    if not canaries:
        return None
    return Canary(max(c.spread for c in canaries), max((c.drift for c in canaries), key=abs))


def _merged_row(rows: Sequence[Row]) -> Row:
    errors = [row.errors for row in rows if row.errors]
    refused = next((row.refused for row in rows if row.refused), None)
    timings = [row.timing for row in rows if row.timing]
    return replace(
        rows[0],
        copy_gb_per_s=statistics.median(row.copy_gb_per_s for row in rows),
        errors=Errors(*(_largest(values) for values in zip(*errors, strict=True))) if errors else None,  # type: ignore[arg-type]
        refused=refused,
        timing=None if refused or not timings else _merged_timing(timings),
        parts={name: statistics.median(row.parts[name] for row in rows if row.parts) for name in rows[0].parts},
    )


def _merged_timing(timings: Sequence[Timing]) -> Timing:
    p20, p50, p80 = (statistics.median(getattr(t, q) for t in timings) for q in ("p20", "p50", "p80"))
    return Timing(p20, p50, p80, sum(t.samples for t in timings))


def _largest(values: Sequence[float | None]) -> float | None:
    return max((v for v in values if v is not None), default=None)


# ------------------------------------------------------------------------------------------------ JSON


def save(results: Results, path: Path) -> None:
    """Writes the results, so that `load` gives them back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"schema": SCHEMA, **asdict(results)}
    for row, stored in zip(results.rows, data["rows"], strict=True):
        stored["errors"] = row.errors and row.errors._asdict()
    path.write_text(json.dumps(data, indent=1) + "\n")


def load(path: Path) -> Results:
    """Reads what `save` wrote.

    Raises:
        ValueError: another schema.
    """
    data = json.loads(path.read_text())
    if data.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path}: expected benchmark results of schema {SCHEMA}. Run the benchmark again.")
    data["rows"] = [_row(row) for row in data["rows"]]
    data["memory"] = [Memory(**memory) for memory in data["memory"]]
    canary = data.pop("canary", None)
    data["canary"] = canary and Canary(**canary)
    return Results(**data)


def _row(data: dict[str, Any]) -> Row:
    errors, timing = data.pop("errors"), data.pop("timing")
    return Row(**data, errors=errors and Errors(**errors), timing=timing and Timing(**timing))
