"""The Triton backend on the CPU, in Triton's interpreter: calls, guarded memory, and bf16 rounded as GPUs round it.

Only for processes started with TRITON_INTERPRET=1 (test_interpreter.py starts them): the variable decides what
@triton.jit makes. It knows no formula. Next: interpreted_row_loss.py.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter
from torch import Tensor

from distil_fast.backends import triton as backend
from tests import calls, oracle

assert os.environ.get("TRITON_INTERPRET") == "1", "start this by tests/kernels/test_interpreter.py"

HALVES = (torch.float32, torch.bfloat16, torch.float16)
MIXES = [(student, teacher) for student in HALVES for teacher in HALVES]

# ------------------------------------------------------------------------------------------------ bf16
# The interpreter truncates where GPUs round to the nearest, and knows no subnormals. This is Triton's private API: a
# test of interpreted_arithmetic.py holds it to torch's conversions.

_original = triton.runtime.interpreter._convert_float


def _convert_float(x: Any, source: Any, target: Any, mode: Any) -> Any:
    if source == tl.float32 and target == tl.bfloat16:
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FFF), rounded).reshape(x.shape)
    if source == tl.bfloat16 and target == tl.float32:
        return (np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << 16).reshape(x.shape)
    return _original(x, source, target, mode)


triton.runtime.interpreter._convert_float = _convert_float

# ------------------------------------------------------------------------------------------------ speed
# Every call of a device function replaces the same members of triton.language again, which is half of the time of a
# test. Once in a launch is enough.

_patch_lang = triton.runtime.interpreter._patch_lang
_patched: set[int] = set()


def _patch_once(fn: Any) -> Any:
    modules = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
    if modules <= _patched:
        return None
    scope = _patch_lang(fn)
    _patched.update(modules)
    restore = scope.restore

    def restore_all() -> None:
        _patched.clear()
        restore()

    scope.restore = restore_all
    return scope


triton.runtime.interpreter._patch_lang = _patch_once

# ------------------------------------------------------------------------------------------------ memory


class Guarded:
    """Rows in a buffer of nan: what is read outside them shows in the result, what is written there in `check`."""

    def __init__(self, values: Tensor, *, offset: int = 0, gap: int = 0, outer_gap: int = 0) -> None:
        """offset: elements from a 16-byte boundary to the first row; gap: between rows; outer_gap: between batches."""
        *leading, cols = values.shape
        row = cols + gap
        strides = [row, 1] if len(leading) == 1 else [leading[1] * row + outer_gap, row, 1]
        span = sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True)) + 1
        self.buffer = torch.full((64 + offset + span + 64,), math.nan, dtype=values.dtype)
        assert self.buffer.data_ptr() % 16 == 0
        self.rows = self.buffer.as_strided(values.shape, strides, 64 + offset)
        self.rows.copy_(values)

    def check(self) -> None:
        """Nothing but the rows has been written."""
        around = self.buffer.clone()
        around.as_strided(self.rows.shape, self.rows.stride(), self.rows.storage_offset()).fill_(math.nan)
        assert around.isnan().all(), f"{(~around.isnan()).nonzero().flatten().tolist()} written"


# ------------------------------------------------------------------------------------------------ calls


def row_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None = None, *, gradient: str = "fresh", **settings: Any
) -> tuple[dict[str, Tensor], Tensor | None, Any]:
    """Values, gradient and unit, with distillation_loss's names and defaults."""
    upstream = settings.get("upstream")
    arguments = student, teacher, labels, *calls.after_labels(labels, settings)
    loss, soft, hard, grad, unit = backend.row_loss(*arguments, gradient=gradient, upstream=upstream)
    return {"loss": loss, "soft": soft, "hard": hard}, grad, unit


def check(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None = None,
    where: str = "",
    *,
    gradient: str = "fresh",
    **settings: Any,
) -> tuple[dict[str, Tensor], Tensor, Any]:
    """The call against the fp64 truth of exactly the same numbers."""
    upstream = settings.get("upstream")
    known = {k: v for k, v in settings.items() if k != "upstream"}
    truth = oracle.exact(student.clone(), teacher, labels, upstream, **known)
    values, grad, unit = row_loss(student, teacher, labels, gradient=gradient, **settings)
    where = f"{where} {student.dtype} {None if teacher is None else teacher.dtype} {tuple(student.shape)} {settings}"
    oracle.check_values(values, truth, where)
    assert grad is not None
    assert grad.dtype == student.dtype
    oracle.check_gradient(grad, truth, where, float(unit))
    return values, grad, unit
