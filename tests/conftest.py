"""What all tests share: one thread unless a test says otherwise, each instruction set in turn, and the margins.

Knows no formula and no kernel. Next: oracle.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distil_fast import _C
from tests import oracle


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread; the tests of threads set their own number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=oracle.INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn; the one that was in use returns afterwards."""
    before = _C.instruction_set()
    if not _C.use_instruction_set(request.param):
        pytest.skip(f"this processor lacks {request.param}")
    yield request.param
    _C.use_instruction_set(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How near to its bound each quantity came, over all calls that were compared with the oracle."""
    if oracle.worst:
        terminalreporter.section("numerics: largest error, as a part of its bound")
    for (quantity, dtype), (part, where) in sorted(oracle.worst.items()):
        terminalreporter.write_line(f"{quantity:9} {dtype:9} {part:6.3f}   {where}")
