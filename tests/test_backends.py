"""Which implementation serves a device, and the instruction sets of the one that serves the CPU.

Other devices are fake tensors: shapes on a device that need not exist. It knows no formula. Next: backends/__init__.py.
"""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode

import distil_fast
from distil_fast import _C, backends, reference
from tests.batch import CALLS, Batch, as_double, assert_close, assert_identical, first, make_batch, run
from tests.oracle import INSTRUCTION_SETS

UNSERVED = torch.device("xla:0")  # a device without kernels


def test_the_cpu_is_served_by_the_native_core() -> None:
    for device in ("cpu", torch.device("cpu"), torch.device("cpu:0")):
        name, why = backends.serving(device)
        assert name == "native"
        assert _C.instruction_set() in why
    assert backends.serving() == backends.serving("cpu")


def test_another_device_is_served_by_the_reference_and_why() -> None:
    name, why = backends.serving(UNSERVED)
    assert name == "reference"
    assert UNSERVED.type in why
    assert "slower" in why


def test_a_device_without_kernels_warns_once_and_works() -> None:
    """With the reference, on that device."""
    with FakeTensorMode():
        batch = Batch(*(torch.empty(t.shape, dtype=t.dtype, device=UNSERVED) for t in make_batch(3, 5)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for name in ("distillation-mean", "soft_alone-none", "cross_entropy-mean", "cosine-mean", "softmax"):
                loss = first(CALLS[name](distil_fast, batch))
                assert loss.device == UNSERVED
                expected = first(CALLS[name](reference, batch))
                assert (loss.shape, loss.dtype) == (expected.shape, expected.dtype)
    messages = [str(w.message) for w in caught if "distil_fast" in str(w.message)]
    assert len(messages) == 1
    assert UNSERVED.type in messages[0]
    assert "plain torch" in messages[0]
    for name in backends.KERNELS:  # and why none of them serves
        assert f"{name}: " in messages[0]


def test_devices_must_agree_wherever_they_are() -> None:
    with FakeTensorMode():
        student, teacher = torch.empty(3, 11), torch.empty(3, 11, device=UNSERVED)
        with pytest.raises(ValueError, match=rf"device cpu, got {UNSERVED}.*\.to\('cpu'\)"):
            distil_fast.divergence_loss(student, teacher)


# ------------------------------------------------------------------------------------------------ by name


@pytest.mark.parametrize("name", CALLS)
def test_a_backend_by_argument(name: str) -> None:
    """Every public function and every module takes it, and it counts."""
    batch = make_batch(3, 5)
    for backend, functions in (("native", distil_fast), ("reference", reference)):
        expected = run(lambda b, where=functions: CALLS[name](where, b), batch)
        assert_identical(run(lambda b, by=backend: CALLS[name](_Bound(by), b), batch), expected)


class _Bound:
    """The public functions with their backend named."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> object:
        found = getattr(distil_fast, name)
        return functools.partial(found, backend=self.backend) if inspect.isfunction(found) else found


def test_a_backend_that_cannot_serve_is_refused() -> None:
    student, teacher = torch.randn(2, 3, 7).unbind()
    with pytest.raises(ValueError, match=r"backend: expected one of native, .*reference, got 'cpu'"):
        distil_fast.divergence_loss(student, teacher, backend="cpu")
    with FakeTensorMode():
        student, teacher = torch.empty(2, 3, 7, device=UNSERVED).unbind()
        with pytest.raises(ValueError, match=rf"float32 on {UNSERVED}, got 'native': .*Without it 'reference' serves"):
            distil_fast.divergence_loss(student, teacher, backend="native")


@pytest.mark.parametrize("asked", ["reference", "native", "", "triton", "no such thing"])
def test_the_environment_chooses_the_backend(asked: str) -> None:
    script = "import distil_fast, torch\nprint(distil_fast.backends.serving('cpu').name)"
    environment = {**os.environ, "DISTIL_FAST_BACKEND": asked}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    if asked in ("reference", "native", ""):
        assert done.stdout.strip() == (asked or "native")
    else:
        assert "ValueError: DISTIL_FAST_BACKEND: expected" in done.stderr


def test_torch_compile_takes_the_choice_as_a_constant() -> None:
    student, teacher = torch.randn(2, 3, 7).unbind()
    compiled = torch.compile(distil_fast.divergence_loss, fullgraph=True, backend="aot_eager")
    for backend in ("native", "reference", None):
        expected = distil_fast.divergence_loss(student, teacher, backend=backend)
        assert torch.equal(compiled(student, teacher, backend=backend), expected)


def test_the_checking_mode() -> None:
    assert not backends.checking()
    with backends.checked():
        assert backends.checking()
        with backends.checked():
            pass
        assert backends.checking()
    assert not backends.checking()


# ------------------------------------------------------------------------------------------------ instruction sets


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("instruction_set")
def test_every_instruction_set_computes_the_same(name: str) -> None:
    batch = make_batch(3, 5, cols=1003)
    expected = run(lambda b: CALLS[name](reference, b), as_double(batch))
    assert_close(run(lambda b: CALLS[name](distil_fast, b), batch), expected, 3e-6)


def test_float64_is_the_same_on_all() -> None:
    """Doubles run through one table everywhere."""
    batch = as_double(make_batch(3, 5))
    before = _C.instruction_set()
    results = []
    for name in INSTRUCTION_SETS:
        if _C.use_instruction_set(name):
            results.append(run(lambda b: CALLS["everything-mean"](distil_fast, b), batch))
    _C.use_instruction_set(before)
    assert results
    for other in results[1:]:
        assert_identical(other, results[0])


def test_an_unknown_instruction_set_is_refused() -> None:
    before = _C.instruction_set()
    assert before in INSTRUCTION_SETS
    assert not _C.use_instruction_set("avx1024")
    assert _C.instruction_set() == before


@pytest.mark.parametrize("asked", ["portable", "no such thing", None])
def test_the_environment_chooses_the_instruction_set(asked: str | None) -> None:
    """DISTIL_FAST_ISA counts where the processor has what it names; otherwise the best is taken."""
    script = "import distil_fast._C as c; print(c.instruction_set())"
    environment = {} if asked is None else {"DISTIL_FAST_ISA": asked}
    inherited = {name: value for name, value in os.environ.items() if name != "DISTIL_FAST_ISA"}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**inherited, **environment}, capture_output=True, text=True, check=True
    )
    best = next(name for name in INSTRUCTION_SETS if _available(name))
    assert done.stdout.strip() == (asked if asked is not None and _available(asked) else best)


def _available(name: str) -> bool:
    before = _C.instruction_set()
    present: bool = _C.use_instruction_set(name)
    _C.use_instruction_set(before)
    return present
