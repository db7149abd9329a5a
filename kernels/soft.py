"""The soft term of a row: r without cancellation, f and g of a tile, and their sums over the row.

The divergence itself is an argument, one of divergences.py; r is never the difference of two rounded logarithms. It
knows nothing of labels, weights or the gradient's memory. Next: rows.py, which conducts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distil_fast.kernels.maths import LOG2E, difference
from distil_fast.kernels.sums import load_logits
from distil_fast.kernels.tiles import edge_tile, whole_tile, whole_tiles


@triton.jit
def distance(ref_s, ref_t, z_s, z_t, inverse_t):
    """(shift, rho) such that r = (s - t - shift) / T - rho. The shift is the distance of the models' largest logits:
    it leaves a difference as small as the models are close, and rho only what the shift's rounding lost."""
    shift = ref_s - ref_t
    back = shift - ref_s
    lost = (ref_s - (shift - back)) - (ref_t + back)
    lost = tl.where(lost == lost, lost, 0.0)
    return shift, tl.log(z_s / z_t) + lost * inverse_t


@triton.jit
def compare(s, t, models, parameters, centre, DIVERGENCE: tl.constexpr, EXACT: tl.constexpr):
    """f, g, q and r of a tile. Outside the row both logits are -inf: p = q = 0, and f = g = 0."""
    ref_s, ref_t, z_s, z_t, shift, rho, inverse_t = models
    q = tl.exp2((s - ref_s) * (inverse_t * LOG2E)) * (1.0 / z_s)
    p = tl.exp2((t - ref_t) * (inverse_t * LOG2E)) * (1.0 / z_t)
    r = difference(s, t, shift, EXACT) * inverse_t - rho
    f, g = DIVERGENCE(r, p, q, parameters[0], parameters[1], centre)
    return f, g, q, r


@triton.jit
def load_pair(
    rows, lead, place, inside, FORM_S: tl.constexpr, FORM_T: tl.constexpr, VEC: tl.constexpr, ALIGNED_S: tl.constexpr,
    ALIGNED_T: tl.constexpr,
):  # fmt: skip
    s = load_logits(rows[0], lead, place, inside, FORM_S, VEC, ALIGNED_S)
    t = load_logits(rows[1], lead, place, inside, FORM_T, VEC, ALIGNED_T)
    return s, t


@triton.jit
def mean_difference(
    rows, lead, cols, models, DIVERGENCE: tl.constexpr, EXACT: tl.constexpr, FORM_S: tl.constexpr, FORM_T: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED_S: tl.constexpr, ALIGNED_T: tl.constexpr,
):  # fmt: skip
    """Sum of q r, the estimate of D that g is taken relative to; 0 where that is not finite."""
    total = tl.zeros((BLOCK // VEC,), tl.float32)
    for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
        place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
        s, t = load_pair(rows, lead, place, inside, FORM_S, FORM_T, VEC, ALIGNED_S, ALIGNED_T)
        _, _, q, r = compare(s, t, models, (0.0, 0.0), 0.0, DIVERGENCE, EXACT)
        total += tl.sum(tl.where(q == 0.0, 0.0, q * r), axis=1)
    place, inside = edge_tile(lead, cols, VEC)
    s, t = load_pair(rows, lead, place, inside, FORM_S, FORM_T, VEC, ALIGNED_S, ALIGNED_T)
    _, _, q, r = compare(s, t, models, (0.0, 0.0), 0.0, DIVERGENCE, EXACT)
    mean = tl.sum(total, axis=0) + tl.sum(tl.sum(tl.where(q == 0.0, 0.0, q * r), axis=1), axis=0)
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)


@triton.jit
def divergence_sums(
    rows, lead, cols, models, parameters, centre, DIVERGENCE: tl.constexpr, EXACT: tl.constexpr, FORM_S: tl.constexpr,
    FORM_T: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED_S: tl.constexpr, ALIGNED_T: tl.constexpr,
):  # fmt: skip
    """The sums of f, which is D, and of g, which the gradient projects out."""
    f_sum = tl.zeros((BLOCK // VEC,), tl.float32)
    g_sum = tl.zeros((BLOCK // VEC,), tl.float32)
    for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
        place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
        s, t = load_pair(rows, lead, place, inside, FORM_S, FORM_T, VEC, ALIGNED_S, ALIGNED_T)
        f, g, _, _ = compare(s, t, models, parameters, centre, DIVERGENCE, EXACT)
        f_sum += tl.sum(f, axis=1)
        g_sum += tl.sum(g, axis=1)
    place, inside = edge_tile(lead, cols, VEC)
    s, t = load_pair(rows, lead, place, inside, FORM_S, FORM_T, VEC, ALIGNED_S, ALIGNED_T)
    f, g, _, _ = compare(s, t, models, parameters, centre, DIVERGENCE, EXACT)
    f_total = tl.sum(f_sum, axis=0) + tl.sum(tl.sum(f, axis=1), axis=0)
    return f_total, tl.sum(g_sum, axis=0) + tl.sum(tl.sum(g, axis=1), axis=0)
