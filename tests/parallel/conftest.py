"""Worlds of 2 and 3 gloo processes, each started once for all tests of this folder.

Next: tests/world.py, which runs the ranks; sharded.py, what they are given.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import world


@pytest.fixture(scope="session", params=[2, 3], ids=["2-ranks", "3-ranks"])
def ranks(request: pytest.FixtureRequest) -> Iterator[world.World]:
    one = world.World(request.param)
    yield one
    one.close()
