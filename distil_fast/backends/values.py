"""Values at fault that a call can see before a kernel runs, or for kernels that do not look: labels, weights of rows or
classes, temperatures.

The first one at fault is an error that names its row. On a GPU each check waits for the device: its callers ask for the
checking mode first. It knows no loss. Next: layout.py, whose errors these are; csrc/cpu/shares.h, the core's own.
"""

from __future__ import annotations

import math

from torch import Tensor

from distil_fast.backends.layout import LABEL, TEMPERATURE, raise_fault


def _refuse(kind: int, bad: Tensor, values: Tensor, cols: int = 0) -> None:
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise_fault((kind, row, values[row].item()), cols=cols)


def check_labels(labels: Tensor, given: Tensor, cols: int) -> None:
    """Labels that are columns, in the rows where one is given."""
    _refuse(LABEL, given & ((labels < 0) | (labels >= cols)), labels, cols)


def check_weights(kind: int, weights: Tensor) -> None:
    """Finite weights >= 0, of tokens (kind MASK) or classes (CLASS_WEIGHT)."""
    _refuse(kind, ~((weights >= 0) & (weights < math.inf)), weights)


def check_temperatures(temperatures: Tensor, used: Tensor | None = None) -> None:
    """Temperatures of rows, of those that are used: bounds that keep 1 / T, T^2 and their products inside a float."""
    bad = ~((temperatures >= 1e-15) & (temperatures <= 1e15))
    _refuse(TEMPERATURE, bad if used is None else bad & used, temperatures)
