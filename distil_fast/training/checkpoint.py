"""Checkpoints on disk: written beside, renamed, checked when read, the newest kept.

    checkpoints/step-00001234/   <name>.safetensors ...   state.json: format, numbers, sizes and sha256 of the others

Nothing is pickled. It knows names of files, tensors and JSON; not what they mean. Next: snapshot.py, which does.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distil_fast.training.atomic import replacing
from distil_fast.training.settings import InputError

FORMAT = "distil_fast checkpoint 1"
STATE = "state.json"
NAME = re.compile(r"step-(\d{8,})")


class DamagedError(Exception):
    """Not a whole checkpoint of this format; the message says which and why."""


class Contents(NamedTuple):
    """What a checkpoint holds: named tensors by the file, and JSON data."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        folder: is made when the first one is written.
        keep: how many of the newest stay, at least 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Of all checkpoints, the newest first, whole or not."""
        found = self.folder.iterdir() if self.folder.is_dir() else iter(())
        return sorted((path for path in found if NAME.fullmatch(path.name)), key=_step, reverse=True)

    def prepare(self, size: int) -> None:
        """Clear away what killed processes have left, and try to write, before anything runs.

        Args:
            size: of a checkpoint, in bytes, roughly.

        Raises:
            InputError: the folder cannot be written, or has no room for the checkpoints to keep and one more.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob(".step-*"):
                shutil.rmtree(path)
            with tempfile.NamedTemporaryFile(dir=self.folder) as probe:
                probe.write(bytes(4096))
                probe.flush()
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise InputError(f"output: expected a folder to write checkpoints to, {self.folder}: {error}.") from error
        needed = size * max(1, self.keep + 1 - len(self.paths()))
        if free < needed:
            raise InputError(
                f"output: checkpoints need {needed / 1e6:,.0f} MB in {self.folder}, and {free / 1e6:,.0f} MB are free. "
                "Keep fewer with checkpoint.keep, or choose another output folder."
            )

    def write(self, step: int, contents: Contents) -> Path:
        """Write a checkpoint and delete the oldest beyond `keep`.

        Raises:
            OSError: it could not be written; the earlier ones are as they were.
        """
        path = self.folder / f"step-{step:08d}"
        try:
            with replacing(path) as scratch:
                scratch.mkdir()
                for name, tensors in contents.tensors.items():
                    dense = {key: tensor.contiguous() for key, tensor in tensors.items()}
                    save_file(dense, scratch / f"{name}.safetensors")
                files = {file.name: _fingerprint(file) for file in sorted(scratch.iterdir())}
                body = {"format": FORMAT, "files": files, "state": contents.state}
                (scratch / STATE).write_text(json.dumps(body | {"sha256": _digest(body)}), "utf-8")
        except (OSError, SafetensorError) as error:  # of a full disk, safetensors makes an error of its own
            kept = self.paths()
            left = f"the newest whole one is {kept[0]}" if kept else "there is none yet"
            raise OSError(f"The checkpoint of step {step} could not be written ({error}); {left}.") from error
        for old in self.paths()[self.keep :]:
            doomed = old.rename(old.with_name(f".{old.name}.old"))  # a folder half deleted is no checkpoint
            shutil.rmtree(doomed)
        return path

    def newest(self) -> Path | None:
        """The newest whole checkpoint; damaged ones before it are told by a warning each. None: there are none at all.

        Raises:
            InputError: there are some, and none of them is whole.
        """
        reasons = []
        for path in self.paths():
            try:
                read(path)
            except DamagedError as error:
                reasons.append(str(error))
                warnings.warn(f"{error} The one before is used.", stacklevel=2)
            else:
                return path
        if reasons:
            raise InputError(
                f"checkpoint: none of the checkpoints in {self.folder} is whole: {' '.join(reasons)} To start anew, "
                "delete them or choose another output folder."
            )
        return None


def read(path: Path) -> Contents:
    """All of a checkpoint, on the CPU, after its sizes and checksums were found right.

    Raises:
        DamagedError: it is not whole, or none of ours.
    """
    try:
        body = json.loads((path / STATE).read_text("utf-8"))
        stated = body.pop("sha256")
        form, files, state = body["format"], body["files"], body["state"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is no checkpoint, or a truncated one: {STATE}: {error!r}.") from error
    if form != FORMAT:
        raise DamagedError(f"{path} has the format {form!r}; expected {FORMAT!r}.")
    if stated != _digest(body):
        raise DamagedError(f"{path} is damaged: {STATE} has another checksum than it says.")
    tensors = {}
    for name, fingerprint in files.items():
        try:
            if (found := _fingerprint(path / name)) != fingerprint:
                what = "size" if found["bytes"] != fingerprint["bytes"] else "checksum"
                raise DamagedError(f"{path} is damaged: {name} has another {what} than {STATE} says.")
            tensors[name.removesuffix(".safetensors")] = load_file(path / name)
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"{path} is damaged: {name}: {error}.") from error
    return Contents(tensors, state)


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _fingerprint(path: Path) -> dict[str, int | str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
