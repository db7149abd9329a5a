"""The suite can fail: every mutant of mutants.py is killed, and the script says so when one is not.

Next: mutants.py.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import mutants
from tests.parts import part


@pytest.mark.slow
def test_every_mutant_is_killed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants"], cwd=mutants.ROOT, capture_output=True, text=True, timeout=1800
    )
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


def test_parts_make_up_the_whole() -> None:
    names = [m.name for m in mutants.MUTANTS]
    parts = [part(names, f"{i}/4") for i in range(4)]
    assert sorted(name for some in parts for name in some) == sorted(names)
    assert part(names, None) == names
    for wrong in ("4/4", "x", "-1/2", "1"):
        with pytest.raises(ValueError, match="MUTANTS_PART: expected I/N"):
            part(names, wrong)
