"""Files and folders that appear whole or not at all: written beside their place, then renamed.

It knows paths only. Next: mlm_head.py and demo.py, which save through it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write a file or a folder at; on success it takes the place of `target`, on an error it vanishes.

    An older folder at `target` is moved aside first and deleted last, so that at every moment either is complete. What
    was written is on the disk before it has its name, so that a power cut leaves no empty files either.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch / "new"
        _flush(scratch / "new")
        if target.is_dir():
            target.rename(scratch / "old")
        os.replace(scratch / "new", target)
        _flush_entry(target.parent)
    finally:
        shutil.rmtree(scratch)


def _flush(path: Path) -> None:
    """Wait until a file, or a folder and all in it, is on the disk."""
    for inner in path.iterdir() if path.is_dir() else ():
        _flush(inner)
    _flush_entry(path)


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
