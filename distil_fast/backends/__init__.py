"""Which implementation serves a tensor, and why: by device and dtype, by what is installed, or as the caller says.

A backend is a module of this folder with one function for each op; this file knows their names, in the order of
preference, and imports the one that serves. Next: native.py, the C++ core for CPUs; cuda.py and triton.py for GPUs.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

KERNELS = ("native", "cuda", "triton")  # in the order of preference
NAMES = (*KERNELS, "reference")


class Serving(NamedTuple):
    """The backend's name, and the reason in a sentence."""

    name: str
    why: str


@functools.cache
def module(name: str) -> ModuleType:
    """The implementation of a backend with kernels."""
    return importlib.import_module(f"distil_fast.backends.{name}")


def serving(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, backend: str | None = None
) -> Serving:
    """Who computes the losses of tensors on this device, of this dtype, and why.

    Args:
        device, dtype: of the student's tensor.
        backend: "native", "cuda", "triton" or "reference"; None: the environment variable DISTIL_FAST_BACKEND, and
            without it the first that can.

    Raises:
        ValueError: an unknown name, or a backend that cannot serve such tensors.
    """
    device = torch.device(device)
    asked, source = (backend, "backend") if backend is not None else (_forced, "DISTIL_FAST_BACKEND")
    if asked is None:
        return _automatic(device, dtype)
    if asked not in NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(NAMES)}, got {asked!r}.")
    if asked == "reference":
        return Serving("reference", f"{source} asks for it")
    can, why = module(asked).available(device, dtype)
    if not can:
        raise ValueError(
            f"{source}: expected a backend that serves {dtype} on {device}, got {asked!r}: {why}. Without it "
            f"{_automatic(device, dtype).name!r} serves."
        )
    return Serving(asked, f"{source} asks for it; {why}")


def _automatic(device: torch.device, dtype: torch.dtype) -> Serving:
    reasons = []
    for name in KERNELS:
        can, why = module(name).available(device, dtype)
        if can:
            return Serving(name, why)
        reasons.append(f"{name}: {why}")
    return Serving("reference", f"plain torch, slower and with [rows, V] copies; {'; '.join(reasons)}")


_forced = os.environ.get("DISTIL_FAST_BACKEND") or None


def choose(values: Tensor, backend: str | None = None) -> str:
    """The name of who serves this tensor; warns once per kind of tensor if it is the reference by lack of others.

    Raises:
        ValueError: as `serving`.
    """
    if values.device.type == "cpu" and backend is None and _forced is None:
        return "native"  # without a look at anything: this is paid in every call
    return _choose(values.device.type, values.device.index, str(values.dtype).removeprefix("torch."), backend)


def _choose(kind: str, index: int | None, dtype: str, backend: str | None) -> str:
    """`choose` in plain data, so that torch.compile can take the answer as a constant."""
    return _remembered(kind, index, dtype, backend)


@functools.cache
def _remembered(kind: str, index: int | None, dtype: str, backend: str | None) -> str:
    """Decided once for each kind of tensor, so that a warning comes once."""
    device = torch.device(kind) if index is None else torch.device(kind, index)
    name, why = serving(device, getattr(torch, dtype), backend)
    if name == "reference" and backend is None and _forced is None:
        warnings.warn(f"distil_fast: {dtype} on {kind} is served by {why}.", stacklevel=7)
    return name


# What torch.compiler.assume_constant_result does, whose import of the compiler takes a second.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def for_call(values: Tensor, name: str, backend: str | None, plain: str = "") -> str:
    """`choose` for a call of the public function `name`, whose transforms kernels have no rules for; `plain` is the
    same in plain torch, where it has another name than in distil_fast.reference.

    Raises:
        NotImplementedError: inside a torch.func transform or forward-mode differentiation.
        ValueError: as `serving`.
    """
    chosen = choose(values, backend)
    if (
        chosen != "reference"
        and not torch.compiler.is_compiling()
        and (
            torch._C._are_functorch_transforms_active()
            or (forward_ad._current_level >= 0 and forward_ad.unpack_dual(values).tangent is not None)
        )
    ):
        raise NotImplementedError(
            f"distil_fast.{name} has no rules for torch.func transforms and forward-mode derivatives. Batches need "
            f"none: leading dimensions are rows. For these use distil_fast.{plain or f'reference.{name}'}, "
            "which is plain torch."
        )
    return chosen


# ------------------------------------------------------------------------------------------------ checking

_checking = os.environ.get("DISTIL_FAST_CHECK", "") not in ("", "0")


def checking() -> bool:
    """Whether GPU backends look at what only the device knows (labels, token weights, temperatures) and raise.

    The CPU always does. On a GPU it costs one synchronisation a call; without it a row with such a fault has nan for
    its loss and a gradient of 0, and nothing out of bounds is touched.
    """
    return _checking


@contextmanager
def checked() -> Iterator[None]:
    """Turns the checking mode on, for all threads; so does the environment variable DISTIL_FAST_CHECK=1."""
    global _checking
    before, _checking = _checking, True
    try:
        yield
    finally:
        _checking = before
