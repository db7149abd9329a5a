"""A run that is killed, at any moment, goes on as if it had not been: bit for bit.

The children (killed.py) take a few milliseconds a step, and write checkpoints most of the time.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distil_fast.training import checkpoint, randomness
from distil_fast.training.checkpoint import read
from distil_fast.training.metrics import History
from distil_fast.training.trainer import Trainer
from tests.training.killed import STEPS, in_a_child
from tests.training.toy import ToyFeed, ToyMasking, ToyObjective, toy_config


def newest(folder: Path) -> checkpoint.Contents:
    return read(folder / "checkpoints" / f"step-{STEPS:08d}")


def assert_same_run(folder: Path, unbroken: Path) -> None:
    broken, whole = newest(folder), newest(unbroken)
    columns = slice(0, 5)  # losses, the gradient's norm, tokens; not the time
    assert torch.equal(broken.tensors["history"]["rows"][:, columns], whole.tensors["history"]["rows"][:, columns])
    for file in ("model", "optimiser", "rng"):
        assert broken.tensors[file].keys() == whole.tensors[file].keys()
        for name, tensor in whole.tensors[file].items():
            assert torch.equal(broken.tensors[file][name], tensor), name
    for key in ("step", "feed", "numbers", "loss_scale"):
        assert broken.state[key] == whole.state[key]


def finish(folder: Path) -> None:
    child = in_a_child(folder)
    child.join(30)
    assert child.exitcode == 0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A whole run in a child, and its seconds."""
    folder = tmp_path_factory.mktemp("unbroken")
    finish(tmp_path_factory.mktemp("first"))  # the server starts
    start = time.monotonic()
    finish(folder)
    return folder, time.monotonic() - start


def kill_and_resume(folder: Path, unbroken: tuple[Path, float], kills: int, seed: int) -> None:
    """Kill it `kills` times after a random share of a whole run's time, each time going on; then let it finish."""
    choose = random.Random(seed)
    killed = 0
    while killed < kills:
        child = in_a_child(folder)
        child.join(choose.uniform(0.1, 1.0) * unbroken[1])
        if not child.is_alive():  # it was done; from the start, then
            assert child.exitcode == 0
            assert_same_run(folder, unbroken[0])
            folder = folder.with_name(f"{folder.name}.{killed}")
            continue
        child.kill()
        child.join()
        killed += 1
    finish(folder)
    assert_same_run(folder, unbroken[0])
    assert not list((folder / "checkpoints").glob(".*"))


def test_killed_twice(unbroken: tuple[Path, float], tmp_path: Path) -> None:
    kill_and_resume(tmp_path / "run", unbroken, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2])
def test_killed_twenty_times(unbroken: tuple[Path, float], tmp_path: Path, seed: int) -> None:
    kill_and_resume(tmp_path / "run", unbroken, kills=20, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["model", "rng", "state", "renamed", "deleting"])
def test_killed_while_writing(unbroken: tuple[Path, float], tmp_path: Path, moment: str) -> None:
    """In one of the files, before and after the folder has its name, and while an old one goes."""
    child = in_a_child(tmp_path, moment)
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    finish(tmp_path)
    assert_same_run(tmp_path, unbroken[0])


def test_a_resumed_run_knows_all_that_was(tmp_path: Path) -> None:
    """The losses of the first part, evaluations, and the random numbers of Python and NumPy."""

    class Drawing(ToyFeed):
        def __next__(self) -> Any:
            draws.append((random.random(), float(np.random.standard_normal()), torch.rand(()).item()))
            return super().__next__()

    def run(folder: Path, stop: bool) -> History:
        draws.clear()
        config = toy_config(folder, steps=10, checkpoint={"interval": 4}, evaluation_interval=2, log_interval=3)
        trainer = Trainer(
            ToyObjective(), Drawing(), ToyMasking(), config, evaluate=lambda _: {"draw": torch.rand(()).item()}
        )
        step = trainer.step

        def failing(index: int) -> None:
            if stop and index == 6:
                raise RuntimeError("the machine burns")
            step(index)

        trainer.step = failing  # type: ignore[method-assign]
        return trainer.fit()

    draws: list[tuple[float, float, float]] = []
    whole = run(tmp_path / "whole", False)
    all_draws = list(draws)
    with pytest.raises(RuntimeError, match="burns"):
        run(tmp_path / "broken", True)
    resumed = run(tmp_path / "broken", False)
    assert torch.equal(resumed.rows[:, :6], whole.rows[:, :6])
    assert resumed.evaluations == whole.evaluations
    assert len(resumed.evaluations) == 5
    assert draws == all_draws[8:]  # from the fifth step on


def test_generators_go_through_json() -> None:
    import json

    device = torch.device("cpu")
    random.gauss(0, 1)  # leaves a second one for the next call
    np.random.standard_normal()
    state = randomness.capture(device)
    first = (random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist())
    state = state._replace(numbers=json.loads(json.dumps(state.numbers)))
    randomness.restore(state, device)
    assert first == (random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist())
