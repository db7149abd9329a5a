"""The suite can fail: every mutant of mutants.py is killed, and the script says so when one is not.

Next: mutants.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import mutants

SCRIPT = Path(mutants.__file__)


@pytest.mark.slow
def test_every_mutant_is_killed() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(mutants.MUTANTS)} of {len(mutants.MUTANTS)} mutants killed" in done.stdout


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_every_mutant_still_fits_the_sources(mutant: mutants.Mutant) -> None:
    source = (mutants.ROOT / mutant.file).read_text()
    assert mutants.mutated(source, mutant) != source


def test_a_text_that_is_not_there_is_an_error() -> None:
    stale = mutants.mutant("stale", "some/file", "no such text", "")
    with pytest.raises(mutants.ScriptError, match="stale: 'no such text' occurs 0 times in some/file"):
        mutants.mutated("text", stale)
    with pytest.raises(mutants.ScriptError, match="occurs 2 times"):
        mutants.mutated("no such text, no such\n  text", stale)


def test_there_are_enough_of_them() -> None:
    names = [m.name for m in mutants.MUTANTS]
    assert len(set(names)) == len(names) >= 15
