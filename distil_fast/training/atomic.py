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

    An older folder at `target` is moved aside first and deleted last, so that at every moment either is complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch / "new"
        if target.is_dir():
            target.rename(scratch / "old")
        os.replace(scratch / "new", target)
    finally:
        shutil.rmtree(scratch)
