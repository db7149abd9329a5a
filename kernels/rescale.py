"""grad *= grad_output * unit, where both are read on the device; not touched where their product is 1.

Knows nothing of what the gradient is of. Next: tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distil_fast.kernels.prologue import scalar
from distil_fast.kernels.tiles import at, edge_tile, lead_of, row_start, store_rows, whole_tile, whole_tiles


@triton.jit(
    do_not_specialize=["start", "outer_stride", "row_stride", "inner", "cols", "unit"],
    do_not_specialize_on_alignment=["grad_output", "unit"],
)
def rescale_kernel(
    grad, start, outer_stride, row_stride, inner, cols, grad_output, unit, VEC: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row; rounded once to grad's dtype."""
    factor = scalar(grad_output) * scalar(unit)
    if factor != 1.0:
        begin = row_start(tl.program_id(0).to(tl.int64), inner, start, outer_stride, row_stride)
        lead = lead_of(begin, VEC)
        for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
            place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
            x = tl.load(at(grad, begin, lead, place, VEC, True), mask=inside, other=0.0).to(tl.float32)
            store_rows(grad, begin, lead, place, inside, x * factor, VEC)
        place, inside = edge_tile(lead, cols, VEC)
        x = tl.load(at(grad, begin, lead, place, VEC, True), mask=inside, other=0.0).to(tl.float32)
        store_rows(grad, begin, lead, place, inside, x * factor, VEC)
