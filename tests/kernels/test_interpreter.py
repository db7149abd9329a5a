"""The Triton kernels in Triton's interpreter: starts a process for each file of tests that needs it.

The variable TRITON_INTERPRET is read when a kernel is defined, and a process that interprets cannot compile, so these
tests cannot share a process with test_aot.py. Next: interpreted_row_loss.py, which holds the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import oracle

ROOT = Path(__file__).parent.parent.parent
LEAST = {
    "interpreted_row_loss.py": 150,
    "interpreted_options.py": 50,
    "interpreted_conventions.py": 110,
    "interpreted_softmax.py": 25,
    "interpreted_pairs.py": 90,
    "interpreted_topk.py": 25,
}
FILES = tuple(LEAST)


def run(file: str, *how: str) -> str:
    """pytest's report, of a process that interprets; numpy's warnings about inf - inf are not ours."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", *how, f"tests/kernels/{file}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str) -> None:
    report = run(file)
    passed = re.search(r"(\d+) passed", report)
    assert passed, report
    assert int(passed[1]) >= LEAST[file], report


@pytest.mark.slow
def test_interpreted_matrix() -> None:
    """Every divergence, mix of dtypes and kind of logits."""
    assert f"{9 * len(oracle.DIVERGENCES)} passed" in run("interpreted_row_loss.py", "-m", "slow")


def test_every_file_is_run() -> None:
    assert sorted(FILES) == sorted(path.name for path in Path(__file__).parent.glob("interpreted_*.py"))
