"""Every script of examples/ runs, in a process of its own, where what it needs is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.recipes import FOLDER, absent

SECONDS = 120  # that a script may take on two cores


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_it_runs(script: Path, tmp_path: Path) -> None:
    lacking = absent(script.read_text())
    if lacking:
        pytest.skip(f"needs {', '.join(lacking)}")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip(), "an example shows what came of it"


def test_there_are_examples() -> None:
    assert len(list(FOLDER.glob("*.py"))) >= 4
