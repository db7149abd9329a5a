"""softmax and log_softmax at a temperature, and their backward, one program a row, two sweeps each.

The frame of 16-byte groups is the output's; the second sweep finds the row in L2. Next: sums.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distil_fast.kernels.maths import LOG2E
from distil_fast.kernels.prologue import scalar, valid_temperature
from distil_fast.kernels.sums import exponential_sum, load_logits, plain_row
from distil_fast.kernels.tiles import at, edge_tile, lead_of, row_start, store_rows, whole_tile, whole_tiles
from distil_fast.kernels.transforms import PLAIN


@triton.jit
def temperature_of(temperature, row, PER_ROW: tl.constexpr):
    """The row's temperature; nan where it is none, which makes the row's output nan."""
    if PER_ROW:
        t = tl.load(temperature + row).to(tl.float32)
    else:
        t = scalar(temperature)
    return tl.where(valid_temperature(t), t, float("nan"))


@triton.jit
def probabilities(x, ref, k, z, inverse_t, LOGARITHM: tl.constexpr):
    if LOGARITHM:
        y = (x - ref) * inverse_t - tl.log(z)
    else:
        y = tl.exp2((x - ref) * k) * (1.0 / z)
    return y


@triton.jit(
    do_not_specialize=[
        "x_start", "x_outer", "x_row", "y_start", "y_outer", "y_row", "inner", "cols", "temperature",
    ],
    do_not_specialize_on_alignment=["temperature"],
)  # fmt: skip
def softmax_kernel(
    logits, x_start, x_outer, x_row, out, y_start, y_outer, y_row, inner, cols, temperature,
    PER_ROW: tl.constexpr, LOGARITHM: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """out = softmax(logits / temperature), or its logarithm."""
    row = tl.program_id(0).to(tl.int64)
    entries = plain_row(logits, row_start(row, inner, x_start, x_outer, x_row))
    y_at = row_start(row, inner, y_start, y_outer, y_row)
    inverse_t = 1.0 / temperature_of(temperature, row, PER_ROW)
    k = inverse_t * LOG2E
    ref, z = exponential_sum(entries, cols, k, PLAIN, VEC, BLOCK)
    lead = lead_of(y_at, VEC)
    for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
        place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
        x = load_logits(entries, lead, place, inside, PLAIN, VEC, ALIGNED)
        store_rows(out, y_at, lead, place, inside, probabilities(x, ref, k, z, inverse_t, LOGARITHM), VEC)
    place, inside = edge_tile(lead, cols, VEC)
    x = load_logits(entries, lead, place, inside, PLAIN, VEC, ALIGNED)
    store_rows(out, y_at, lead, place, inside, probabilities(x, ref, k, z, inverse_t, LOGARITHM), VEC)


@triton.jit
def load_both(tensors, lead, place, inside, VEC: tl.constexpr, ALIGNED_Y: tl.constexpr, ALIGNED_U: tl.constexpr):
    """The output and its gradient in float32, 0 outside the row."""
    out, y_at, upstream, u_at = tensors
    y = tl.load(at(out, y_at, lead, place, VEC, ALIGNED_Y), mask=inside, other=0.0).to(tl.float32)
    u = tl.load(at(upstream, u_at, lead, place, VEC, ALIGNED_U), mask=inside, other=0.0).to(tl.float32)
    return y, u


@triton.jit
def logits_gradient(y, u, total, inverse_t, LOGARITHM: tl.constexpr):
    """softmax: y (u - total) / T; log_softmax: (u - exp(y) total) / T."""
    if LOGARITHM:
        x = (u - tl.exp2(y * LOG2E) * total) * inverse_t
    else:
        x = y * (u - total) * inverse_t
    return x


@triton.jit
def write_rows(
    grad, x_at, tensors, lead, cols, total, inverse_t, LOGARITHM: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNED_Y: tl.constexpr, ALIGNED_U: tl.constexpr,
):  # fmt: skip
    """The gradient of the row's whole groups."""
    for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
        place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
        y, u = load_both(tensors, lead, place, inside, VEC, ALIGNED_Y, ALIGNED_U)
        store_rows(grad, x_at, lead, place, inside, logits_gradient(y, u, total, inverse_t, LOGARITHM), VEC)


@triton.jit(
    do_not_specialize=[
        "y_start", "y_outer", "y_row", "u_start", "u_outer", "u_row", "x_start", "x_outer", "x_row", "inner", "cols",
        "temperature",
    ],
    do_not_specialize_on_alignment=["temperature"],
)  # fmt: skip
def softmax_backward_kernel(
    out, y_start, y_outer, y_row, upstream, u_start, u_outer, u_row, grad, x_start, x_outer, x_row, inner, cols,
    temperature, PER_ROW: tl.constexpr, LOGARITHM: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNED_Y: tl.constexpr, ALIGNED_U: tl.constexpr,
):  # fmt: skip
    """grad, of the logits, from the output and its gradient `upstream`."""
    row = tl.program_id(0).to(tl.int64)
    x_at = row_start(row, inner, x_start, x_outer, x_row)
    tensors = (
        out, row_start(row, inner, y_start, y_outer, y_row), upstream, row_start(row, inner, u_start, u_outer, u_row),
    )  # fmt: skip
    inverse_t = 1.0 / temperature_of(temperature, row, PER_ROW)
    lead = lead_of(x_at, VEC)
    total = tl.zeros((BLOCK // VEC,), tl.float32)
    for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
        place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
        y, u = load_both(tensors, lead, place, inside, VEC, ALIGNED_Y, ALIGNED_U)
        total += tl.sum(u if LOGARITHM else u * y, axis=1)
    place, inside = edge_tile(lead, cols, VEC)
    y, u = load_both(tensors, lead, place, inside, VEC, ALIGNED_Y, ALIGNED_U)
    all_upstream = tl.sum(total, axis=0) + tl.sum(tl.sum(u if LOGARITHM else u * y, axis=1), axis=0)
    store_rows(grad, x_at, lead, place, inside, logits_gradient(y, u, all_upstream, inverse_t, LOGARITHM), VEC)
    write_rows(grad, x_at, tensors, lead, cols, all_upstream, inverse_t, LOGARITHM, VEC, BLOCK, ALIGNED_Y, ALIGNED_U)
