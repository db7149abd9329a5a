"""GLUE: its measures against known values, its files in every layout, and fine-tuning on a task that can be learnt."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerBase

from distil_fast.training import glue, glue_metrics
from distil_fast.training.classification_feed import tokenise
from distil_fast.training.glue import Scores, fine_tune, read_tasks, retention
from distil_fast.training.glue_tasks import HELD_OUT, TASKS, TRAIN, Labelled, find_file, read_file, task_named
from distil_fast.training.settings import GlueConfig, InputError
from tests.training.conftest import ADJECTIVES, NOUNS, VERBS

# ------------------------------------------------------------------------------------------------ measures


def test_measures_of_classes_by_hand() -> None:
    labels = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    predictions = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 0])  # TP 3, FN 1, FP 1, TN 5
    assert glue_metrics.accuracy(predictions, labels) == pytest.approx(0.8)
    assert glue_metrics.f1(predictions, labels) == pytest.approx(0.75)
    assert glue_metrics.matthews(predictions, labels) == pytest.approx((3 * 5 - 1 * 1) / (4 * 4 * 6 * 6) ** 0.5)
    assert glue_metrics.matthews(1 - labels, labels) == pytest.approx(-1.0)
    assert glue_metrics.matthews(np.ones(10), labels) == 0.0
    assert glue_metrics.f1(np.zeros(10), np.zeros(10)) == 0.0


def test_matthews_of_three_classes() -> None:
    """scikit-learn's documented covariance form, entry by entry of the confusion matrix."""
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    predictions = np.array([0, 0, 1, 1, 2, 2, 2, 0, 2])
    confusion = np.zeros((3, 3))
    np.add.at(confusion, (labels, predictions), 1)
    t, p, c, s = confusion.sum(1), confusion.sum(0), np.trace(confusion), confusion.sum()
    expected = (c * s - t @ p) / np.sqrt((s**2 - p @ p) * (s**2 - t @ t))
    assert glue_metrics.matthews(predictions, labels) == pytest.approx(expected)


def test_correlations() -> None:
    """Anscombe's first set, whose correlation is 0.816; ranks with a tie by hand."""
    x = np.array([10, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5])
    y = np.array([8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68])
    assert glue_metrics.pearson(x, y) == pytest.approx(0.81642, abs=1e-5)
    assert glue_metrics.spearman(x, y) == pytest.approx(0.81818, abs=1e-5)
    assert glue_metrics.spearman(np.array([1, 2, 2, 9]), np.array([0.1, 0.3, 0.2, 0.4])) == pytest.approx(
        0.94868, abs=1e-5
    )
    assert glue_metrics.spearman(x, np.exp(x)) == pytest.approx(1.0)
    assert glue_metrics.pearson(x, np.ones(11)) == 0.0


# ------------------------------------------------------------------------------------------------ files

MNLI_COLUMNS = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
    "sentence1 sentence2 label1 gold_label"
)
LAYOUTS = {  # of GLUE's own files: the head, and rows with the text they give
    "cola": ("", ["gj04\t1\t\tThe sailors rode the breeze.", "gj04\t0\t*\tThe more does Bill smoke."], [1, 0]),
    "sst2": ("sentence\tlabel", ['a "gorgeous film\t1', "it 's dull\t0"], [1, 0]),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ['1\t70\t71\tHe said "so.\tSo he said.', "0\t1\t2\tA.\tB."],
        [1, 0],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        ["0\tmain\tf\t2012\t1\tn\tn\tA plane.\tA jet.\t5.000", "1\tmain\tf\t2012\t2\tn\tn\tA man.\tA cat.\t0.25"],
        [5.0, 0.25],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["1\t2\t3\tWhy?\tHow come?\t1", "4\t5\t6\tWho?\tWhat?\t0"],
        [1, 0],
    ),
    "mnli": (
        MNLI_COLUMNS.replace(" ", "\t"),
        [
            "0\t1\t2\tg\t(\t(\t(\t(\tA dog runs.\tIt moves.\tneutral\tentailment",
            "\t".join("abcdefgh") + "\tX.\tY.\tneutral\tcontradiction",
        ],
        [0, 2],
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", ["0\tWho?\tHe.\tentailment", "1\tWhen?\tHe.\tnot_entailment"], [0, 1]),
    "rte": ("index\tsentence1\tsentence2\tlabel", ["0\tA.\tB.\tnot_entailment", "1\tC.\tD.\tentailment"], [1, 0]),
    "wnli": ("index\tsentence1\tsentence2\tlabel", ["0\tA.\tB.\t1", "1\tC.\tD.\t0"], [1, 0]),
}


@pytest.mark.parametrize("name", TASKS)
def test_glues_own_files(name: str, tmp_path: Path) -> None:
    head, rows, labels = LAYOUTS[name]
    task = TASKS[name]
    path = tmp_path / task.folder / "train.tsv"
    path.parent.mkdir()
    path.write_text("\n".join([*([head] if head else []), *rows]) + "\n")
    found = read_file(find_file(tmp_path, task, TRAIN), task)
    assert found.labels == labels
    assert found.malformed == 0
    assert [len(texts) for texts in found.texts] == [len(task.texts)] * 2
    assert all(text in rows[0] for text in found.texts[0])
    assert all(isinstance(label, float if name == "stsb" else int) for label in found.labels)


def test_texts_are_the_right_columns(tmp_path: Path) -> None:
    texts = {}
    for name in ("cola", "mrpc", "mnli"):
        head, rows, _ = LAYOUTS[name]
        path = tmp_path / f"{name}.tsv"
        path.write_text("\r\n".join([*([head] if head else []), *rows]))
        texts[name] = read_file(path, TASKS[name]).texts[0]
    assert texts == {
        "cola": ("The sailors rode the breeze.",),
        "mrpc": ('He said "so.', "So he said."),
        "mnli": ("A dog runs.", "It moves."),
    }


def test_csv_and_json_lines(tmp_path: Path) -> None:
    task = TASKS["rte"]
    rows = [
        {"sentence1": 'a, "b"', "sentence2": "two\nlines", "label": 1},
        {"sentence1": "c", "sentence2": "d", "label": 0},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.csv").write_text('label,sentence2,sentence1\n1,"two\nlines","a, ""b"""\nentailment,d,c\n')
    wanted = Labelled([('a, "b"', "two\nlines"), ("c", "d")], [1, 0], 0)
    assert read_file(tmp_path / "a.jsonl", task) == read_file(tmp_path / "a.csv", task) == wanted


def test_a_few_malformed_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    lines = ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", *(["1\t2\t3\tWhy?\tHow?\t1"] * 200)]
    path.write_text("\n".join([*lines, "broken", "in two\tby a tab"]))
    found = read_file(path, TASKS["qqp"])
    assert (len(found.texts), found.malformed) == (200, 2)
    path.write_text("\n".join([*lines, *(["broken"] * 50)]))
    with pytest.raises(InputError, match="50 of 250 lack one"):
        read_file(path, TASKS["qqp"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sentence\tlabel\nfine\t2\n", "expected a label of sst2 \\(negative, positive, or 0 to 1\\), got '2'"),
        (b"text\tlabel\nfine\t1\n", "expected the columns sentence, label of sst2, found text, label"),
        (b"sentence\tlabel\n", "expected examples of sst2, found none in 0 rows"),
        (b"", "found none"),
        (b"sentence\tlabel\n\xff\t1\n", "expected UTF-8 text, got the byte 0xff"),
    ],
)
def test_files_that_are_not_the_tasks(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_file(path, TASKS["sst2"])


def test_other_errors_of_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASKS["sst2"]
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_file(tmp_path / "a.tsv", task)
    with pytest.raises(InputError, match=r"expected a file .tsv, .csv, .jsonl, got .txt"):
        read_file(tmp_path / "a.txt", task)
    (tmp_path / "a.jsonl").write_text('{"sentence": "x", \n')
    with pytest.raises(InputError, match="cannot be read as JSONL"):
        read_file(tmp_path / "a.jsonl", task)
    with pytest.raises(InputError, match=r"examples of sst2 in .*SST-2/dev.tsv|SST-2/held_out.tsv"):
        find_file(tmp_path, task, HELD_OUT)
    with pytest.raises(InputError, match="expected one of cola, sst2"):
        task_named("squad")
    assert task_named("STS-B").name == "stsb"
    with pytest.raises(InputError, match="expected both, with one task"):
        read_tasks(GlueConfig(tasks=["sst2", "rte"], train=tmp_path, held_out=tmp_path))

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(InputError, match=r"glue:sst2: the dataset cannot be loaded: no network .* glue.folder"):
        read_tasks(GlueConfig(tasks=["sst2"]))


# ------------------------------------------------------------------------------------------------ fine-tuning


def sentiment(count: int, seed: int) -> list[str]:
    """Lines of SST-2's layout: a sentence is positive if it says "red", as its second word or as its seventh."""
    choose = random.Random(seed).choice
    lines = ["sentence\tlabel"]
    for index in range(count):
        words = [
            "the",
            choose(ADJECTIVES[:2]),
            choose(NOUNS),
            choose(VERBS),
            "a",
            choose(NOUNS),
            choose(ADJECTIVES[:2]),
        ]
        if index % 2:
            words[choose((1, 6))] = "red"
        lines.append(f"{' '.join(words)} .\t{index % 2}")
    return lines


@pytest.fixture(scope="module")
def folders(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher, a student that has room for the first words only, and the task's files."""
    root = tmp_path_factory.mktemp("glue")
    for name, positions in (("teacher", 16), ("student", 5)):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=positions,
        )
        BertForMaskedLM(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "SST-2").mkdir()
    (root / "SST-2" / "train.tsv").write_text("\n".join(sentiment(480, 0)))
    (root / "SST-2" / "dev.tsv").write_text("\n".join(sentiment(200, 1)))
    return {"root": root, "teacher": root / "teacher", "student": root / "student"}


def config_of(root: Path, **changes: object) -> GlueConfig:
    settings = {"tasks": ["sst2"], "folder": root, "epochs": 4, "learning_rates": [3e-3], "seeds": [1]} | changes
    return GlueConfig(**settings)  # type: ignore[arg-type]


def test_a_task_is_learnt_and_retention_shows_what_a_student_cannot(folders: dict[str, Path]) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=120)
    found = glue.run(str(folders["student"]), str(folders["teacher"]), config_of(folders["root"]), console)
    scores = found["tasks"]["sst2"]
    assert scores["teacher"] > 0.97
    assert 0.65 < scores["student"] < 0.85  # half of the positive sentences say it beyond its reach
    assert scores["retention"] == pytest.approx(scores["student"] / scores["teacher"])
    assert found["mean"]["retention"] == pytest.approx(scores["retention"])
    assert json.loads(json.dumps(found)) == found
    assert f"{scores['retention']:.1%}" in screen.getvalue()
    assert "480 examples, 200 held out" in screen.getvalue()


@pytest.mark.slow
def test_the_best_learning_rate_is_taken_and_every_run_told(folders: dict[str, Path]) -> None:
    config = config_of(folders["root"], epochs=2, batch_size=16, seeds=[1, 2], learning_rates=[1e-8, 3e-3])
    data = read_tasks(config)[0]
    lines: list[str] = []
    before = torch.get_rng_state()
    scores = fine_tune(str(folders["teacher"]), data, config, lines.append)
    assert torch.equal(before, torch.get_rng_state())
    assert scores.learning_rate == 3e-3
    assert scores.metrics["accuracy"] == scores.scores
    assert len(lines) == 4
    assert lines[0].startswith("sst2, learning rate 1e-08, seed 1: accuracy")


def test_predictions_are_in_the_examples_order(folders: dict[str, Path], sentences: list[str]) -> None:
    task = TASKS["stsb"]
    torch.manual_seed(0)
    model, tokenizer = glue.load_classifier(str(folders["teacher"]), task)
    with torch.no_grad():
        for parameter in model.parameters():  # away from a fresh model, whose outputs are all alike
            parameter += 0.2 * torch.randn_like(parameter)
    texts = [(" ".join(line.split()[: 1 + 5 * i % 11]), "a king") for i, line in enumerate(sentences[:20])]
    found = glue.predict(model.eval(), tokenise(texts, [0.0] * 20, tokenizer, 16), 8)
    for (first, second), prediction in zip(texts, found, strict=True):
        with torch.no_grad():
            alone = model(**tokenizer(first, second, truncation=True, max_length=16, return_tensors="pt")).logits
        assert prediction == pytest.approx(alone.item(), abs=1e-4)
    assert np.ptp(found) > 0.1


def test_a_regression_is_learnt_and_a_seed_decides_it(folders: dict[str, Path], tmp_path: Path) -> None:
    """Pairs whose score is what their first text says."""
    choose = random.Random(0).choice
    rows = []
    for index in range(300):
        word = choose(NOUNS[:4])
        score = index % 2 * 5.0
        rows.append({"sentence1": "red cat" if score else "old dog", "sentence2": word, "label": score})
    for name, part in (("train", rows[:200]), ("held_out", rows[200:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    files = {"train": tmp_path / "train.jsonl", "held_out": tmp_path / "held_out.jsonl", "folder": None}
    config = config_of(folders["root"], tasks=["stsb"], epochs=10, seeds=[1, 2, 1], **files)
    scores = fine_tune(str(folders["teacher"]), read_tasks(config)[0], config)
    assert set(scores.metrics) == {"pearson", "spearman"}
    assert scores.mean > 0.8
    assert scores.scores[0] == scores.scores[2] != scores.scores[1]


def test_retention_by_hand() -> None:
    def of(*scores: float) -> Scores:
        return Scores(1e-5, {"accuracy": list(scores)}, list(scores))

    found = retention({"sst2": (of(0.8, 1.0), of(1.0)), "cola": (of(0.2), of(0.4)), "rte": (of(0.1), of(-0.2))})
    assert found["tasks"]["sst2"]["retention"] == pytest.approx(0.9)
    assert found["tasks"]["cola"]["retention"] == pytest.approx(0.5)
    assert found["tasks"]["rte"]["retention"] is None
    assert found["mean"]["retention"] == pytest.approx(1.2 / 1.2)
    assert of(0.8, 1.0).deviation == pytest.approx(0.2 / 2**0.5)


def test_a_model_that_is_not_there_is_an_error(folders: dict[str, Path]) -> None:
    config = config_of(folders["root"])
    with pytest.raises(InputError, match="could not be loaded for sst2"):
        fine_tune(str(folders["root"] / "nothing"), read_tasks(config)[0], config)
