"""The cosine loss over rows: with u = s / |s|, v = t / |t|, e = v - u, 1 - cos = e.e / 2.

Value and gradient vanish with e, so computed this way they keep their digits as s -> t. One program a row, three
sweeps over a row that stays in L1. Weights come from prologue.py. Next: docs/math.md for the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distil_fast.kernels.pairs import load_pair, store_value, sum_of
from distil_fast.kernels.tiles import (
    edge_tile,
    lead_of,
    row_start,
    store_rows,
    whole_tile,
    whole_tiles,
    write_zeros,
)

EPS = tl.constexpr(1e-12)  # on both squared norms, as ATen's cosine_embedding_loss has it


@triton.jit
def apart(s, t, inverse_s, inverse_t):
    """(u, v - u) with one rounding: the product that would round s / |s| is corrected by its own error."""
    u = s * inverse_s
    return u, tl.fma(t, inverse_t, -u) - tl.fma(s, inverse_s, -u)


@triton.jit
def norms(pair, lead, cols, VEC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED_S: tl.constexpr, ALIGNED_T: tl.constexpr):
    """s.s + eps and t.t + eps"""
    ss = tl.zeros((BLOCK // VEC,), tl.float32)
    tt = tl.zeros((BLOCK // VEC,), tl.float32)
    for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
        place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
        s, t = load_pair(pair, lead, place, inside, VEC, ALIGNED_S, ALIGNED_T)
        ss += tl.sum(s * s, axis=1)
        tt += tl.sum(t * t, axis=1)
    place, inside = edge_tile(lead, cols, VEC)
    s, t = load_pair(pair, lead, place, inside, VEC, ALIGNED_S, ALIGNED_T)
    return sum_of(ss, s * s) + EPS, sum_of(tt, t * t) + EPS


@triton.jit
def angle(
    pair, lead, cols, inverse_s, inverse_t, VEC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED_S: tl.constexpr,
    ALIGNED_T: tl.constexpr,
):  # fmt: skip
    """e.e and u.e"""
    ee = tl.zeros((BLOCK // VEC,), tl.float32)
    ue = tl.zeros((BLOCK // VEC,), tl.float32)
    for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
        place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
        s, t = load_pair(pair, lead, place, inside, VEC, ALIGNED_S, ALIGNED_T)
        u, e = apart(s, t, inverse_s, inverse_t)
        ee += tl.sum(e * e, axis=1)
        ue += tl.sum(u * e, axis=1)
    place, inside = edge_tile(lead, cols, VEC)
    s, t = load_pair(pair, lead, place, inside, VEC, ALIGNED_S, ALIGNED_T)
    u, e = apart(s, t, inverse_s, inverse_t)
    return sum_of(ee, e * e), sum_of(ue, u * e)


@triton.jit(
    do_not_specialize=[
        "s_start", "s_outer", "s_row", "t_start", "t_outer", "t_row", "g_start", "g_outer", "g_row", "inner", "cols",
        "rows", "weight",
    ],
    do_not_specialize_on_alignment=["weight", "loss", "term", "sizes"],
)  # fmt: skip
def cosine_kernel(
    student, s_start, s_outer, s_row, teacher, t_start, t_outer, t_row, grad, g_start, g_outer, g_row, inner, cols,
    weights, rows, unit, weight, loss, term, sizes,
    VEC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED_S: tl.constexpr, ALIGNED_T: tl.constexpr,
):  # fmt: skip
    """Row `program_id`: its share of the term to `term` (where nothing is reduced, of the loss to `loss`); its gradient
    in units of `unit` to grad, and the size of that, weight / |s|, to sizes; each may be None."""
    row, rows = tl.program_id(0).to(tl.int64), rows.to(tl.int64)
    row_weight = tl.load(weights + row)
    value = tl.full((), 0.0, tl.float32)
    size = tl.full((), 0.0, tl.float32)
    s_at = row_start(row, inner, s_start, s_outer, s_row)
    frame = s_at
    if grad is not None:
        frame = row_start(row, inner, g_start, g_outer, g_row)
    if row_weight != 0.0:
        pair = (student, s_at, teacher, row_start(row, inner, t_start, t_outer, t_row))
        lead = lead_of(frame, VEC)
        ss, tt = norms(pair, lead, cols, VEC, BLOCK, ALIGNED_S, ALIGNED_T)
        inverse_s, inverse_t = tl.div_rn(1.0, tl.sqrt_rn(ss)), tl.div_rn(1.0, tl.sqrt_rn(tt))
        ee, ue = angle(pair, lead, cols, inverse_s, inverse_t, VEC, BLOCK, ALIGNED_S, ALIGNED_T)
        value = 0.5 * (ee + EPS / ss + EPS / tt)
        size = tl.abs(row_weight) * inverse_s
        if grad is not None:
            of_e = -row_weight * inverse_s
            if unit is not None:
                of_e = of_e / tl.load(unit)
            of_u = of_e * (EPS / ss - ue)
            for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
                place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
                s, t = load_pair(pair, lead, place, inside, VEC, ALIGNED_S, ALIGNED_T)
                u, e = apart(s, t, inverse_s, inverse_t)
                store_rows(grad, frame, lead, place, inside, of_e * e + of_u * u, VEC)
            place, inside = edge_tile(lead, cols, VEC)
            s, t = load_pair(pair, lead, place, inside, VEC, ALIGNED_S, ALIGNED_T)
            u, e = apart(s, t, inverse_s, inverse_t)
            store_rows(grad, frame, lead, place, inside, of_e * e + of_u * u, VEC)
    elif grad is not None:
        write_zeros(grad, frame, cols, VEC, BLOCK)
    store_value(row, rows, weights, weight, value, loss, term)
    if sizes is not None:
        tl.store(sizes + row, size)
