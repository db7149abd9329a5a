"""`distil-fast eval` from a configuration to its file: both halves, what they share, and what they refuse."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from transformers import BertForMaskedLM, PreTrainedTokenizerBase

from distil_fast.training.evaluate import compare
from distil_fast.training.judge import judge_run, load_masked_lm, masked_batches
from distil_fast.training.settings import EvalConfig, GlueConfig, InputError
from distil_fast.training.student import student_from_teacher

MakeTeacher = Callable[..., BertForMaskedLM]


@pytest.fixture(scope="module")
def root(
    tokenizer: PreTrainedTokenizerBase, make_teacher: MakeTeacher, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    teacher = make_teacher()
    for name, model in (("teacher", teacher), ("student", student_from_teacher(teacher, [0, 3]))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = "".join(f"the {('cat', 'dog')[i % 2]} sees a ship .\t{i % 2}\n" for i in range(32))
    (folder / "train.tsv").write_text("sentence\tlabel\n" + rows)
    return folder


def config_of(root: Path, **changes: object) -> EvalConfig:
    settings = {
        "student": str(root / "student"),
        "teacher": str(root / "teacher"),
        "layers": [0, 3],
        "sequence_length": 24,
        "output": root / "out",
        "latency": False,
    }
    return EvalConfig(**(settings | changes))  # type: ignore[arg-type]


def test_everything_is_measured_printed_and_written(root: Path, text_file: Path) -> None:
    tasks = GlueConfig(
        tasks=["sst2"],
        train=root / "train.tsv",
        held_out=root / "train.tsv",
        epochs=1,
        seeds=[1],
        learning_rates=[1e-3],
    )
    screen = io.StringIO()
    config = config_of(root, text=[text_file], glue=tasks, latency=True)
    found = judge_run(config, Console(file=screen, width=120))
    assert json.loads((root / "out" / "evaluation.json").read_text()) == found
    assert set(found) == {"models", "glue", "configuration", "environment"}
    teacher, student = found["models"]["teacher"], found["models"]["student"]
    assert teacher["quality"]["agreement"] == 1.0 > student["quality"]["agreement"]
    assert teacher["quality"]["kl"] == 0.0 < student["quality"]["kl"]
    assert len(student["cosines"]) == 2
    assert set(student["latency"]) == {"1", "32"}
    assert found["glue"]["tasks"]["sst2"]["retention"] is not None
    assert found["configuration"]["glue"]["tasks"] == ["sst2"]
    for words in ("Pseudo-perplexity", "Latency, batch 32", "retention", "evaluation.json"):
        assert words in screen.getvalue()


def test_masks_depend_on_the_seed_alone(root: Path, text_file: Path) -> None:
    teacher, tokenizer = load_masked_lm(str(root / "teacher"), "teacher")

    def accuracy(**changes: object) -> tuple[float, float]:
        found = compare(teacher, {}, masked_batches(config_of(root, text=[text_file], **changes), tokenizer, teacher))
        return found["teacher"].pseudo_perplexity, found["teacher"].predictions / found["teacher"].tokens

    first, share = accuracy()
    assert accuracy() == (first, share)
    assert accuracy(seed=1)[0] != first
    assert 0.15 <= share < 0.16
    assert 0.3 <= accuracy(rate=0.3)[1] < 0.31


def test_size_and_speed_need_no_text(root: Path) -> None:
    found = judge_run(config_of(root, latency=True), Console(file=io.StringIO()))
    assert found["models"]["student"]["quality"] == {}
    assert found["models"]["student"]["parameters"] < found["models"]["teacher"]["parameters"]
    assert found["glue"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": ""}, "student: expected a folder"),
        ({}, "expected something to measure"),
        ({"latency": True, "teacher": "/nowhere/bert"}, "teacher: /nowhere/bert could not be loaded"),
        ({"text": [Path("/nowhere/a.txt")]}, r"/nowhere/a.txt"),
        ({"layers": [0, 4], "text": [Path(__file__)]}, "layer from 0 to 3 for each of the student's 2"),
        ({"glue": GlueConfig(tasks=["sst3"])}, "expected one of cola"),
        ({"glue": GlueConfig(tasks=["sst2"], folder=Path("/nowhere"))}, "examples of sst2 in /nowhere"),
        ({"glue": GlueConfig(tasks=["sst2"], seeds=[])}, "glue.seeds: expected at least one"),
    ],
)
def test_bad_input_is_refused(root: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        judge_run(config_of(root, **changes), Console(file=io.StringIO()))


def test_an_encoder_without_a_head_is_refused(root: Path, encoder_folder: Path) -> None:
    with pytest.raises(InputError, match=r"teacher: expected a masked language model with its head, and .* lacks cls"):
        judge_run(config_of(root, teacher=str(encoder_folder), latency=True), Console(file=io.StringIO()))


def test_vocabularies_that_differ_are_refused(
    root: Path, text_file: Path, make_teacher: MakeTeacher, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    make_teacher(vocabulary=40).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="teacher's vocabulary of 29 tokens, got 40"):
        judge_run(config_of(root, student=str(tmp_path), text=[text_file], layers=None), Console(file=io.StringIO()))
