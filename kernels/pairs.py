"""Two tensors compared entry by entry: the Triton twin of csrc/pairs.h, and the kernel that sums it over a row.

A functor is (s, t) -> (f, first, g): the row's value is sum f + sum first, and g its derivative by s. `first` is what
is of first order in s - t and cancels over the row, so it is summed in float64. Weights come from prologue.py. Next:
cosine.py, the comparison that needs the rows' norms first; docs/math.md for the derivations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distil_fast.kernels.maths import log, log1p_tail
from distil_fast.kernels.prologue import weighted
from distil_fast.kernels.tiles import (
    at,
    edge_tile,
    lead_of,
    row_start,
    store_rows,
    whole_tile,
    whole_tiles,
    write_zeros,
)

# ------------------------------------------------------------------------------------------------ the maths


@triton.jit
def squared(s, t):
    """(s - t)^2; an entry that is -inf in both counts 0."""
    e = tl.where((s == float("-inf")) & (t == float("-inf")), 0.0, s - t)
    return e * e, 0.0, e + e


@triton.jit
def probability(x):
    """nan for what is no probability. The upper bound is generous; it keeps the quotient of `log_ratio` in range."""
    return tl.where((x < 0.0) | (x > 1099511627776.0), float("nan"), x)


@triton.jit
def log_ratio(p, q):
    """log p - log q by one quotient, of which what is below 2^-63 is taken 2^64 times larger."""
    small_p, small_q = p < 1.0842021724855044e-19, q < 1.0842021724855044e-19
    quotient = tl.where(small_p, p * 18446744073709551616.0, p) / tl.where(small_q, q * 18446744073709551616.0, q)
    shift = tl.where(small_q, 44.3614195558365, 0.0) - tl.where(small_p, 44.3614195558365, 0.0)
    ratio = tl.where(quotient == quotient, log(quotient) + shift, quotient)  # nan is not in its bits' logarithm
    return tl.where(q == 0.0, float("inf"), ratio)


@triton.jit
def kl(s, t):
    """p (log p - log q), of probabilities: with x = (q - p) / p, p (x - log1p(x)) where x is small, plus p - q."""
    q, p = probability(s), probability(t)
    x = (q - p) / p
    close = tl.abs(x) < 0.25
    f = tl.where(close, -log1p_tail(x), log_ratio(p, q))
    none = p == 0.0  # then it does not matter what q is
    return tl.where(none, 0.0, p * f), tl.where(close, p - q, 0.0), tl.where(none, 0.0, -(p / q))


# By the names of csrc/core.h's PairKind; the second line's have terms of first order.
PAIRS = {"squared": squared, "kl": kl}
HAVE_FIRST = {"kl"}

# ------------------------------------------------------------------------------------------------ rows


@triton.jit
def load_pair(pair, lead, place, inside, VEC: tl.constexpr, ALIGNED_S: tl.constexpr, ALIGNED_T: tl.constexpr):
    """Student and teacher in float32, 0 outside the row."""
    student, s_at, teacher, t_at = pair
    s = tl.load(at(student, s_at, lead, place, VEC, ALIGNED_S), mask=inside, other=0.0).to(tl.float32)
    t = tl.load(at(teacher, t_at, lead, place, VEC, ALIGNED_T), mask=inside, other=0.0).to(tl.float32)
    return s, t


@triton.jit
def sum_of(groups, edges):
    return tl.sum(groups, axis=0) + tl.sum(tl.sum(edges, axis=1), axis=0)


@triton.jit
def store_value(row, rows, weights, weight, value, loss, term):
    """A row's share of the term to `term`, where nothing is reduced of the loss to `loss`; each may be None."""
    share = tl.load(weights + 2 * rows + row)
    part = tl.where(share == 0.0, 0.0, share * value)
    if term is not None:
        tl.store(term + row, part)
    if loss is not None:
        tl.store(loss + row, weighted(weight, part))


@triton.jit(
    do_not_specialize=[
        "s_start", "s_outer", "s_row", "t_start", "t_outer", "t_row", "g_start", "g_outer", "g_row", "inner", "cols",
        "rows", "weight", "scale",
    ],
    do_not_specialize_on_alignment=["weight", "loss", "term"],
)  # fmt: skip
def entries_kernel(
    student, s_start, s_outer, s_row, teacher, t_start, t_outer, t_row, grad, g_start, g_outer, g_row, inner, cols,
    weights, rows, unit, weight, scale, loss, term,
    PAIR: tl.constexpr, FIRST: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED_S: tl.constexpr,
    ALIGNED_T: tl.constexpr,
):  # fmt: skip
    """Row `program_id`: `scale` times the sum of PAIR; its gradient in units of `unit` to grad. Each may be None."""
    row, rows = tl.program_id(0).to(tl.int64), rows.to(tl.int64)
    row_weight = tl.load(weights + row)
    value = tl.full((), 0.0, tl.float32)
    s_at = row_start(row, inner, s_start, s_outer, s_row)
    frame = s_at
    if grad is not None:
        frame = row_start(row, inner, g_start, g_outer, g_row)
    if row_weight != 0.0:
        pair = (student, s_at, teacher, row_start(row, inner, t_start, t_outer, t_row))
        lead = lead_of(frame, VEC)
        of_g = row_weight * scale
        if unit is not None:
            of_g = of_g / tl.load(unit)
        f_sums = tl.zeros((BLOCK // VEC,), tl.float32)
        firsts = tl.zeros((BLOCK // VEC,), tl.float64)
        for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
            place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
            s, t = load_pair(pair, lead, place, inside, VEC, ALIGNED_S, ALIGNED_T)
            f, first, g = PAIR(s, t)
            f_sums += tl.sum(f, axis=1)
            if FIRST:
                firsts += tl.sum(first.to(tl.float64), axis=1)
            if grad is not None:
                store_rows(grad, frame, lead, place, inside, of_g * g, VEC)
        place, inside = edge_tile(lead, cols, VEC)
        s, t = load_pair(pair, lead, place, inside, VEC, ALIGNED_S, ALIGNED_T)
        f, first, g = PAIR(s, t)
        if grad is not None:
            store_rows(grad, frame, lead, place, inside, of_g * g, VEC)
        value = sum_of(f_sums, f)
        if FIRST:
            value = (value.to(tl.float64) + sum_of(firsts, first.to(tl.float64))).to(tl.float32)
    elif grad is not None:
        write_zeros(grad, frame, cols, VEC, BLOCK)
    store_value(row, rows, weights, weight, scale * value, loss, term)
