"""What is made of measurements: ratios, floors, targets, JSON there and back, tables and the picture."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console

from distil_fast.bench import cases, plot, plot_vocabulary, report, targets, train_cases
from distil_fast.bench import results as results_module
from distil_fast.bench.correctness import Errors
from distil_fast.bench.measure import Timing
from distil_fast.bench.results import Memory, Results, Row

CASE = "KL+CE fp32 512x30522 in place T=2"
OTHER = "KL+CE bf16 512x30522 in place T=2"
FLOOR_BYTES = 3 * 512 * 30522 * 4


def timed(case: str, contender: str, ms: float, floor_bytes: int = FLOOR_BYTES) -> Row:
    return Row(case, contender, floor_bytes, 50.0, Errors(1e-7, 2e-7, 3e-7), None, Timing(ms, ms, ms, 9), 1 << 20)


@pytest.fixture
def results() -> Results:
    """The yardstick is 50 GB/s, so that the fp32 floor is 3.75 ms."""
    wrong = Row(OTHER, "eager", FLOOR_BYTES // 2, 50.0, Errors(1e-3, 0.5, None), "wrong: relative error 5e-01")
    return Results(
        rows=[
            timed(CASE, "eager", 300.0),
            timed(CASE, "compiled", 60.0),
            timed(CASE, "ours", 5.0),
            wrong,
            timed(OTHER, "eager float32", 200.0, FLOOR_BYTES // 2),
            timed(OTHER, "ours", 4.0, FLOOR_BYTES // 2),
        ],
        copy_method="torch copy_",
        memory=[Memory("small", 1 << 20), Memory("large", 3 << 20)],
        command="distil-fast bench loss",
        date="2026-11-23T10:00:00+00:00",
        seconds=61.0,
        machine={
            "cpu": "A processor",
            "threads": 2,
            "instruction_set": "avx512",
            "memory_gib": 16.0,
            "python": "3.11.7",
            "torch": "2.13.0",
            "commit": "0123456789ab",
        },
    )


def rendered(results: Results, *, markdown: bool = False) -> str:
    console = Console(file=io.StringIO(), width=200)
    report.show(results, console, markdown=markdown)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def row(results: Results, case: str, contender: str) -> Row:
    found = results.row(case, contender)
    assert found is not None
    return found


def test_floors_and_ratios(results: Results) -> None:
    ours = row(results, CASE, "ours")
    assert ours.floor_ms == pytest.approx(FLOOR_BYTES / 50e9 * 1e3)
    assert results.times_faster(ours, "eager") == 60
    assert results.times_faster(ours, "compiled") == 12
    assert results.times_faster(row(results, OTHER, "ours"), "eager") == 50  # of the first that was not refused
    assert results.times_faster(row(results, OTHER, "ours"), "compiled") is None
    assert results.times_faster(row(results, OTHER, "eager"), "eager") is None


def test_json_there_and_back(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    results_module.save(results, path)
    assert results_module.load(path) == results
    data = json.loads(path.read_text())
    assert data["schema"] == results_module.SCHEMA
    assert data["rows"][0]["errors"] == {"loss": 1e-7, "array": 2e-7, "near": 3e-7, "near_loss": None}
    assert data["rows"][0]["timing"] == {"p20": 300.0, "p50": 300.0, "p80": 300.0, "samples": 9}
    assert data["rows"][3]["refused"].startswith("wrong")
    path.write_text(json.dumps({**data, "schema": 0}))
    with pytest.raises(ValueError, match="schema"):
        results_module.load(path)


def test_processes_become_one_by_medians(results: Results) -> None:
    def run(ms: float, error: float, refused: str | None = None) -> Results:
        measured = replace(timed(CASE, "ours", ms), errors=Errors(None, error, 2 * error), refused=refused)
        return replace(results, rows=[replace(measured, copy_gb_per_s=ms)])

    merged = results_module.merged([run(5.0, 1e-7), run(9.0, 3e-7), run(6.0, 2e-7)])
    assert merged.processes == 3
    only = merged.rows[0]
    assert only.timing is not None
    assert (only.timing.p50, only.timing.samples, only.copy_gb_per_s) == (6.0, 27, 6.0)
    assert only.errors == Errors(None, 3e-7, 6e-7)
    refused = results_module.merged([run(5.0, 1e-7), run(5.0, 1.0, "wrong: once")]).rows[0]
    assert refused.timing is None
    assert refused.refused == "wrong: once"


def test_the_table_shows_the_numbers_and_the_refusals(results: Results) -> None:
    text = rendered(results)
    line = next(line for line in text.splitlines() if line.strip().startswith("ours"))
    assert line.split() == ["ours", "5", "37.5", "75", "60", "12", "1.0", "1.0e-07", "2.0e-07", "-", "3.0e-07"]
    assert "floor 3.75 ms" in text
    assert "not timed" in text
    assert f"{OTHER}: eager was not timed: wrong: relative error 5e-01" in text
    assert "large" in text
    assert "1.50" in text  # 3 MiB of two threads
    assert "NOT STEADY" not in text
    unsteady = replace(results, rows=[*results.rows, replace(results.rows[0], case="other", copy_gb_per_s=30.0)])
    assert "NOT STEADY" in rendered(unsteady)


def test_markdown(results: Results) -> None:
    lines = [line for line in rendered(results, markdown=True).splitlines() if line.startswith("|")]
    assert any(set(line) <= set("|-: ") for line in lines)
    assert any(line.replace(" ", "").startswith("|ours|5|37.5|75|60|12|") for line in lines)


def test_targets_are_judged(results: Results) -> None:
    def judged(found: Results) -> dict[str, targets.Outcome]:
        return {outcome.target.text: outcome for outcome in targets.judge(found)}

    outcomes = judged(results)
    assert outcomes[f"{CASE}: floors"].measured == pytest.approx(4 / 3, rel=1e-3)
    assert outcomes[f"{CASE}: floors"].met is True
    assert outcomes[f"{CASE}: floors (the stretch)"].met is False
    assert outcomes[f"{CASE}: x eager"].met is True
    assert outcomes[f"{OTHER}: x the fp32 time"].measured == pytest.approx(0.8)
    assert outcomes[f"{OTHER}: x the fp32 time"].met is False
    assert outcomes["memory beyond the gradient: MiB a thread"].measured == 1.5
    unmeasured = outcomes["cosine fp32 4096x768: floors"]
    assert unmeasured.measured is None
    assert unmeasured.met is None
    slower = replace(results, rows=[*results.rows[:2], timed(CASE, "ours", 10.0)])
    assert judged(slower)[f"{CASE}: x eager"].met is False


def test_every_target_belongs_to_a_case_of_the_table() -> None:
    every = (*cases.LOSS, *cases.OVERHEAD, *cases.GPU, *train_cases.TRAIN, *train_cases.TRAIN_GPU)
    rows = [timed(case.name, contender, 1.0) for case in every for contender in case.contenders]
    both = train_cases.BERT_BASE, train_cases.DISTILBERT
    rows += [timed(case.name, encoder, 1.0) for case in train_cases.ENCODERS for encoder in both]
    rows = [replace(row, facts={train_cases.SYNCS: 0.0, train_cases.PARAMETERS: 1e8}) for row in rows]
    complete = Results(rows, "torch copy_", [Memory("any", 1)], machine={"threads": 1})
    assert [outcome.target.text for outcome in targets.judge(complete) if outcome.measured is None] == []


def test_the_picture(results: Results, tmp_path: Path) -> None:
    plot.save(results, tmp_path / "run.png")
    image = matplotlib.image.imread(tmp_path / "run.png")
    assert image.shape[1] > 1000
    colours = {tuple((255 * pixel[:3]).round().astype(int)) for pixel in image.reshape(-1, 4)[::7]}
    for colour in (*plot.COLOURS.values(), plot.FLOOR):  # every bar and the floor are in it
        assert tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) in colours


def test_the_picture_over_vocabularies_has_a_line_for_everyone(tmp_path: Path) -> None:
    rows = [
        Row(
            case.name,
            name,
            0,
            40.0,
            timing=Timing(t, t, t, 9),
            peak_extra_bytes=None if name == "products" else t << 20,
        )
        for case in plot_vocabulary.cases()
        for number, name in enumerate(plot_vocabulary.LINES)
        if (t := case.cols * (number + 1) // 100)
    ]
    results = Results(rows, "copy", machine={"cpu": "a", "threads": 2, "torch": "2"}, date="2026-11-23")
    plot_vocabulary.save(results, tmp_path / "v.png")
    image = matplotlib.image.imread(tmp_path / "v.png")
    for colour in plot_vocabulary.LINES.values():
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(image[..., :3] - wanted).max(-1) < 0.02).any(), colour
    with pytest.raises(ValueError, match="at least two vocabularies"):
        plot_vocabulary.save(Results(rows[: len(plot_vocabulary.LINES)], "copy"), tmp_path / "v.png")
