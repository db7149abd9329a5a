"""Where things that are costly to make are kept between runs, and whether anything can be written there.

It knows folders only. Next: tokenise.py and mlm_head.py, which keep their results there.
"""

from __future__ import annotations

import os
from pathlib import Path

from distil_fast.training.settings import InputError


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/distil_fast`, or `~/.cache/distil_fast`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distil_fast"


def make_writable(folder: Path, what: str) -> None:
    """Make the folder if it is not there.

    Raises:
        InputError: it cannot be made or written to; `what` says what it is for.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{what}: the folder {folder} cannot be made: {error.strerror}. Name another one.") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{what}: the folder {folder} is not writable. Name another one.")
