"""A run from end to end on tiny shapes: from the command line to the table, the JSON and the picture."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from distil_fast import _C, bench
from distil_fast.bench import cases, contenders, isolated, measure, problems, results, suite
from distil_fast.bench.cases import FP32, Case
from distil_fast.bench.measure import Effort

TINY = Effort(warm_up=0.0, budget=0.01, fewest=3, most=5)
CASE = Case("KL+CE", 16, 257, FP32, True, 2.0, contenders=("eager", "half", "ours portable", "ours"))
CALLS = Case("CE", 4, 16, contenders=("eager", "ours"), calls=50)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small caches to empty, little effort, and a contender that is wrong."""
    monkeypatch.setattr(measure.machine, "last_level_cache_bytes", lambda device="cpu": 1 << 16)
    monkeypatch.setattr(measure, "FULL", TINY)
    half = {"half": lambda problem: lambda *inputs: 0.5 * problem.ours(*inputs)}
    monkeypatch.setattr(contenders, "FUNCTIONS", {**contenders.FUNCTIONS, **half})


def arguments(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(line)


def test_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cases.SUITES, "loss", (CASE, CALLS, Case("cosine", 8, 8)))
    path = tmp_path / "run.json"
    assert bench.run(arguments("loss", "--filter", "CE", "--json", str(path))) == 0
    printed = capsys.readouterr().out
    assert "half was not timed: wrong" in printed
    found = results.load(path)
    assert found.command == "distil-fast bench loss --filter 'CE'"
    assert [(row.case, row.contender) for row in found.rows] == [
        *((CASE.name, name) for name in CASE.contenders),
        *((CALLS.name, name) for name in CALLS.contenders),
    ]
    for row in found.rows:
        timed = row.contender != "half"
        assert (row.timing is not None, row.refused is None) == (timed, timed)
        if row.timing:
            assert row.timing.samples >= TINY.fewest
            assert 0 < row.timing.p20 <= row.timing.p50 <= row.timing.p80
        assert row.copy_gb_per_s > 0
        assert (row.floor_bytes == 0) == (row.case == CALLS.name)
    assert _C.instruction_set() == contenders.BEST_INSTRUCTION_SET
    assert bench.run(arguments("show", str(path))) == 0
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit, match="compiled"):
        bench.run(arguments("show", str(path), "--png", str(tmp_path / "run.png")))


def test_our_mistake_is_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders.FUNCTIONS, "ours", contenders.FUNCTIONS["half"])
    monkeypatch.setitem(cases.SUITES, "loss", (CALLS,))
    assert bench.run(arguments("loss", "--filter", CALLS.name)) == 1


def test_no_such_case() -> None:
    with pytest.raises(SystemExit, match="nonsense"):
        bench.run(arguments("loss", "--filter", "nonsense"))


def test_processes_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments("loss", "--processes", "0")
    assert "--processes" in capsys.readouterr().err


@pytest.mark.slow
def test_several_processes() -> None:
    notes: list[str] = []
    found = suite.run([CALLS], [], TINY, processes=2, command="", note=notes.append)
    assert found.processes == 2
    assert notes == ["process 1 of 2", "process 2 of 2"]
    timing = found.rows[1].timing
    assert timing is not None
    assert timing.samples >= 2 * TINY.fewest


@pytest.mark.skipif(not isolated.CLEAR_REFS.exists(), reason="the system keeps no peak that can be reset")
def test_peak_memory_counts_what_is_used_and_nothing_else() -> None:
    case = Case("KL+CE", 300, 30522, FP32, True, 2.0)  # so large that what is freed goes back to the system
    gradient = 300 * 30522 * 4
    peaks = isolated.fresh(isolated.peak_extra_bytes, case, ("ours", "eager"))
    assert 0 <= peaks["ours"] < 2 << 20
    assert 3 * gradient < peaks["eager"] < 6 * gradient


def test_first_calls_keep_what_they_made(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("KL+CE", 8, 64, FP32, False, 2.0)
    problem = problems.make(case)
    keeping = isolated._Keeping(contenders.build("ours", case, problem))
    for _ in range(3):
        keeping.prepare()
        keeping.call()
    assert len({result.array.data_ptr() for result in keeping.results}) == 3
    assert len(isolated.first_calls(case, 4)) == 4
