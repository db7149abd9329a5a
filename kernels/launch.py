"""Launch shapes: how many elements a tile has, how many warps share it, how many registers each thread may have.

One table, by the row's length. A thread holds 8 elements of a tile: one load of 16 bytes of a half precision, and few
enough registers for three blocks of 256 threads on a multiprocessor. No figure here has been tuned on a device.
Next: rows.py.
"""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """BLOCK elements a tile, and warps of 32 threads."""

    block: int
    warps: int


# columns up to which a shape serves -> shape
SHAPES: dict[float, Shape] = {
    512: Shape(512, 2),
    2048: Shape(1024, 4),
    float("inf"): Shape(2048, 8),
}

VECTORS = Shape(1024, 16)  # of the kernels of one program, which walk through vectors of one entry a row

# Of the threads of the row kernel, of entries_kernel (KL: 98 without) and of the kernels of one program. Without this
# bound ptxas takes up to 112, for which there is no need, or stops by itself, with spills: of the row kernel once at
# 80, of the prologue at 64. The other kernels stay below it anyway. AMD's compiler has no such bound.
ROW_REGISTERS = 80
# Where 80 would spill: two blocks of 256 threads on a multiprocessor. Divergences that take mixtures or powers, and
# logits that are made from others (transforms.py).
MORE_ROW_REGISTERS = 128


def options_for_rows(cols: int, wave: int) -> dict[str, int]:
    """What a kernel is launched with for rows of so many columns, where `wave` threads run in step (AMD: 64)."""
    return _options(next(shape for limit, shape in SHAPES.items() if cols <= limit), wave)


def options_for_vectors(wave: int) -> dict[str, int]:
    """The same for the kernels of one program."""
    return _options(VECTORS, wave) | register_bound(wave)


def _options(shape: Shape, wave: int) -> dict[str, int]:
    return {"BLOCK": shape.block, "num_warps": shape.warps * 32 // wave}


def options_for_order(k: int, wave: int) -> dict[str, int]:
    """What the kernel of a top-k teacher's columns is launched with: a thread compares two with CHUNK others."""
    padded = _padded(k)
    return {"K": padded, "CHUNK": 16, "num_warps": max(1, padded // 2 // wave)}


def options_for_topk(cols: int, k: int, wave: int) -> dict[str, int]:
    """The same for its rows, where a thread has at most four entries."""
    shape = next(shape for limit, shape in SHAPES.items() if cols <= limit)
    warps = max(shape.warps, _padded(k) // 4 // 32)
    return {"K": _padded(k)} | _options(Shape(256 * warps, warps), wave)


def _padded(k: int) -> int:
    """A power of two, that nothing be compiled again for most other k."""
    return max(16, 1 << (k - 1).bit_length())


def register_bound(wave: int, more: bool = False) -> dict[str, int]:
    """`more`: for a variant of the row kernel that 80 would not do for."""
    return {"maxnreg": MORE_ROW_REGISTERS if more else ROW_REGISTERS} if wave == 32 else {}


def group_of(*itemsizes: int) -> int:
    """VEC: how many elements of the smallest dtype fill 16 bytes."""
    return 16 // min(itemsizes)
