"""The CUDA kernels in the place of the native core: on CPU tensors, through the same Python and the same host code.

Every test of this folder, and every test of the CPU that a file here imports, runs on the emulated device; a test that
asks for the CPU's instruction sets in turn gets devices in turn. Next: emulated.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest

from distil_fast import backends
from distil_fast.backends import cuda, native
from tests import oracle
from tests.cuda import emulated

# Compute capability, bytes of shared memory, clusters at a time (fewer than most tests have rows: each takes several).
# Of the last, most rows are too large for shared memory.
DEVICES = {"sm_90": (9, 227 << 10, 3), "sm_80": (8, 163 << 10, 2), "sm_80, little memory": (8, 30 << 10, 3)}
QUICK = ("test_matrix[", "test_a_bad_row", "test_softmax_", "test_cosine_values", "test_pair_values")
MATRICES = ("test_options_matrix.py", "test_topk_matrix.py")  # of these, all on sm_90
LATER = [name for name in oracle.DIVERGENCES if not name.startswith(("forward", "reverse", "jsd"))]  # on sm_90 alone
OPS = ("row_loss", "topk_loss", "rescale", "softmax", "softmax_backward", "pair_loss")


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    """The emulated module; with DISTIL_FAST_TEST_DEVICE=cuda there is nothing to emulate."""
    if os.environ.get("DISTIL_FAST_TEST_DEVICE", "cpu") != "cpu":
        pytest.skip("on a GPU, the tests of the CPU run as they are")
    if emulated.compiler() is None:
        pytest.skip("a C++ compiler is needed to build the emulated kernels")
    return emulated.module()


@pytest.fixture(autouse=True)
def emulation(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """CPU tensors are served by the CUDA backend, on sm_90 unless the test says otherwise."""
    monkeypatch.setattr(cuda, "_C", kernels)
    for op in OPS:
        monkeypatch.setattr(native, op, getattr(cuda, op))
    kernels.use_device(*DEVICES["sm_90"])
    assert backends.module("native").row_loss is cuda.row_loss
    return kernels


@pytest.fixture(params=DEVICES)
def instruction_set(request: pytest.FixtureRequest, emulation: ModuleType) -> Iterator[str]:
    """Each device in turn."""
    emulation.use_device(*DEVICES[request.param])
    yield request.param
    emulation.use_device(*DEVICES["sm_90"])


@pytest.hookimpl(tryfirst=True)  # before -m "not slow" looks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The CPU's tests on emulated devices take minutes: on sm_90 the matrix itself runs always, the rest is slow. What
    sm_80 does otherwise (how rows are held) knows no divergence: three of them are tried there."""
    here = [item for item in items if item.path.parent.name == "cuda"]
    again = [item for item in here if "sm_80" in item.name and any(name in item.name for name in LATER)]
    left_out = set(again)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=again)
    for item in items:
        name, file = item.name, item.path.name
        quick = "sm_80" not in name if file in MATRICES else "sm_90" in name and name.startswith(QUICK)
        if file in ("test_matrix.py", *MATRICES) and not quick:
            item.add_marker(pytest.mark.slow)
