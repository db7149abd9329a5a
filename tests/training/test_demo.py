"""The demo from one end to the other on a tiny teacher without a head: its files, its cache, and its command line."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForMaskedLM

from distil_fast import cli
from distil_fast.training import teacher as teacher_module
from distil_fast.training.demo import DemoConfig, demo
from distil_fast.training.mlm_head import HeadConfig
from distil_fast.training.results import RunResults, load
from distil_fast.training.settings import InputError


class Run:
    """One run of the demo: what it returned, what it printed, where it wrote."""

    def __init__(self, config: DemoConfig) -> None:
        self.screen = io.StringIO()
        self.output = config.output
        self.results: RunResults = demo(config, Console(file=self.screen, width=140))

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
        precision="fp32",
        steps=60,
        head=HeadConfig(steps=200, learning_rate=3e-3),
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
    names = sorted(path.name for path in first.output.iterdir())
    assert names == ["checkpoints", "report.html", "results.json", "student", "teacher"]
    assert load(first.output / "results.json") == load(first.output / "results.json")
    assert load(first.output / "results.json").speeds == first.results.speeds
    for speeds in first.results.speeds.values():
        assert min(speeds.values()) > 0


def test_the_student_learned_from_its_teacher(first: Run) -> None:
    teacher, untrained, distilled = (first.results.models[name] for name in ("teacher", "untrained", "distilled"))
    assert teacher.quality["accuracy"] > 0.25  # the likeliest word alone gives about 0.15
    assert distilled.quality["kl"] < 0.9 * untrained.quality["kl"]
    assert teacher.quality["agreement"] == 1.0


def test_the_screen_tells_what_happens(first: Run) -> None:
    for words in (
        "an encoder without a masked-LM head",
        "Fitting the head",
        "2 layers, copied from the teacher's [0, 3]",
        "Distilling",
        "Top-1 agreement with the teacher",
        "loss and its gradient",
        "plain PyTorch",
    ):
        assert words in first.printed, words
    assert "Warning" not in first.printed


def test_a_second_run_uses_the_cached_head_and_gives_the_same_student(first: Run, config: DemoConfig) -> None:
    second = Run(dataclasses.replace(config, output=config.output.with_name("second")))
    assert "was fitted before" in second.printed
    assert "Fitting the head" not in second.printed
    weights = [AutoModelForMaskedLM.from_pretrained(run.output / "student").state_dict() for run in (first, second)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_the_packaged_encoder_is_asked_for_by_name(config: DemoConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "PACKAGE", "no_such_package")
    with pytest.raises(InputError, match="pip install --no-deps no-such-package"):
        demo(dataclasses.replace(config, teacher=None), Console(file=io.StringIO()))


# ---------------------------------------------------------------------------------------------- command line


def test_command_line_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[DemoConfig] = []
    monkeypatch.setattr("distil_fast.training.demo.demo", lambda config, console: seen.append(config))
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

    monkeypatch.setattr("distil_fast.training.demo.demo", fail)
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
