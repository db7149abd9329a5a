"""Per-row values to one loss and its terms, in a fixed order, by one program. Next: rows.py, which writes the values.

It knows neither shares nor denominators: they are in the values. Two launches of the same call give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distil_fast.kernels.prologue import unit_of, weighted


@triton.jit
def total_of(values, rows, BLOCK: tl.constexpr):
    """The sum of a vector."""
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range((rows + BLOCK - 1) // BLOCK):
        row = i * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        total += tl.load(values + row, mask=row < rows, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(
    do_not_specialize=["soft_weight", "hard_weight", "rows"],
    do_not_specialize_on_alignment=["soft_rows", "hard_rows", "soft_weight", "hard_weight"],
)
def reduction_kernel(
    soft_rows, hard_rows, soft_weight, hard_weight, rows, loss, soft, hard, sizes, unit, BLOCK: tl.constexpr
):
    """loss = soft_weight soft + hard_weight hard. hard_rows None: there is one term. sizes: of the rows' fp16
    gradients, whose unit they decide; or None."""
    soft_total = total_of(soft_rows, rows, BLOCK)
    total = weighted(soft_weight, soft_total)
    tl.store(soft, soft_total)
    if hard_rows is not None:
        hard_total = total_of(hard_rows, rows, BLOCK)
        total += weighted(hard_weight, hard_total)
        tl.store(hard, hard_total)
    tl.store(loss, total)
    if sizes is not None:
        largest = tl.zeros((BLOCK,), tl.float32)
        for i in range((rows + BLOCK - 1) // BLOCK):
            row = i * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
            largest = tl.maximum(largest, tl.load(sizes + row, mask=row < rows, other=0.0))
        tl.store(unit, unit_of(tl.max(largest, axis=0)))
