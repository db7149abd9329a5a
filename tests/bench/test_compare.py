"""Two runs side by side: what is a regression, and what is noise, another machine, or someone else's."""

from __future__ import annotations

import argparse
import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from distil_fast import bench
from distil_fast.bench import compare, report
from distil_fast.bench import results as results_module
from distil_fast.bench.measure import Canary, Timing
from distil_fast.bench.results import Results, Row

MACHINE = {
    "cpu": "A processor",
    "threads": 2,
    "instruction_set": "avx512",
    "memory_gib": 16.0,
    "python": "3",
    "torch": "2",
}
STEADY = Canary(spread=0.05, drift=0.01)


def run(ms: float, *, contender: str = "ours", noise: float = 0.02, rate: float = 50.0, **options: object) -> Results:
    timing = Timing((1 - noise) * ms, ms, (1 + noise) * ms, 30)
    row = Row("KL", contender, 1 << 20, rate, timing=timing)
    found = Results([row], "copy", machine={**MACHINE, "commit": "0"}, date="2026-11-23", canary=STEADY)
    return replace(found, **options)  # type: ignore[arg-type]


def only(old: Results, new: Results) -> compare.Change:
    (found,) = compare.changes(old, new)
    return found


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        (run(12.0), compare.SLOWER),
        (run(10.3), compare.SAME),  # within the margin
        (run(12.0, noise=0.2), compare.SAME),  # within the intervals
        (run(12.0, rate=41.0), compare.SAME),  # the machine's memory was slower, too
        (run(8.0), compare.FASTER),
        (run(8.0, rate=64.0), compare.SAME),
        (run(12.0, canary=Canary(0.6, 0.0)), compare.UNJUDGED),
        (run(12.0, canary=Canary(0.0, -0.3)), compare.UNJUDGED),
        (run(12.0, machine={**MACHINE, "cpu": "Another"}), compare.UNJUDGED),
    ],
)
def test_only_what_is_slower_beyond_noise_is_a_regression(new: Results, verdict: str) -> None:
    found = only(run(10.0), new)
    assert found.verdict == verdict
    assert found.is_regression == (verdict == compare.SLOWER)
    assert found.old_ms == 10.0


def test_someone_elses_loss_is_no_regression_of_ours() -> None:
    found = only(run(10.0, contender="eager"), run(20.0, contender="eager"))
    assert (found.verdict, found.is_regression) == (compare.SLOWER, False)


def test_a_contender_that_is_refused_now_is_a_regression_unless_the_machine_lacks_it() -> None:
    old = run(10.0)
    for refused, regression in (("wrong: relative error", [True]), ("not available: no avx512", [])):
        new = replace(old, rows=[replace(old.rows[0], timing=None, refused=refused)])
        assert [change.is_regression for change in compare.changes(old, new)] == regression


def test_ratios() -> None:
    found = only(run(10.0, rate=40.0), run(15.0, rate=60.0))
    assert found.ratio == pytest.approx(1.5)
    assert found.by_copy == pytest.approx(2.25)


def shown(old: Results, new: Results) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=200)
    failed = report.show_comparison(old, new, console)
    return failed, console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_and_the_last_lines() -> None:
    failed, text = shown(run(10.0), run(20.0))
    assert failed
    assert "REGRESSION: KL: ours is slower" in text
    assert "1 times compared, 1 regressions of ours" in text
    assert ["ours", "10", "20", "2", "2", "slower"] in [line.split() for line in text.splitlines()]
    failed, text = shown(run(10.0), run(20.0, machine={**MACHINE, "threads": 4}))
    assert not failed
    assert "threads was 2 and is 4" in text
    assert "Nothing in common" in shown(run(10.0), run(10.0, contender="other"))[1]


def test_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    results_module.save(run(10.0), old)
    results_module.save(run(20.0), new)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.run(parser.parse_args(["show", str(new), "--compare", str(old)])) == 1
    assert bench.run(parser.parse_args(["show", str(old), "--compare", str(new)])) == 0
    assert "REGRESSION" in capsys.readouterr().out


def test_committed_runs_from_before_there_was_a_canary_are_read() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    for path in folder.glob("*.json"):
        found = results_module.load(path)
        assert not [change for change in compare.changes(found, found) if change.is_regression]


def test_the_canary() -> None:
    assert not Canary.of([0.010] * 50).noisy
    assert Canary.of([0.010, 0.014] * 25).noisy
    assert Canary.of([0.010] * 25 + [0.010 * (1 + n / 100) for n in range(25)]).drift == pytest.approx(0.195, abs=0.02)
    assert Canary.of([0.01]) == Canary(0.0, 0.0)
    steady, noisy = run(10.0), run(10.0, canary=Canary(0.9, -0.4))
    assert results_module.merged([steady, noisy]).canary == Canary(0.9, -0.4)
    joined = results_module.joined(steady, replace(noisy, left_out={"large": "no room"}))
    assert (len(joined.rows), joined.canary, joined.left_out) == (2, Canary(0.9, -0.4), {"large": "no room"})
    assert "TOO NOISY" in "".join(report.header(noisy))
    assert "TOO NOISY" not in "".join(report.header(steady))
