"""Configurations from words, files and presets; what is unknown or of the wrong type is an error with a remedy."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from distil_fast.training.command_line import as_yaml, parse, preset_names
from distil_fast.training.settings import InputError, LossConfig, MaskingConfig, StudentConfig, TrainConfig


def read(*argv: str) -> TrainConfig:
    return parse(TrainConfig, argv, "distil-fast train", "", presets=True)


def test_nothing_said_is_the_defaults() -> None:
    assert read() == TrainConfig()


def test_options_reach_nested_fields_with_their_types() -> None:
    config = read(
        *("--teacher", "bert", "--student.layers", "[0,2]", "--data.text", "[a.txt,b]", "--output", "runs/x"),
        *("--loss.layers", "[[1,2],[-1,6]]", "--optimiser.betas", "[0.8,0.9]", "--trackers", "[tensorboard]"),
    )
    assert (config.teacher, config.student.layers, config.data.text) == ("bert", [0, 2], ["a.txt", "b"])
    assert (config.output, config.loss.layers) == (Path("runs/x"), [(1, 2), (-1, 6)])
    assert (config.optimiser.betas, config.trackers) == ((0.8, 0.9), ["tensorboard"])


def test_one_text_is_not_taken_for_a_list_of_names(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one.txt\ntwo.txt\n")
    assert read("--data.text", str(text)).data.text == str(text)


def test_later_ones_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\nmasking:\n  rate: 0.2\n")
    config = read("--preset", "short", "--config", str(file), "--seed", "4")
    assert (config.seed, config.masking, config.dropout) == (4, MaskingConfig(rate=0.2, smoothing=0.0), False)
    assert read("--config", str(file), "--preset=short").masking.rate == 0.3


def test_the_preset_of_the_original_is_the_defaults_and_fp32() -> None:
    assert read("--preset", "distilbert") == TrainConfig(precision="fp32")


@pytest.mark.parametrize("name", preset_names())
def test_a_configuration_written_is_read_again(name: str, tmp_path: Path) -> None:
    config = read("--preset", name, "--student.layers", "3", "--loss.layers", "[[1,2]]", "--data.held_out", "[x]")
    file = tmp_path / "run.yaml"
    file.write_text(as_yaml(config))
    assert read("--config", str(file)) == config
    assert config.student == StudentConfig(layers=3)
    assert config.loss == LossConfig(layers=[(1, 2)])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--optimiser.lerning_rate", "1"], "Did you mean 'optimiser.learning_rate'?"),
        (["--temprature", "1"], "Did you mean 'loss.temperature'?"),
        (["--preset", "distilbart"], "Did you mean 'distilbert'?"),
        (["--preset"], "expected one of"),
        (["--steps", "many"], "steps"),
        (["--precision", "fp8"], "'bf16'"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["stray"], "stray"),
    ],
)
def test_errors_name_the_option_and_the_nearest(argv: list[str], words: str) -> None:
    with pytest.raises(InputError) as raised:
        read(*argv)
    assert words in str(raised.value)


def test_an_unknown_key_of_a_file_is_an_error_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optimiser:\n  learning_rat: 1\n")
    with pytest.raises(InputError, match=r"Did you mean 'optimiser\.learning_rate'\?"):
        read("--config", str(file))


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out

    def check(kind: Any, prefix: str) -> None:
        for field in fields(kind):
            factory: Any = field.default_factory
            if is_dataclass(factory):
                check(factory, f"{prefix}{field.name}.")
            else:
                about = text.partition(f"\n  --{prefix}{field.name} ")[2].partition("(type: ")[0].split()
                assert len(about) > 3, f"{prefix}{field.name} has no help"

    check(TrainConfig, "")
