"""A row's largest logit and sum of exponentials in one reading: what softmax and both terms of the row loss begin with.

A row is (tensor, where it begins, factor, cap): the last two, and its FORM, are those of transforms.py. Online: each
thread keeps a maximum and a sum of its own over whole groups, so that the loop has neither barriers nor shuffles, and
rescales the sum once a group. It knows nothing of divergences or weights. Next: rows.py, softmax.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distil_fast.kernels.maths import LOG2E, LOWEST
from distil_fast.kernels.tiles import at, edge_tile, lead_of, whole_tile, whole_tiles
from distil_fast.kernels.transforms import LOGARITHM, transformed


@triton.jit
def plain_row(logits, start):
    """Of FORM PLAIN."""
    return logits, start, 1.0, 0.0


@triton.jit
def load_entries(row, lead, place, inside, FORM: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor's entries in float32; outside the row, what becomes a logit of -inf."""
    values, start, _, _ = row
    nothing = 0.0 if FORM == LOGARITHM else float("-inf")
    return tl.load(at(values, start, lead, place, VEC, ALIGNED), mask=inside, other=nothing).to(tl.float32)


@triton.jit
def load_logits(row, lead, place, inside, FORM: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Logits in float32; -inf outside the row, which every sum of exponentials leaves as it is."""
    _, _, factor, cap = row
    return transformed(load_entries(row, lead, place, inside, FORM, VEC, ALIGNED), factor, cap, FORM)


@triton.jit
def load_logit(row, column, FORM: tl.constexpr):
    """One logit."""
    values, start, factor, cap = row
    return transformed(tl.load(values + start + column).to(tl.float32), factor, cap, FORM)


@triton.jit
def add_tile(x, m, z, k):
    """A tile [groups, VEC] into the running maximum and sum of exp2(k x) of each group."""
    top = tl.maximum(m, tl.max(x, axis=1))
    z = z * tl.exp2((m - top) * k) + tl.sum(tl.exp2((x - top[:, None]) * k), axis=1)
    return top, z


@triton.jit
def merge(m, z, edge_m, edge_z, k):
    """All groups' maxima and sums as one."""
    top = tl.maximum(tl.max(m, axis=0), tl.max(edge_m, axis=0))
    total = tl.sum(z * tl.exp2((m - top) * k), axis=0) + tl.sum(edge_z * tl.exp2((edge_m - top) * k), axis=0)
    return top, total


@triton.jit
def something(z):
    """A row without a finite logit has no distribution: its sum of exponentials is nan."""
    return tl.where(z == 0.0, float("nan"), z)


@triton.jit
def exponential_sum(row, cols, k, FORM: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """The row's largest logit, and the sum of exp2(k (logits - largest))."""
    lead = lead_of(row[1], VEC)
    m = tl.full((BLOCK // VEC,), LOWEST, tl.float32)
    z = tl.zeros((BLOCK // VEC,), tl.float32)
    for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
        place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
        m, z = add_tile(load_logits(row, lead, place, inside, FORM, VEC, True), m, z, k)
    place, inside = edge_tile(lead, cols, VEC)
    x = load_logits(row, lead, place, inside, FORM, VEC, True)
    edge_m, edge_z = add_tile(x, tl.full((2,), LOWEST, tl.float32), tl.zeros((2,), tl.float32), k)
    top, total = merge(m, z, edge_m, edge_z, k)
    return top, something(total)


# How the exponentials at temperature 1, of the hard term, follow from those at T: the same ones (T = 1, or there is no
# soft term), their squares (T = 2), or computed anew.
SAME = tl.constexpr(0)
SQUARE = tl.constexpr(1)
OWN = tl.constexpr(2)


@triton.jit
def hard_exponentials(e, shifted, kind):
    """exp(shifted), from e = exp(shifted / T). `kind` is one for the row: the branch saves the exponentials."""
    if kind == OWN:
        h = tl.exp2(shifted * LOG2E)
    else:
        h = tl.where(kind == SQUARE, e * e, e)
    return h


@triton.jit
def add_hard_tile(x, is_label, m, z, rest, k, kind):
    """As add_tile; besides, the sum of exp(x) over all columns but the label."""
    top = tl.maximum(m, tl.max(x, axis=1))
    shifted = x - top[:, None]
    e = tl.exp2(shifted * k)
    h = hard_exponentials(e, shifted, kind)
    z = z * tl.exp2((m - top) * k) + tl.sum(e, axis=1)
    rest = rest * tl.exp2((m - top) * LOG2E) + tl.sum(tl.where(is_label, 0.0, h), axis=1)
    return top, z, rest


@triton.jit
def anchor_of(row, FORM: tl.constexpr):
    """What logits are summed relative to: the first. It keeps the mean of logits with a common offset exact."""
    anchor = load_logit(row, 0, FORM)
    return tl.where(tl.abs(anchor) < float("inf"), anchor, 0.0)


@triton.jit
def merge_rest(rest, m, edge_rest, edge_m, top):
    """As merge, of sums at temperature 1 relative to a maximum known."""
    of_edge = tl.sum(edge_rest * tl.exp2((edge_m - top) * LOG2E), axis=0)
    return tl.sum(rest * tl.exp2((m - top) * LOG2E), axis=0) + of_edge


@triton.jit
def hard_sums(row, cols, label, k, kind, FORM: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """As exponential_sum; besides, relative to the largest logit, at temperature 1: the sum of the exponentials of all
    columns but the label, so that 1 - p of a sure model keeps its digits, and the mean logit (for label smoothing)."""
    lead = lead_of(row[1], VEC)
    anchor = anchor_of(row, FORM)
    m = tl.full((BLOCK // VEC,), LOWEST, tl.float32)
    z = tl.zeros((BLOCK // VEC,), tl.float32)
    rest = tl.zeros((BLOCK // VEC,), tl.float32)
    total = tl.zeros((BLOCK // VEC,), tl.float32)
    for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
        place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
        x = load_logits(row, lead, place, inside, FORM, VEC, True)
        total += tl.sum(tl.where(inside, x - anchor, 0.0), axis=1)
        m, z, rest = add_hard_tile(x, place == label + lead, m, z, rest, k, kind)
    place, inside = edge_tile(lead, cols, VEC)
    x = load_logits(row, lead, place, inside, FORM, VEC, True)
    none = tl.zeros((2,), tl.float32)
    edge_total = tl.sum(tl.where(inside, x - anchor, 0.0), axis=1)
    edge_m, edge_z, edge_rest = add_hard_tile(
        x, place == label + lead, tl.full((2,), LOWEST, tl.float32), none, none, k, kind
    )
    top, all_z = merge(m, z, edge_m, edge_z, k)
    mean = (tl.sum(total, axis=0) + tl.sum(edge_total, axis=0)) / cols + (anchor - top)
    return top, something(all_z), merge_rest(rest, m, edge_rest, edge_m, top), mean
