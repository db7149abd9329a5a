"""The tables of README and docs are those of the committed runs, the newest of each suite; and how they get there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import marks, tables
from benchmarks.tables import Run
from distil_fast.bench import integrations
from distil_fast.bench.correctness import Errors
from distil_fast.bench.hosts import AFTER, BEFORE, CASES
from distil_fast.bench.measure import Timing
from distil_fast.bench.results import Results, Row, save

MACHINE = {"cpu": "a", "threads": 2, "instruction_set": "avx2", "torch": "2", "commit": "c", "hosts": {"trl": "1.16.0"}}


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return tables.load()


def test_the_pages_show_the_committed_runs(runs: list[Run]) -> None:
    differing = [str(path.relative_to(tables.ROOT)) for path in tables.stale(runs)]
    assert not differing, f"{differing}: run `python -m benchmarks.tables`"


def test_every_table_but_that_of_a_page_to_come_has_a_place() -> None:
    placed = [name for page in tables.PAGES if (tables.ROOT / page).exists() for name in named(tables.ROOT / page)]
    assert set(tables.TABLES) - {"integrations"} <= set(placed)


def named(page: Path) -> list[str]:
    return marks.names(page.read_text("utf-8"))


def test_a_changed_number_is_seen_and_put_right(runs: list[Run], tmp_path: Path) -> None:
    readme = (tables.ROOT / "README.md").read_text("utf-8")
    cell = f"| {runs_of(runs, 'loss').ms(tables.IN_PLACE, 'ours')} |"
    assert cell in readme
    (tmp_path / "README.md").write_text(readme.replace(cell, "| 1.23 ms |"))
    (found,) = tables.stale(runs, tmp_path).values()
    assert cell in found
    assert "1.23 ms" not in found


def runs_of(runs: list[Run], suite: str) -> Run:
    return next(run for run in runs if run.suite == suite)


def test_the_newest_complete_run_wins(runs: list[Run]) -> None:
    """One that was filtered does not push an older whole one aside."""
    whole = runs_of(runs, "encoders")
    newer = Run(Path("newer.json"), replace(whole.results, date="2030-01-01T00:00:00+00:00"))
    part = Run(Path("part.json"), replace(whole.results, rows=whole.results.rows[:2], date="2031-01-01T00:00:00+00:00"))
    ordered = sorted([whole, newer, part], key=lambda run: run.results.date, reverse=True)
    assert "newer.json" in tables.encoders(ordered, tables.ROOT / "README.md")
    with pytest.raises(LookupError, match="bench encoders"):
        tables.encoders([part], tables.ROOT / "README.md")


def test_runs_are_read_newest_first(runs: list[Run], tmp_path: Path) -> None:
    whole = runs_of(runs, "encoders").results
    for name, year in (("a", 2030), ("b", 2032), ("c", 2031)):
        save(replace(whole, date=f"{year}-01-01"), tmp_path / f"{name}.json")
    assert [run.path.stem for run in tables.load(tmp_path)] == ["b", "c", "a"]
    assert json.loads((tmp_path / "a.json").read_text())["date"] == "2030-01-01"


def test_the_table_of_the_integrations(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "integrations.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- integrations:begin -->\nold\n<!-- integrations:end -->\nafter\n")
    assert tables.NOT_YET in tables.page_with_tables(page, [])

    def row(contender: str, ms: float) -> Row:
        timing, facts = Timing(ms, ms, ms, 30), {integrations.LINES: 2.0}
        return Row(CASES[0].name, contender, 0, 40.0, Errors(1e-7, 2e-7, None), None, timing, 8 << 20, facts)

    absent = Row(CASES[2].name, BEFORE, 0, 40.0, refused="not available: trl", facts={integrations.LINES: 2.0})
    rows = [row(BEFORE, 800.0), row(AFTER, 8.0), absent, replace(absent, contender=AFTER)]
    command = "distil-fast bench integrations"
    found = Results(rows, "copy", command=command, date="2026-11-24", machine=MACHINE)
    text = tables.page_with_tables(page, [Run(tables.RUNS / "x.json", found)])
    assert f"| {CASES[0].name} | 2 | 800 | 8 | 100 | 8 | 8 | 1 |" in text
    assert f"* {CASES[2].name}, host: not available: trl" in text
    assert "trl 1.16.0" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")


def test_places() -> None:
    page = "a\n<!-- x:begin -->\n<!-- x:end -->\n<!-- y:begin -->\n1\n<!-- y:end -->\n"
    assert marks.names(page) == ["x", "y"]
    assert marks.filled(page, "x", "\\1 new\n") == page.replace("<!-- x:begin -->\n", "<!-- x:begin -->\n\\1 new\n")
    with pytest.raises(ValueError, match="z:begin"):
        marks.filled(page, "z", "")
