"""Faults of values that only the device sees: their kinds, and where a kernel that reads the teacher records them.

The prologue records the first fault of its vectors (prologue.py); what is wrong with a teacher's row is known when that
is read, and recorded beside all others: [2, rows], kinds and values. Next: prologue.py, rows.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

# FaultKind of csrc/core.h
NOTHING = tl.constexpr(0)
LABEL = tl.constexpr(1)
MASK = tl.constexpr(2)
TEMPERATURE = tl.constexpr(3)
CLASS_WEIGHT = tl.constexpr(4)
TEACHER_MASS = tl.constexpr(5)
TOPK_ID = tl.constexpr(6)
TOPK_LOG_PROB = tl.constexpr(7)


@triton.jit
def record_row(faults, row, rows, kind, value):
    tl.store(faults + row, tl.to_tensor(kind).to(tl.float64))
    tl.store(faults + rows + row, value.to(tl.float64))


@triton.jit
def rounding_of(teacher):
    """What rounding may add to probabilities, to their logarithms, and to their sum, of a tensor of this dtype."""
    rounding = 1e-3
    if teacher.dtype.element_ty == tl.bfloat16:
        rounding = 5e-2
    elif teacher.dtype.element_ty == tl.float16:
        rounding = 1e-2
    return rounding


@triton.jit
def above_one(mass, teacher):
    """Whether the sum of a row's probabilities is above 1 by more than rounding, or nan, as a negative one makes it."""
    return ~(mass <= 1.0 + rounding_of(teacher))
