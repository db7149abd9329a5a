"""The ablation with a tiny teacher: arms, resuming, the plan, the table and its place in the docs."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from benchmarks import ablation, ablation_report
from distil_fast.training.settings import InputError

WORDS = [f"w{i}" for i in range(40)]
BASE = replace(ablation.BASE, micro_batch_size=4, accumulation_steps=1, precision="fp32", log_interval=1)


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and a cache of one's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def request_(tmp_path: Path) -> ablation.Request:
    """Two arms of two seeds, two steps each, on text that is made here."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "teacher")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=45,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "teacher")
    choose = random.Random(0)
    documents = [" ".join(choose.choices(WORDS, k=20)) for _ in range(400)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    return ablation.Request(
        output=tmp_path / "out",
        text=(tmp_path / "text.txt",),
        arms=("full", "no ce"),
        seeds=2,
        steps=2,
        teacher=str(tmp_path / "teacher"),
        base=BASE,
        length=24,
    )


@pytest.fixture
def console() -> Console:
    return Console(quiet=True)


def test_arms_differ_in_their_configuration_alone() -> None:
    full = ablation.ARMS["full"]
    alphas = {name: (a.loss.alpha_ce, a.loss.alpha_mlm, a.loss.alpha_cos) for name, a in ablation.ARMS.items()}
    assert alphas == {
        "full": (5, 2, 1),
        "no ce": (0, 2, 1),
        "no mlm": (5, 0, 1),
        "no cos": (5, 2, 0),
        "random initialisation": (5, 2, 1),
    }
    assert {name for name, arm in ablation.ARMS.items() if arm.student != full.student} == {"random initialisation"}


def test_a_run_goes_on_where_it_was_stopped(
    request_: ablation.Request, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, done = ablation.train_arm, []

    def train(session: ablation.Session, name: str, seed: int, steps: int, note: Any) -> dict[str, Any]:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((name, seed))
        return original(session, name, seed, steps, note)

    monkeypatch.setattr(ablation, "train_arm", train)
    with pytest.raises(KeyboardInterrupt):
        ablation.run(request_, console)
    assert done == [("full", 0), ("full", 1), ("no ce", 0)]
    done.clear()
    results = ablation.run(request_, console)
    assert done == [("no ce", 1)]
    assert [(run["arm"], run["seed"], run["steps"]) for run in results["arms"]] == [
        (name, seed, 2) for name in ("full", "no ce") for seed in (0, 1)
    ]
    scores = {(run["arm"], run["seed"]): run["pseudo_perplexity"] for run in results["arms"]}
    assert len(set(scores.values())) == 4  # neither arm nor seed is without effect
    assert results["teacher"]["agreement"] == 1.0
    assert json.loads((request_.output / "results.json").read_text())["arms"] == results["arms"]
    assert not (request_.output / "work").exists()
    with pytest.raises(InputError, match="another minutes"):
        ablation.run(replace(request_, minutes=1.0), console)


def test_an_arm_repeats_bit_for_bit_and_starts_as_its_configuration_says(
    request_: ablation.Request, console: Console
) -> None:
    session = ablation.prepare(request_, console)
    first, again = (ablation.train_arm(session, "random initialisation", 1, 1) for _ in range(2))
    first.pop("seconds"), again.pop("seconds")
    assert first == again
    config = session.config(ablation.ARMS["random initialisation"], 1, 1, request_.output)
    students = [
        ablation._trainer(session, replace(config, seed=seed)).objective.student.state_dict() for seed in (1, 1, 2)
    ]
    name = "distilbert.transformer.layer.0.ffn.lin1.weight"
    assert torch.equal(students[0][name], students[1][name])
    assert not torch.equal(students[0][name], students[2][name])


def test_steps_follow_from_the_minutes(request_: ablation.Request, console: Console) -> None:
    session = ablation.prepare(request_, console)
    few, many = (ablation._steps_in(session, minutes) for minutes in (0.05, 5.0))
    assert 1 <= few < many
    assert not (request_.output / "probe").exists()


def scores(accuracy: float, perplexity: float, agreement: float) -> dict[str, float]:
    return {"accuracy": accuracy, "pseudo_perplexity": perplexity, "agreement": agreement}


@pytest.fixture
def results() -> dict[str, Any]:
    def run(arm: str, seed: int, *values: float) -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "seconds": 480.0, **scores(*values)}

    return {
        "plan": {"steps": 500, "length": 128, "base": {"micro_batch_size": 8, "accumulation_steps": 2}},
        "machine": {"cpu": "A processor", "threads": 2, "torch": "2", "commit": "0123"},
        "text": {"training_tokens": 1000000, "held_out_tokens": 50000},
        "teacher": scores(0.5, 10.0, 1.0),
        "untrained": scores(0.01, 9000.0, 0.02),
        "arms": [
            run("full", 0, 0.30, 100.0, 0.40),
            run("full", 1, 0.32, 90.0, 0.42),
            run("no ce", 0, 0.28, 150.0, 0.35),
            run("no ce", 1, 0.31, 120.0, 0.36),
        ],
    }


def test_the_table_compares_runs_of_one_seed(results: dict[str, Any]) -> None:
    lines = ablation_report.table(results).splitlines()
    assert lines[2] == "| full | 31.0% | 95.0 | 41.0% |"
    assert lines[3].startswith("| no ce | 29.5% (-1.5%, -2.0% to -1.0%) | 135.0 (+40.0, +30.0 to +50.0) |")
    assert lines[5] == "| teacher | 50.0% | 10.0 | 100.0% |"
    assert "500 steps of 16 sequences" in lines[7]
    assert "Means over 2 seeds" in lines[7]


def test_it_goes_into_the_docs_between_its_marks(results: dict[str, Any], tmp_path: Path) -> None:
    docs = tmp_path / "docs" / "results.md"
    docs.parent.mkdir()
    (tmp_path / "out").mkdir()
    docs.write_text("before\n<!-- ablation:begin -->\nold\n<!-- ablation:end -->\nafter\n")
    for _ in range(2):  # a second time it replaces the first
        ablation_report.write(results, tmp_path / "out", docs)
    page = docs.read_text()
    assert page.startswith("before\n<!-- ablation:begin -->\n| | MLM top-1 ")
    assert page.endswith("<!-- ablation:end -->\nafter\n")
    assert page.count("../out/ablation.png") == 1
    assert "old" not in page
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 10000
    docs.write_text("nothing\n")
    with pytest.raises(InputError, match="ablation:begin"):
        ablation_report.write(results, tmp_path / "out", docs)


def test_the_docs_have_the_marks(results: dict[str, Any], tmp_path: Path) -> None:
    docs = tmp_path / "results.md"
    docs.write_text((Path(__file__).parents[2] / "docs" / "results.md").read_text())
    ablation_report.write(results, tmp_path, docs)
    one = {**results, "arms": results["arms"][:1]}
    ablation_report.write(one, tmp_path, docs)
    assert docs.read_text().count("| full |") == 2
