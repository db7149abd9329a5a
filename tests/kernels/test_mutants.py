"""Every planted bug of mutants.py is caught. Next: mutants.py."""

from __future__ import annotations

import pytest

from tests.kernels import mutants
from tests.parts import part


@pytest.mark.slow
@pytest.mark.parametrize("mutant", part(mutants.MUTANTS), ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant: mutants.Mutant) -> None:
    assert not mutants.survives(mutant)
