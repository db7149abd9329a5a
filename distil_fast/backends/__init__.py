"""Which implementation serves a tensor, and why. Next: native.py, the C++ core.

CPU tensors are served by the native core; every other device by distil_fast.reference, in plain torch.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch


class Serving(NamedTuple):
    """The backend's name, and the reason in a sentence."""

    name: str
    why: str


def serving(device: torch.device | str = "cpu") -> Serving:
    """Who computes the losses of tensors on this device."""
    device = torch.device(device)
    if device.type in ("cpu", "meta"):
        from distil_fast import _C

        return Serving("native", f"the C++ core, compiled for and running on {_C.instruction_set()}")
    return Serving(
        "reference", f"there is no kernel for {device.type} yet: plain torch, slower and with [rows, V] copies"
    )


_warned: set[str] = set()


def is_native(device: torch.device) -> bool:
    """Whether the native core serves; warns once per kind of device where it does not."""
    if device.type in ("cpu", "meta"):
        return True
    if device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(
            f"distil_fast: {serving(device).why}. Move the tensors to the CPU for the fused kernels.", stacklevel=4
        )
    return False
