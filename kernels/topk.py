"""The row kernel's sibling for a teacher of k columns a row: one sweep for the student's sums, one for the gradient.

The first sums the exponentials outside the entries, never the whole less the entries', which would leave no digits of
a small tail. The k outcomes and their bucket are computed once, their logarithms in double precision, in a vector of K;
the second sweep writes what the columns outside have, and the entries are written over it. Before it: prologue.py,
order.py. It knows no formula of a divergence. Next: docs/math.md, "A top-k teacher".
"""

from __future__ import annotations

import triton
import triton.language as tl

from distil_fast.kernels.maths import LOG2E, LOWEST, exp, times
from distil_fast.kernels.order import load_ids
from distil_fast.kernels.prologue import scalar, weighted
from distil_fast.kernels.rows import cross_entropy, hard_gradient
from distil_fast.kernels.sums import (
    OWN,
    SAME,
    SQUARE,
    add_hard_tile,
    add_tile,
    anchor_of,
    load_entries,
    load_logit,
    load_logits,
    merge,
    merge_rest,
    something,
)
from distil_fast.kernels.tiles import edge_tile, lead_of, row_start, store_rows, whole_tile, whole_tiles, write_zeros
from distil_fast.kernels.transforms import PLAIN, slope, transformed

BUCKET = tl.constexpr(0)
RENORMALISE = tl.constexpr(1)
IGNORE = tl.constexpr(2)
NEGLIGIBLE = tl.constexpr(1e-2)  # of mass missing to 1 where the student has none outside: rounding, no outcome


@triton.jit
def add_outside(x, is_label, m, z, rest, k, kind, HARD: tl.constexpr):
    if HARD:
        m, z, rest = add_hard_tile(x, is_label, m, z, rest, k, kind)
    else:
        m, z = add_tile(x, m, z, k)
    return m, z, rest


@triton.jit
def outside_sums(
    student, cols, ordered, columns, label, k, kind, HARD: tl.constexpr, FORM: tl.constexpr, VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Over the columns that are no entries: the largest logit, and relative to it the sums of exponentials at T, and at
    1 but for the label; over all columns the mean logit less an anchor, and that. Each tile skips its entries, which
    come in order."""
    lead = lead_of(student[1], VEC)
    anchor = anchor_of(student, FORM)
    m = tl.full((BLOCK // VEC,), LOWEST, tl.float32)
    z = tl.zeros((BLOCK // VEC,), tl.float32)
    rest = tl.zeros((BLOCK // VEC,), tl.float32)
    total = tl.zeros((BLOCK // VEC,), tl.float32)
    entry = tl.load(ordered)
    for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
        place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
        x = load_logits(student, lead, place, inside, FORM, VEC, True)
        if HARD:
            total += tl.sum(tl.where(inside, x - anchor, 0.0), axis=1)
        while entry < (i + 1) * BLOCK - lead:
            x = tl.where(place == entry + lead, float("-inf"), x)
            ordered += 1
            entry = tl.load(ordered)
        m, z, rest = add_outside(x, place == label + lead, m, z, rest, k, kind, HARD)
    place, inside = edge_tile(lead, cols, VEC)
    x = load_logits(student, lead, place, inside, FORM, VEC, True)
    edge_total = tl.sum(tl.where(inside, x - anchor, 0.0), axis=1)
    entries = tl.sum(((place - lead)[:, :, None] == columns[None, None, :]).to(tl.int32), axis=2)
    x = tl.where(entries > 0, float("-inf"), x)
    none = tl.zeros((2,), tl.float32)
    edge_m, edge_z, edge_rest = add_outside(
        x, place == label + lead, tl.full((2,), LOWEST, tl.float32), none, none, k, kind, HARD
    )
    top, all_z = merge(m, z, edge_m, edge_z, k)
    mean = (tl.sum(total, axis=0) + tl.sum(edge_total, axis=0)) / cols
    return top, all_z, merge_rest(rest, m, edge_rest, edge_m, top), mean, anchor


@triton.jit
def all_sums(
    student, cols, ordered, entries, labels, row, weight, temperature, how, HARD: tl.constexpr, FORM: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums outside, and with the entries' exponentials the hard term: the largest logit outside, the sum at T, the
    largest of all, the hard term's value, and what its gradient needs."""
    column, valid, s = entries
    k = (1.0 / temperature) * LOG2E
    label = tl.full((), -1, tl.int32)
    kind = tl.full((), SAME, tl.int32)
    if HARD:
        if weight != 0.0:
            label = tl.load(labels + row).to(tl.int32)
            kind = tl.where(temperature == 1.0, SAME, tl.where(temperature == 2.0, SQUARE, OWN))
        label_logit = load_logit(student, tl.maximum(label, 0), FORM)
    top, z, rest, mean, anchor = outside_sums(student, cols, ordered, column, label, k, kind, HARD, FORM, VEC, BLOCK)
    ref = tl.maximum(top, tl.max(tl.where(valid, s, LOWEST), axis=0))
    if HARD:
        others = tl.where(valid & (column != label), exp(s - ref), 0.0)
        rest = rest * exp(top - ref) + tl.sum(others, axis=0)
        entropy, own, pull = cross_entropy(label_logit, ref, rest, mean + (anchor - ref), how[0], how[1])
        value = tl.where(weight == 0.0, 0.0, entropy)
        terms = (label, tl.full((), SAME, tl.int32), rest, own, pull, cols)
    else:
        value, terms = tl.full((), 0.0, tl.float32), ()
    return top, z, ref, value, terms


@triton.jit
def impossible_or(p, q, r):
    """r in float; 0 for an outcome that is impossible in both models."""
    return tl.where((p == 0.0) & (q == 0.0), 0.0, r.to(tl.float32))


@triton.jit
def bucket(p_sum, z_out, log_q, q):
    """The bucket's p, q and r: the mass that is missing to 1, and the student's outside."""
    missing = 1.0 - p_sum
    p = tl.where((missing > 0.0) & ~((z_out == 0.0) & (missing <= NEGLIGIBLE)), missing, 0.0)
    p_tail = p.to(tl.float32)
    return p_tail, q, impossible_or(p_tail, q, log_q - tl.log(p))


@triton.jit
def outcomes(s, log_p, valid, outside, temperature, TAIL: tl.constexpr):
    """p, q, r of the entries, and of the bucket; the student's mass on the entries and outside, the sum of p."""
    inverse_t = 1.0 / temperature
    top, z_out = outside
    s_ref = tl.max(tl.where(valid, s, LOWEST), axis=0)
    p_ref = tl.full((), 0.0, tl.float64)
    if TAIL == RENORMALISE:
        p_ref = tl.max(tl.where(valid, log_p, LOWEST), axis=0)
        ref = s_ref
        z_tail = tl.full((), 0.0, tl.float32)
    else:
        ref = tl.maximum(s_ref, top)
        z_tail = z_out * tl.exp2((top - ref) * inverse_t * LOG2E)
    wide_t = temperature.to(tl.float64)
    apart = (s.to(tl.float64) - ref.to(tl.float64)) / wide_t
    e = tl.where(valid, tl.exp2((s - ref) * inverse_t * LOG2E), 0.0)
    e_p = tl.where(valid, tl.exp(log_p - p_ref), 0.0)
    z_ids = tl.sum(e, axis=0)
    z, z_p = something(z_ids + z_tail), tl.sum(e_p, axis=0)
    rho = tl.log(z.to(tl.float64))
    if TAIL == RENORMALISE:
        z_of_p = something(z_p)
    else:
        z_of_p = tl.full((), 1.0, tl.float64)
    p, q = tl.where(valid, (e_p / z_of_p).to(tl.float32), 0.0), tl.where(valid, e / z, 0.0)
    r = apart - (log_p - p_ref) - (rho - tl.log(z_of_p))
    log_q_tail = tl.log(z_out.to(tl.float64)) + (top.to(tl.float64) - ref.to(tl.float64)) / wide_t - rho
    tail = bucket(z_p, z_out, log_q_tail, z_tail / z)
    return (p, q, impossible_or(p, q, r)), tail, z_ids / z, z_tail / z, z_p


@triton.jit
def sum_of_two(entries, tail, TAIL: tl.constexpr):
    total = tl.sum(entries, axis=0)
    if TAIL == BUCKET:
        total += tail
    return total


@triton.jit
def soft_term(
    s, log_p, valid, outside, temperature, parameters, shift, DIVERGENCE: tl.constexpr, CENTRED: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """D; T times its gradient at each entry's logit, and outside, in units of an exponential there."""
    ids, tail, q_ids, q_tail, p_sum = outcomes(s, log_p, valid, outside, temperature, TAIL)
    p, q, r = ids
    p_t, q_t, r_t = tail
    centre = tl.full((), 0.0, tl.float32)
    if CENTRED:
        mean = sum_of_two(times(q, r), times(q_t, r_t), TAIL)
        centre = tl.where(tl.abs(mean) < float("inf"), mean, 0.0)
    f, g = DIVERGENCE(r, p, q, parameters[0], parameters[1], centre)
    f_t, g_t = DIVERGENCE(r_t, p_t, q_t, parameters[0], parameters[1], centre)
    value, of_q = sum_of_two(f, f_t, TAIL), sum_of_two(g, g_t, TAIL)
    if TAIL == BUCKET:  # what the functors add comes to nothing over a whole distribution alone
        value -= shift * (1.0 - p_sum - p_t).to(tl.float32)
        of_tail = g_t - q_t * of_q
    elif TAIL == IGNORE:
        added = shift - centre
        value -= shift * (q_ids - p_sum).to(tl.float32)
        of_tail = -q_tail * (of_q - added * q_ids)
        of_q += added * q_tail
    else:
        of_tail = tl.full((), 0.0, tl.float32)
    return value, g - q * of_q, tl.where(outside[1] == 0.0, 0.0, of_tail / outside[1])


@triton.jit
def outside_tile(
    student, lead, place, inside, top, k, of_tail, hard_ref, hard, HARD: tl.constexpr, FORM: tl.constexpr,
    VEC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile whose columns are no entries."""
    entries = load_entries(student, lead, place, inside, FORM, VEC, ALIGNED)
    s = transformed(entries, student[2], student[3], FORM)
    x = times(of_tail, tl.exp2((s - top) * k))
    if HARD:
        x += hard_gradient(s, place, lead, hard_ref, LOG2E, hard)
    if FORM != PLAIN:
        x *= slope(entries, student[2], student[3], FORM)
    return x


@triton.jit
def write_outside(
    grad, g_start, student, cols, top, k, of_tail, hard_ref, hard, HARD: tl.constexpr, FORM: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """In place (grad is the student's row), each element is read before it is written, and by no other program."""
    lead = lead_of(g_start, VEC)
    for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
        place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
        x = outside_tile(student, lead, place, inside, top, k, of_tail, hard_ref, hard, HARD, FORM, VEC, ALIGNED)
        store_rows(grad, g_start, lead, place, inside, x, VEC)
    place, inside = edge_tile(lead, cols, VEC)
    x = outside_tile(student, lead, place, inside, top, k, of_tail, hard_ref, hard, HARD, FORM, VEC, ALIGNED)
    store_rows(grad, g_start, lead, place, inside, x, VEC)


@triton.jit(
    do_not_specialize=[
        "s_start", "s_outer", "s_row", "g_start", "g_outer", "g_row", "inner", "cols", "s_factor", "s_cap", "k", "rows",
        "soft_weight", "hard_weight", "smoothing", "z_loss", "first", "second", "shift",
    ],
    do_not_specialize_on_alignment=[
        "ids", "log_probs", "labels", "soft_weight", "hard_weight", "loss", "soft", "hard",
    ],
)  # fmt: skip
def topk_kernel(
    student, s_start, s_outer, s_row, grad, g_start, g_outer, g_row, inner, cols, s_factor, s_cap, ids, log_probs, k,
    ordered, faults, labels, weights, rows, unit, soft_weight, hard_weight, smoothing, z_loss, first, second, shift,
    loss, soft, hard,
    DIVERGENCE: tl.constexpr, CENTRED: tl.constexpr, TAIL: tl.constexpr, HARD: tl.constexpr, FORM: tl.constexpr,
    K: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Row `program_id`, as row_kernel has it. `ordered` and `faults` come from order_kernel."""
    row, rows = tl.program_id(0).to(tl.int64), rows.to(tl.int64)
    soft_weight_, hard_weight_ = tl.load(weights + row), tl.load(weights + rows + row)
    soft_share, hard_share = tl.load(weights + 2 * rows + row), tl.load(weights + 3 * rows + row)
    temperature = tl.load(weights + 4 * rows + row)
    parameters, how = (scalar(first), scalar(second)), (scalar(smoothing), scalar(z_loss))
    at_fault = tl.load(faults + row) != 0.0
    zero = tl.full((), 0.0, tl.float32)
    soft_value, hard_value = zero, zero
    used = ((soft_weight_ != 0.0) | (hard_weight_ != 0.0)) & ~at_fault
    if used:
        s_at = row_start(row, inner, s_start, s_outer, s_row)
        pair = (student, s_at, s_factor, s_cap)
        inverse_t = 1.0 / temperature
        i = tl.arange(0, K)
        _, valid, column = load_ids(ids, row * k, i, tl.where(soft_weight_ != 0.0, k, 0), cols)
        log_p = tl.load(log_probs + row * k + i, mask=valid, other=0.0).to(tl.float32).to(tl.float64)
        entries = tl.load(student + s_at + column, mask=valid, other=0.0).to(tl.float32)
        s = transformed(entries, s_factor, s_cap, FORM)
        top, z_out, ref = zero, zero, zero
        hard_terms = ()
        if HARD or TAIL != RENORMALISE:
            top, z_out, ref, hard_value, hard_terms = all_sums(
                pair, cols, ordered + row * (K + 1), (column, valid, s), labels, row, hard_weight_, temperature, how,
                HARD, FORM, VEC, BLOCK,
            )  # fmt: skip
        soft_value, of_entries, of_tail = soft_term(
            s, log_p, valid, (top, z_out), temperature, parameters, scalar(shift), DIVERGENCE, CENTRED, TAIL
        )
        if grad is not None:
            tl.debug_barrier()  # in place: every warp has read what the lines above read
            g_at = row_start(row, inner, g_start, g_outer, g_row)
            scale = 1.0
            if unit is not None:
                scale = 1.0 / tl.load(unit)
            of_soft = soft_weight_ * scale * inverse_t
            hard_terms = (hard_weight_ * scale, how, hard_terms)
            if HARD or TAIL != RENORMALISE:
                write_outside(
                    grad, g_at, pair, cols, top, inverse_t * LOG2E, times(of_soft, of_tail), ref, hard_terms, HARD,
                    FORM, VEC, BLOCK, ALIGNED,
                )  # fmt: skip
            else:
                write_zeros(grad, g_at, cols, VEC, BLOCK)
            x = times(of_soft, of_entries)
            if HARD:
                x += hard_gradient(s, column, 0, ref, LOG2E, hard_terms)
            if FORM != PLAIN:
                x *= slope(entries, s_factor, s_cap, FORM)
            tl.debug_barrier()  # the columns of entries are written a second time
            tl.store(grad + g_at + column, x.to(grad.dtype.element_ty), mask=valid)
    elif grad is not None:
        write_zeros(grad, row_start(row, inner, g_start, g_outer, g_row), cols, VEC, BLOCK)
    soft_part, hard_part = times(soft_share, soft_value), times(hard_share, hard_value)
    soft_part = tl.where(at_fault, float("nan"), soft_part)
    hard_part = tl.where(at_fault & (scalar(hard_weight) != 0.0), float("nan"), hard_part)
    tl.store(soft + row, soft_part)
    tl.store(hard + row, hard_part)
    if loss is not None:
        tl.store(loss + row, weighted(soft_weight, soft_part) + weighted(hard_weight, hard_part))
