"""The Triton kernels in Triton's interpreter: starts a process for the files of tests that need it.

The variable TRITON_INTERPRET is read when a kernel is defined, and a process that interprets cannot compile, so these
tests cannot share a process with test_aot.py. Next: interpreted_row_loss.py, which holds the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import oracle

ROOT = Path(__file__).parent.parent.parent
LEAST = {
    "interpreted_row_loss.py": 150,
    "interpreted_options.py": 50,
    "interpreted_conventions.py": 75,
    "interpreted_softmax.py": 25,
    "interpreted_pairs.py": 90,
    "interpreted_topk.py": 25,
}
FILES = tuple(LEAST)


def run(files: Sequence[str], *how: str) -> subprocess.CompletedProcess[str]:
    """pytest, in a process that interprets; numpy's warnings about inf - inf are not ours."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    paths = [f"tests/kernels/{file}" for file in files]
    command = [sys.executable, "-m", "pytest", "-W", "ignore::RuntimeWarning", *how, *paths]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def report() -> str:
    """What a process that runs every file has to say: a process of its own for each would cost its start."""
    done = run(FILES, "-v", "--tb=short")
    assert done.returncode in (0, 1), done.stdout[-6000:] + done.stderr[-2000:]  # it got as far as the tests' end
    return done.stdout


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str, report: str) -> None:
    verdicts = re.findall(rf"^tests/kernels/{re.escape(file)}::.* (PASSED|FAILED|ERROR) +\[", report, re.MULTILINE)
    assert set(verdicts) == {"PASSED"}, report[-20000:]
    assert len(verdicts) >= LEAST[file], report


@pytest.mark.slow
def test_interpreted_matrix() -> None:
    """Every divergence, mix of dtypes and kind of logits."""
    done = run(["interpreted_row_loss.py"], "-q", "-m", "slow")
    assert f"{9 * len(oracle.DIVERGENCES)} passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


def test_every_file_is_run() -> None:
    assert sorted(FILES) == sorted(path.name for path in Path(__file__).parent.glob("interpreted_*.py"))
