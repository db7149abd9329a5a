"""Checkpoints on disk: whole or not at all, checked when read, the newest kept, other runs' refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distil_fast.training import checkpoint
from distil_fast.training.checkpoint import Checkpoints, Contents, DamagedError, read
from distil_fast.training.settings import DataConfig, InputError
from distil_fast.training.snapshot import choices
from distil_fast.training.trainer import Trainer
from tests.training.toy import ToyFeed, ToyMasking, ToyObjective, toy_config


def trainer(folder: Path, objective: Any = None, **changes: Any) -> Trainer:
    changes = {"checkpoint": {"interval": 4}} | changes
    return Trainer(objective or ToyObjective(), ToyFeed(), ToyMasking(), toy_config(folder, **changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of 12 steps, with the checkpoints of steps 8 and 12."""
    folder = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests, whose bits are compared
    trainer(folder).fit()
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def newest(folder: Path) -> Path:
    return folder / "checkpoints" / "step-00000012"


def test_the_newest_are_kept_and_nothing_else(finished: Path) -> None:
    assert sorted(os.listdir(finished / "checkpoints")) == ["step-00000008", "step-00000012"]
    assert {path.suffix for path in newest(finished).iterdir()} == {".safetensors", ".json"}


def test_a_checkpoint_holds_every_weight_once(finished: Path) -> None:
    model = load_file(newest(finished) / "model.safetensors")
    names = {f"student.{name}" for name in ("embedding.weight", "norm.weight", "norm.bias", "decoder.bias")}
    assert model.keys() == names  # the decoder's weight is the embedding's, and the teacher is not there
    moments = load_file(newest(finished) / "optimiser.safetensors")
    assert moments.keys() == {f"{name}.{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert moments["student.norm.bias.step"] == 12
    assert load_file(newest(finished) / "history.safetensors")["rows"].shape[0] == 12
    assert load_file(newest(finished) / "rng.safetensors").keys() == {"0.torch.cpu", "0.prepare.generator"}


def truncate(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def flip(path: Path) -> None:
    moments = path / "optimiser.safetensors"
    data = bytearray(moments.read_bytes())
    data[-3] ^= 1
    moments.write_bytes(data)


def edit(path: Path) -> None:
    state = path / "state.json"
    state.write_text(state.read_text().replace('"step": 12', '"step": 11'))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "model.safetensors has another size"),
    "one bit": (flip, "optimiser.safetensors has another checksum"),
    "a file gone": (lambda path: (path / "rng.safetensors").unlink(), "rng.safetensors"),
    "state edited": (edit, "state.json has another checksum"),
    "state truncated": (lambda path: os.truncate(path / "state.json", 100), "state.json"),
    "state gone": (lambda path: (path / "state.json").unlink(), "state.json"),
    "another program's": (lambda path: (path / "state.json").write_text('{"epoch": 3}'), "no checkpoint"),
    "a list": (lambda path: (path / "state.json").write_text("[]"), "no checkpoint"),
    "another format": (
        lambda path: (path / "state.json").write_text(
            json.dumps(json.loads((path / "state.json").read_text()) | {"format": "distil_fast checkpoint 9"})
        ),
        "format 'distil_fast checkpoint 9'",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_told_and_the_one_before_used(finished: Path, run: Path, kind: str) -> None:
    damage, words = DAMAGE[kind]
    damage(newest(run))
    with pytest.warns(UserWarning, match=words) as told:
        history = trainer(run).fit()
    assert "step-00000012" in str(told[0].message)
    assert "The one before is used" in str(told[0].message)
    expected = read(newest(finished)).tensors
    assert torch.equal(history.rows[:, :3], expected["history"]["rows"][:, :3])
    for name, tensor in read(newest(run)).tensors["model"].items():  # written anew
        assert torch.equal(tensor, expected["model"][name])


@pytest.mark.filterwarnings("ignore:.*The one before is used")
def test_where_none_is_whole_nothing_starts(run: Path) -> None:
    for path in (run / "checkpoints").iterdir():
        truncate(path)
    with pytest.raises(InputError, match="none of the checkpoints") as error:
        trainer(run).fit()
    assert "step-00000008" in str(error.value)
    assert "step-00000012" in str(error.value)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "rate": ({"optimiser": {"max_grad_norm": 3.0}}, "optimiser.max_grad_norm was 5.0 and is 3.0 now"),
    "steps": ({"steps": 14}, "steps was 12 and is 14 now"),
    "batch": ({"accumulation_steps": 3, "seed": 9}, "accumulation_steps was 2 and is 3 now; seed was 3 and is 9 now"),
    "data": ({"data": DataConfig(sequence_length=8)}, "data.sequence_length was 512 and is 8 now"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_another_configuration_is_named(run: Path, kind: str) -> None:
    changes, words = CHANGES[kind]
    with pytest.raises(InputError) as error:
        trainer(run, **changes).fit()
    assert words in str(error.value)


def test_what_changes_nothing_may_change(run: Path) -> None:
    free = {"log_interval": 3, "trackers": [], "non_finite": "skip", "evaluation_interval": 7}
    moved = run.rename(run.with_name("moved"))
    assert len(trainer(moved, checkpoint={"interval": 5, "keep": 3}, **free).fit().rows) == 12
    given = choices(toy_config(Path("a"), data=DataConfig(workers=3, cache=Path("b"))))
    assert given == choices(toy_config(Path("c")))


def test_another_model_is_named(run: Path) -> None:
    objective = ToyObjective()
    objective.projection = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"2 of 6 tensors differ; the first is projection\.bias"):
        trainer(run, objective).fit()


def test_never_refuses_what_is_there(run: Path) -> None:
    with pytest.raises(InputError, match=r"'never', and .*step-00000012 is there"):
        trainer(run, checkpoint={"resume": "never"}).fit()


# ------------------------------------------------------------------------------------------------ no room


def test_no_room_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10_000))
    run = trainer(tmp_path)
    with pytest.raises(InputError, match=r"checkpoints need 0 MB in .*checkpoints, and 0 MB are free"):
        run.fit()
    assert run.feed.state_dict()["position"] == 0


def test_an_unwritable_folder_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    run = trainer(tmp_path / "file")
    with pytest.raises(InputError, match="output: expected a folder to write checkpoints to"):
        run.fit()
    assert run.feed.state_dict()["position"] == 0

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint.tempfile, "NamedTemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(InputError, match="Permission denied"):
        trainer(tmp_path / "read only").fit()


@pytest.mark.parametrize("file", ["model", "history", "state.json"])
def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    save, write, written = checkpoint.save_file, Path.write_text, 0

    def full(path: Path) -> bool:
        nonlocal written
        written += path.name.startswith(file)
        return written == 3 and path.name.startswith(file)

    def save_file(tensors: Any, path: Path) -> None:
        save(tensors, path)
        if full(path):
            os.truncate(path, 20)
            raise OSError(28, "No space left on device")

    def write_text(self: Path, text: str, *args: Any) -> int:
        if full(self):
            raise OSError(28, "No space left on device")
        return write(self, text, *args)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(OSError, match=r"step 12 could not be written .*No space left.*step-00000008"):
        trainer(tmp_path).fit()
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000004", "step-00000008"]
    assert len(trainer(tmp_path).fit().rows) == 12


def test_a_folder_by_itself(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "new", keep=1)
    assert store.newest() is None
    (tmp_path / "new" / ".step-00000003.abc").mkdir(parents=True)  # a process was killed there
    (tmp_path / "new" / "notes").mkdir()
    store.prepare(100)
    assert os.listdir(tmp_path / "new") == ["notes"]
    contents = Contents({"a": {"x": torch.arange(3.0)}}, {"step": 123456789, "text": "ü", "value": 0.1})
    store.write(7, contents)
    path = store.write(123456789, contents)
    assert store.paths() == [path]
    assert store.newest() == path
    back = read(path)
    assert back.state == contents.state
    assert torch.equal(back.tensors["a"]["x"], torch.arange(3.0))
    with pytest.raises(DamagedError):
        read(tmp_path / "new" / "notes")


def test_free_fields_exist() -> None:
    """A field that was renamed would matter again without a word."""
    from distil_fast.training.settings import TrainConfig
    from distil_fast.training.snapshot import FREE

    config = dataclasses.asdict(TrainConfig())
    for name in FREE:
        value: Any = config
        for part in name.split("."):
            value = value[part]
