"""Rows of any length, stride and alignment, in groups of 16 bytes: loads and stores of the main loops are full width.

A row of V = 30522 begins on a 16-byte boundary only by chance. Its frame begins at the last boundary before it: `lead`
elements early. Groups of VEC elements that lie wholly in the row are moved whole, under a mask that is constant within
a group; the (at most two) groups at its ends are moved element by element in a tile of their own. No lane outside the
row is touched. It knows nothing of what is computed. Next: rows.py.

All rows of a call share VEC, and one tensor's alignment is the frame's. Another tensor whose rows are congruent to it
(ALIGNED: their starts differ by multiples of VEC, which the caller knows from the strides) is moved in the same way;
one whose rows are not is moved element by element, which the masks allow for as well.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_start(row, inner, start, outer_stride, row_stride):
    """Where row `row` of [outer, inner, cols] begins, in elements from a pointer that is `start` before the first."""
    return start.to(tl.int64) + (row // inner) * outer_stride + (row % inner) * row_stride


@triton.jit
def lead_of(start, VEC: tl.constexpr):
    """How many elements before the row its frame begins."""
    return (start % VEC).to(tl.int32)


@triton.jit
def whole_tiles(lead, cols, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """How many tiles of BLOCK elements the frame has."""
    return (lead + cols + BLOCK - 1) // BLOCK


@triton.jit
def whole_tile(i, lead, cols, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Tile i: places in the frame [BLOCK / VEC, VEC], and the mask of groups that lie wholly in the row."""
    first = (i * (BLOCK // VEC) + tl.arange(0, BLOCK // VEC)) * VEC
    inside = (first >= lead) & (first + VEC <= lead + cols)
    return first[:, None] + tl.arange(0, VEC)[None, :], inside[:, None]


@triton.jit
def edge_tile(lead, cols, VEC: tl.constexpr):
    """The frame's first and last group [2, VEC], and the mask of the row's elements that no whole group has."""
    last = (lead + cols - 1) // VEC * VEC
    end = tl.arange(0, 2)
    first = end * last
    whole = (first >= lead) & (first + VEC <= lead + cols)
    once = (end == 0) | (last > 0)
    place = first[:, None] + tl.arange(0, VEC)[None, :]
    return place, (place >= lead) & (place < lead + cols) & (once & ~whole)[:, None]


@triton.jit
def at(base, start, lead, place, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to places of the frame in a tensor whose row begins at `start`."""
    origin = start - lead
    if ALIGNED:
        origin = tl.multiple_of(origin, VEC)
    return base + origin + place


@triton.jit
def store_rows(out, start, lead, place, inside, x, VEC: tl.constexpr):
    """Values to a row of the frame's own tensor; marked as first to leave the cache, where rows wait to be read."""
    to = at(out, start, lead, place, VEC, True)
    tl.store(to, x.to(out.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@triton.jit
def write_zeros(out, start, cols, VEC: tl.constexpr, BLOCK: tl.constexpr):
    lead = lead_of(start, VEC)
    for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
        place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
        store_rows(out, start, lead, place, inside, tl.zeros(place.shape, tl.float32), VEC)
    place, inside = edge_tile(lead, cols, VEC)
    store_rows(out, start, lead, place, inside, tl.zeros(place.shape, tl.float32), VEC)
