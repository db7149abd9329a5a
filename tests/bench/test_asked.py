"""From options to cases: cases made to order, what fits into memory, devices, and the suite of a newcomer."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from distil_fast import bench
from distil_fast.bench import asked, cases, contenders, grid, measure, quick, results, room, suite
from distil_fast.bench.cases import BF16, FP32, Case
from distil_fast.bench.measure import Effort

TINY = Effort(warm_up=0.0, budget=0.01, fewest=3, most=5)


def arguments(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(line)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small caches to empty, little effort, and nothing compiled or measured in other processes."""
    monkeypatch.setattr(measure.machine, "last_level_cache_bytes", lambda device="cpu": 1 << 16)
    monkeypatch.setattr(measure, "FULL", TINY)
    monkeypatch.setattr(measure, "QUICK", TINY)
    monkeypatch.setattr(suite.isolated, "fresh", lambda function, *rest: {})
    monkeypatch.setitem(contenders.FUNCTIONS, "compiled", contenders.FUNCTIONS["eager"])


def test_options_stand_before_or_after_the_suite() -> None:
    bare = arguments("--quick")
    assert (bare.suite, bare.quick, bare.filter, bare.processes) == ("quick", True, "", 1)
    assert arguments("--quick", "loss").quick
    assert arguments("--filter", "a", "loss", "--filter", "b").filter == "b"
    asked_for = arguments("loss", "--vocab", "50, 60", "--labelled", "15%,1", "--dtype", "bf16", "--top-k", "8")
    assert (asked_for.vocab, asked_for.labelled, asked_for.dtype, asked_for.top_k) == (
        [50, 60],
        [0.15, 1.0],
        ["bf16"],
        [8],
    )
    expected = "distil-fast bench loss --vocab 50,60 --dtype bf16 --labelled 0.15,1.0 --top-k 8"
    assert asked.command(asked_for) == expected
    assert asked.command(arguments(*expected.split()[2:])) == expected


@pytest.mark.parametrize(
    "line",
    [
        ("--vocab", "0"),
        ("--rows", "3"),
        ("--dtype", "fp8"),
        ("--temperature", "0"),
        ("--labelled", "1.5"),
        ("--top-k", "x"),
    ],
)
def test_values_of_axes_are_checked(line: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments("loss", *line)
    assert "expected" in capsys.readouterr().err


def test_cases_made_to_order() -> None:
    axes = grid.Axes(vocab=[100, 200], rows=[8], dtype=[FP32, BF16], temperature=[1.0], labelled=[0.5])
    made = grid.made("loss", axes, "cpu")
    assert len({case.name for case in made}) == len(made) == 2 * 2 * 2
    assert {case.problem for case in made} == {"KL+CE", "JSD"}
    assert {case.labelled for case in made} == {0.5}
    assert [case.problem for case in grid.made("loss", grid.Axes(top_k=[8]), "cpu")] == ["top-k KL"]
    heads = grid.made("linear", axes, "cpu")
    assert {case.problem for case in heads} == {"linear KL+CE", "linear JSD"}
    assert all(("ours fast" in case.contenders) == (case.dtype == BF16) for case in heads)
    assert all(case.device == "cuda" and case.teacher_width for case in grid.made("linear", axes, "cuda"))
    with pytest.raises(ValueError, match="at most 100"):
        grid.made("loss", grid.Axes(vocab=[100], top_k=[101]), "cpu")
    with pytest.raises(ValueError, match="top-k"):
        grid.made("linear", grid.Axes(top_k=[8]), "cpu")


@pytest.mark.usefixtures("small")
def test_what_does_not_fit_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fits, does_not = (Case("JSD", 8, cols, temperature=2.0) for cols in (64, 4096))
    free = (room.needed_bytes(fits) + room.needed_bytes(does_not)) // 2
    monkeypatch.setattr(room, "available_bytes", lambda device: free)
    path = tmp_path / "run.json"
    assert (
        bench.run(arguments("loss", "--vocab", "64,4096", "--rows", "8", "--filter", "JSD", "--json", str(path))) == 0
    )
    assert f"{does_not.name} did not run: it may take 0.5 GiB" in capsys.readouterr().out
    found = results.load(path)
    assert list(found.left_out) == [does_not.name]
    assert {row.case for row in found.rows} == {fits.name}
    assert found.suite == "loss"
    assert found.canary is not None
    with pytest.raises(SystemExit, match="nothing fits"):
        bench.run(arguments("loss", "--vocab", "4096", "--rows", "8"))


def test_memory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo, limit, used = (tmp_path / name for name in ("meminfo", "limit", "used"))
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 4096 kB\n")
    limit.write_text("max\n")
    used.write_text("1048576\n")
    for name, path in (("MEMINFO", meminfo), ("LIMIT", limit), ("USED", used)):
        monkeypatch.setattr(room, name, path)
    assert room.available_bytes("cpu") == 4096 << 10
    limit.write_text("2097152\n")
    assert room.available_bytes("cpu") == 1 << 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("line", [("loss", "--device", "cuda"), ("gpu",), ("gpu", "--device", "cpu")])
def test_a_gpu_that_is_not_there(line: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="expected a GPU"):
        bench.run(arguments(*line))


def test_suites_on_a_gpu_have_its_cases() -> None:
    for name in ("loss", "linear", "hidden", "overhead"):
        assert {case.device for case in cases.on_device(name, "cuda")} == {"cuda"}
        assert {case.device for case in cases.on_device(name, "cpu")} == {"cpu"}
    assert all(case.width for case in cases.on_device("linear", "cuda"))
    assert not any(case.width for case in cases.on_device("loss", "cuda"))


def test_a_newcomers_cases_shrink_to_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "available_bytes", lambda device: 4 * room.GIB)
    full = quick.losses("cpu")
    assert {case.rows for case in full} == {quick.ROWS["cpu"], quick.ROWS["cpu"] // 2}
    free = room.needed_bytes(full[0]) - 1
    monkeypatch.setattr(room, "available_bytes", lambda device: free)
    shrunk = quick.losses("cpu")
    assert shrunk[0].rows == full[0].rows // 2
    assert all(room.needed_bytes(case) <= free for case in shrunk)


@pytest.mark.usefixtures("small")
def test_a_newcomer_is_told_what_they_would_gain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quick, "COLS", 257)
    monkeypatch.setattr(quick, "WIDTH", 24)
    monkeypatch.setattr(quick, "ROWS", {"cpu": 32})
    monkeypatch.setattr(quick, "_no_step", lambda device: "there is no time")
    path = tmp_path / "run.json"
    assert bench.run(arguments("--quick", "--json", str(path))) == 0
    printed = capsys.readouterr().out
    gains = printed[printed.index("What you would gain on this machine:") :]
    for case in quick.losses("cpu"):
        assert f"  {case.name}: " in gains
    assert "with eager PyTorch" in gains
    assert "4x128 ragged, 6 to 3 layers of 384 did not run: there is no time" in printed
    assert bench.run(arguments("show", str(path))) == 0
    assert capsys.readouterr().out == printed
    with pytest.raises(SystemExit, match="nonsense"):
        bench.run(arguments("--filter", "nonsense"))
