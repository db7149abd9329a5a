"""Which of the mutants a run plants: all of them, or one part in turn, by the environment variable MUTANTS_PART=I/N.

Continuous integration plants a part with each commit, so that it stays inside its time; people plant them all. Next:
mutants.py, kernels/mutants.py, cuda/test_sanitizers.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

Planted = TypeVar("Planted")


def part(planted: Sequence[Planted], which: str | None = os.environ.get("MUTANTS_PART")) -> list[Planted]:
    """Every N-th, beginning with number I; all without MUTANTS_PART.

    Raises:
        ValueError: not I/N with 0 <= I < N.
    """
    if which is None:
        return list(planted)
    number, _, parts = which.partition("/")
    if not (number.isdigit() and parts.isdigit() and int(number) < int(parts)):
        raise ValueError(f"MUTANTS_PART: expected I/N with 0 <= I < N, got {which!r}.")
    return list(planted[int(number) :: int(parts)])
