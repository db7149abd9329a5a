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

# Of the row kernel's threads, and of entries_kernel's (KL: 98 without). Without this bound ptxas takes up to 112, for
# which there is no need, and once it stopped at 80 by itself, with spills. The other kernels stay below it anyway.
# AMD's compiler has no such bound.
ROW_REGISTERS = 80


def options_for_rows(cols: int, wave: int) -> dict[str, int]:
    """What a kernel is launched with for rows of so many columns, where `wave` threads run in step (AMD: 64)."""
    return _options(next(shape for limit, shape in SHAPES.items() if cols <= limit), wave)


def options_for_vectors(wave: int) -> dict[str, int]:
    """The same for the kernels of one program."""
    return _options(VECTORS, wave)


def _options(shape: Shape, wave: int) -> dict[str, int]:
    return {"BLOCK": shape.block, "num_warps": shape.warps * 32 // wave}


def register_bound(wave: int) -> dict[str, int]:
    """What the row kernel and entries_kernel are launched with besides."""
    return {"maxnreg": ROW_REGISTERS} if wave == 32 else {}


def group_of(*itemsizes: int) -> int:
    """VEC: how many elements of the smallest dtype fill 16 bytes."""
    return 16 // min(itemsizes)
