"""`distil-fast train`, `eval` and `env` from the command line, on tiny models: what is left, what is learnt, errors."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedTokenizerBase,
)

from distil_fast import cli, training
from distil_fast.training import TrainConfig, Trainer, train
from distil_fast.training.results import RunResults, load
from distil_fast.training.settings import DataConfig

MakeTeacher = Callable[..., BertForMaskedLM]
STEPS = 24


@pytest.fixture(scope="module")
def teacher_folder(
    make_teacher: MakeTeacher, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    make_teacher().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def words_for(teacher: Path, text: Path, output: Path, *more: str) -> list[str]:
    """A command line of a run of seconds."""
    return [
        *("train", "--preset", "short", "--precision", "fp32", "--teacher", str(teacher), "--data.text", str(text)),
        *("--data.sequence_length", "32", "--data.cache", str(output.parent / "cache"), "--data.workers", "1"),
        *("--steps", str(STEPS), "--optimiser.learning_rate", "3e-3", "--log_interval", "6"),
        *("--checkpoint.interval", "8", "--evaluation_interval", "12", "--output", str(output), *more),
    ]


@pytest.fixture(scope="module")
def finished(teacher_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a whole run."""
    output = tmp_path_factory.mktemp("run") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert cli.main(words_for(teacher_folder, text_file, output)) == 0
    torch.set_num_threads(threads)
    return output


@pytest.fixture(scope="module")
def found(finished: Path) -> RunResults:
    return load(finished / "results.json")


def test_everything_promised_is_left_and_nothing_else(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == ["checkpoints", "report.html", "results.json", "student"]
    kept = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert kept == ["step-00000016", "step-00000024"]


def test_the_report_is_one_page_that_needs_nothing_else(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert "<svg" in page
    assert "src=" not in page
    assert "href=" not in page
    assert "alpha_ce" in page


def test_the_student_learned_from_its_teacher(found: RunResults) -> None:
    untrained, distilled = found.models["untrained"], found.models["distilled"]
    assert distilled.quality["kl"] < 0.7 * untrained.quality["kl"]
    assert distilled.quality["agreement"] > untrained.quality["agreement"]
    assert found.models["teacher"].quality["agreement"] == 1.0
    assert distilled.parameters == untrained.parameters < found.models["teacher"].parameters
    assert len(distilled.cosines) == 2


def test_curves_have_every_step_and_evaluations_their_own(found: RunResults) -> None:
    assert found.history["step"] == [float(i) for i in range(1, STEPS + 1)]
    assert {"loss", "ce", "mlm", "cos", "learning_rate", "gradient_norm", "tokens_per_second"} < set(found.history)
    assert found.evaluations["step"] == [12.0, 24.0]
    last = {name: values[-1] for name, values in found.evaluations.items() if name != "step"}
    for name, value in found.models["distilled"].quality.items():  # the held-out part fits the batches watched
        assert last[name] == pytest.approx(value, rel=1e-5)


def test_the_student_is_a_normal_checkpoint(finished: Path) -> None:
    student = AutoModelForMaskedLM.from_pretrained(finished / "student")
    tokenizer = AutoTokenizer.from_pretrained(finished / "student")
    encoded = tokenizer("the old cat [MASK] a dog .", return_tensors="pt")
    assert set(encoded) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        assert student(**encoded).logits.isfinite().all()


def test_a_second_run_goes_on_from_the_end(finished: Path, teacher_folder: Path, text_file: Path) -> None:
    before = (finished / "student" / "model.safetensors").read_bytes()
    assert cli.main(words_for(teacher_folder, text_file, finished)) == 0
    assert (finished / "student" / "model.safetensors").read_bytes() == before


def test_a_run_that_was_cut_is_the_same_run(
    finished: Path, teacher_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """Only the checkpoint of step 16 is there: the rest is trained again, to the same bits."""
    output = tmp_path / "out"
    (output / "checkpoints").mkdir(parents=True)
    (finished / "checkpoints" / "step-00000016").rename(output / "checkpoints" / "step-00000016")
    try:
        assert cli.main(words_for(teacher_folder, text_file, output)) == 0
    finally:
        (output / "checkpoints" / "step-00000016").rename(finished / "checkpoints" / "step-00000016")
    weights = [(folder / "student" / "model.safetensors").read_bytes() for folder in (finished, output)]
    assert weights[0] == weights[1]
    assert load(output / "results.json").history["loss"] == load(finished / "results.json").history["loss"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data.text", "absent.txt"], "absent.txt"),
        (["--student.layers", "[0,9]"], "[0, 9]"),
        (["--loss.temperature", "0"], "temperature"),
        (["--loss.layers", "[[7,1]]"], "loss.layers"),
        (["--teacher", "./absent"], "./absent"),
        (["--data.dataset", "also"], "dataset"),
        (["--student.config", "absent.json"], "absent.json"),
        (["--lerning_rate", "1"], "Did you mean 'optimiser.learning_rate'?"),
        (["--accumulation_steps", "0"], "accumulation_steps"),
        (["--micro_batch_size", "100000"], "too small"),
        (["--trackers", "[nonesuch]"], "nonesuch"),
    ],
)
def test_bad_input_is_one_message_before_anything_runs(
    more: list[str],
    words: str,
    teacher_folder: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(words_for(teacher_folder, text_file, tmp_path / "out", *more)) == 1
    message = capsys.readouterr().err
    assert message.startswith("distil-fast train: ")
    assert words in message
    assert not (tmp_path / "out" / "student").exists()


def test_an_encoder_without_a_head_is_refused(
    encoder_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words_for(encoder_folder, text_file, tmp_path / "out")) == 1
    assert "without a masked-LM head" in capsys.readouterr().err


def test_divergence_stops_and_names_the_step(
    teacher_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_for(teacher_folder, text_file, tmp_path / "out", "--optimiser.learning_rate", "1e30")
    assert cli.main(words) == 1
    assert "step" in capsys.readouterr().err
    assert not (tmp_path / "out" / "student").exists()


def test_the_same_from_python(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        teacher=str(teacher_folder),
        output=tmp_path / "out",
        data=DataConfig(text=str(text_file), sequence_length=32, workers=1, cache=tmp_path / "cache"),
        steps=2,
        micro_batch_size=4,
        accumulation_steps=2,
        precision="fp32",
    )
    found = train(config, Console(quiet=True))
    assert found is not None
    assert len(found.history["loss"]) == 2
    assert Trainer.__name__ == "Trainer"
    with pytest.raises(AttributeError, match="nonesuch"):
        getattr(training, "nonesuch")  # noqa: B009


# ------------------------------------------------------------------------------------------------ eval, env, tasks


def test_eval_agrees_with_the_run(
    finished: Path, teacher_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--student", str(finished / "student"), "--teacher", str(teacher_folder), "--text", str(text_file)]
    assert cli.main([*words, "--sequence_length", "32", "--latency", "false", "--output", str(tmp_path)]) == 0
    judged = json.loads((tmp_path / "evaluation.json").read_text())["models"]
    assert judged["teacher"]["quality"]["agreement"] == 1.0
    assert 0 < judged["student"]["quality"]["kl"] < 5
    assert "Pseudo-perplexity" in capsys.readouterr().out


def test_env_names_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    assert "torch" in shown
    assert "native" in shown


def test_task_distillation_keeps_what_its_teacher_learnt(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher knows nothing; the student must come to agree with the labels that the files have."""
    choose = random.Random(0)
    for name, count in (("train", 160), ("dev", 60)):
        lines = ["sentence\tlabel"]
        for _ in range(count):
            label = choose.randrange(2)
            subject = choose.choice(["cat", "dog", "king", "ship"])
            lines.append(f"the {'old' if label else 'red'} {subject} sees a tree .\t{label}")
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    teacher = BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), max_position_embeddings=40, num_labels=2, **sizes)
    )
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    words = [
        *("train", "--task.name", "sst2", "--task.train", str(tmp_path / "train.tsv"), "--precision", "fp32"),
        *("--task.held_out", str(tmp_path / "dev.tsv"), "--teacher", str(tmp_path / "teacher"), "--steps", "60"),
        *("--micro_batch_size", "16", "--accumulation_steps", "1", "--optimiser.learning_rate", "1e-2"),
        *("--loss.alpha_ce", "0", "--loss.alpha_cos", "0", "--output", str(tmp_path / "out"), "--dropout", "false"),
    ]
    assert cli.main(words) == 0
    assert "GLUE sst2" in capsys.readouterr().out
    found = load(tmp_path / "out" / "results.json")
    assert found.models["distilled"].tasks["sst2"] > 0.95
    assert found.history["label"][-1] < 0.5 * found.history["label"][0]
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "student")
    assert student.config.num_labels == 2


@pytest.mark.slow
def test_two_ranks_from_the_command_line(teacher_folder: Path, text_file: Path, tmp_path: Path) -> None:
    words = words_for(teacher_folder, text_file, tmp_path / "out", "--micro_batch_size", "4", "--steps", "6")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "distil_fast.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Student: 2 layers") == 1
    assert load(tmp_path / "out" / "results.json").history["step"][-1] == 6
