"""Children that train the toy and may be killed: forked off a server that has imported all, so that a kill is cheap.

The server has run nothing: a fork of a process whose threads hold locks could hang. Next: test_resume.py.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import torch

from distil_fast.training import checkpoint
from distil_fast.training.metrics import History
from distil_fast.training.trainer import Trainer
from tests.training.toy import ToyFeed, ToyMasking, ToyObjective, toy_config

STEPS = 60
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])


def train(folder: Path, **changes: Any) -> History:
    settings = {"steps": STEPS, "log_interval": 7, "checkpoint": {"interval": 3}} | changes
    return Trainer(ToyObjective(), ToyFeed(), ToyMasking(), toy_config(folder, **settings)).fit()


def in_a_child(folder: Path, moment: str | None = None) -> Any:
    """A running process that trains, and kills itself at a moment of its fourth checkpoint."""
    child = SERVER.Process(target=_train, args=(folder, moment), daemon=True)
    child.start()
    return child


def _train(folder: Path, moment: str | None) -> None:
    torch.set_num_threads(1)
    if moment:
        _die_while_writing(moment)
    train(folder)
    os._exit(0)


def _die_while_writing(moment: str) -> None:
    save, rename, remove, calls = checkpoint.save_file, os.replace, checkpoint.shutil.rmtree, 0

    def die(now: bool) -> None:
        nonlocal calls
        calls += now
        if now and calls == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_file(tensors: Any, path: Path) -> None:
        save(tensors, path)
        if path.name.startswith(moment) and calls == 3:
            os.truncate(path, path.stat().st_size // 2)
        die(path.name.startswith(moment))

    def replace(old: Path, new: Path) -> None:
        die(moment == "state")
        rename(old, new)
        die(moment == "renamed")

    def rmtree(path: Path) -> None:
        if moment == "deleting" and path.suffix == ".old":
            (path / "model.safetensors").unlink()
            die(True)
        remove(path)

    checkpoint.save_file = save_file
    os.replace = replace  # type: ignore[assignment]
    checkpoint.shutil.rmtree = rmtree  # type: ignore[assignment]
