"""The row kernel: soft term by any divergence, hard term, and the gradient of both, one program a row, three sweeps.

The first sums exponentials, the second f and g, the third writes the gradient; the later two find the row in L2.
(A divergence whose g is taken relative to D has one sweep more, for its estimate.) Weights come from prologue.py, the
row's values go to reduction.py. It knows no formula of a divergence. Next: sums.py; docs/math.md for the derivation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distil_fast.kernels.faults import NOTHING, TEACHER_MASS, above_one, record_row
from distil_fast.kernels.maths import LOG2E, exp, log1p, times
from distil_fast.kernels.prologue import scalar, weighted
from distil_fast.kernels.soft import compare, distance, divergence_sums, mean_difference
from distil_fast.kernels.sums import (
    OWN,
    SAME,
    SQUARE,
    exponential_sum,
    hard_exponentials,
    hard_sums,
    load_entries,
    load_logit,
    load_logits,
)
from distil_fast.kernels.tiles import edge_tile, lead_of, row_start, store_rows, whole_tile, whole_tiles, write_zeros
from distil_fast.kernels.transforms import PLAIN, slope, transformed


@triton.jit
def cross_entropy(label_logit, ref, rest, mean, smoothing, z_loss):
    """The hard term's value from the sum of all exponentials but the label's, the label's, and how the z-loss pulls:
    z_loss times the derivative of lse^2."""
    shifted = label_logit - ref
    own = exp(shifted)
    log_z = tl.log(rest + own)
    nll = tl.where(own > rest, log1p(rest / own), log_z - shifted)
    smoothed = (1.0 - smoothing) * nll + smoothing * (log_z - mean)
    value = tl.where(smoothing == 0.0, nll, smoothed)
    lse = ref + log_z
    return value + times(z_loss, lse * lse), own, times(z_loss, 2.0 * lse)


@triton.jit
def hard_term(
    student, cols, label_at, weight, temperature, how, FORM: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr
):
    """The student's largest logit and sum at T, the hard term's value, and what its gradient needs. A row without a
    label (weight 0) has no value, and its gradient will weigh 0."""
    label = tl.full((), -1, tl.int32)
    kind = tl.full((), SAME, tl.int32)
    if weight != 0.0:
        label = tl.load(label_at).to(tl.int32)
        kind = tl.where(temperature == 1.0, SAME, tl.where(temperature == 2.0, SQUARE, OWN))
    k = (1.0 / temperature) * LOG2E
    ref, z_t, rest, mean = hard_sums(student, cols, label, k, kind, FORM, VEC, BLOCK)
    label_logit = load_logit(student, tl.maximum(label, 0), FORM)
    value, own, pull = cross_entropy(label_logit, ref, rest, mean, how[0], how[1])
    return ref, z_t, tl.where(weight == 0.0, 0.0, value), (label, kind, rest, own, pull, cols)


@triton.jit
def hard_gradient(s, place, lead, ref_s, k, hard):
    """of_h exp(s) + constant; at the label, softmax - 1 is taken as minus the others' part."""
    weight, how, found = hard
    label, kind, rest, own, pull, cols = found
    z = rest + own
    of_h = weight * (1.0 + pull) / z
    at_label = weight * (how[0] - (rest - pull * own) / z)
    shifted = s - ref_s
    h = hard_exponentials(tl.exp2(shifted * k), shifted, kind)
    return tl.where(place == label + lead, at_label, of_h * h) - weight * how[0] / cols


@triton.jit
def gradient_tile(
    rows, lead, place, inside, models, soft, hard, DIVERGENCE: tl.constexpr, EXACT: tl.constexpr, FORM_S: tl.constexpr,
    FORM_T: tl.constexpr, SOFT: tl.constexpr, HARD: tl.constexpr, VEC: tl.constexpr, ALIGNED_S: tl.constexpr,
    ALIGNED_T: tl.constexpr,
):  # fmt: skip
    """of_g (g - q sum g) and the hard term's part, times the student's slope. The projection comes first: where g is a
    multiple of q, nothing is left of it."""
    student, teacher = rows
    ref_s, _, _, _, _, _, inverse_t = models
    _, _, factor, cap = student
    entries = load_entries(student, lead, place, inside, FORM_S, VEC, ALIGNED_S)
    s = transformed(entries, factor, cap, FORM_S)
    if SOFT:
        of_g, g_sum, parameters, centre = soft
        used = tl.where(of_g != 0.0, 1, 0) == 1
        t = load_logits(teacher, lead, place, inside & used, FORM_T, VEC, ALIGNED_T)
        _, g, q, _ = compare(s, t, models, parameters, centre, DIVERGENCE, EXACT)
        x = tl.where(used, of_g * (g - q * g_sum), 0.0)
    else:
        x = tl.zeros(s.shape, tl.float32)
    if HARD:
        x += hard_gradient(s, place, lead, ref_s, inverse_t * LOG2E, hard)
    if FORM_S != PLAIN:
        x *= slope(entries, factor, cap, FORM_S)
    return x


@triton.jit
def write_gradient(
    grad, g_start, rows, cols, models, soft, hard, DIVERGENCE: tl.constexpr, EXACT: tl.constexpr, FORM_S: tl.constexpr,
    FORM_T: tl.constexpr, SOFT: tl.constexpr, HARD: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNED_S: tl.constexpr, ALIGNED_T: tl.constexpr,
):  # fmt: skip
    """In place (grad is the student's row), each element is read before it is written, and by no other program."""
    lead = lead_of(g_start, VEC)
    for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
        place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
        x = gradient_tile(
            rows, lead, place, inside, models, soft, hard, DIVERGENCE, EXACT, FORM_S, FORM_T, SOFT, HARD, VEC,
            ALIGNED_S, ALIGNED_T,
        )  # fmt: skip
        store_rows(grad, g_start, lead, place, inside, x, VEC)
    place, inside = edge_tile(lead, cols, VEC)
    x = gradient_tile(
        rows, lead, place, inside, models, soft, hard, DIVERGENCE, EXACT, FORM_S, FORM_T, SOFT, HARD, VEC, ALIGNED_S,
        ALIGNED_T,
    )  # fmt: skip
    store_rows(grad, g_start, lead, place, inside, x, VEC)


@triton.jit(
    do_not_specialize=[
        "s_start", "s_outer", "s_row", "t_start", "t_outer", "t_row", "g_start", "g_outer", "g_row", "inner", "cols",
        "s_factor", "s_cap", "t_factor", "t_cap", "rows", "soft_weight", "hard_weight", "smoothing", "z_loss", "first",
        "second",
    ],
    do_not_specialize_on_alignment=["labels", "soft_weight", "hard_weight", "loss", "soft", "hard"],
)  # fmt: skip
def row_kernel(
    student, s_start, s_outer, s_row, teacher, t_start, t_outer, t_row, grad, g_start, g_outer, g_row, inner, cols,
    s_factor, s_cap, t_factor, t_cap, labels, weights, rows, unit, soft_weight, hard_weight, smoothing, z_loss, first,
    second, loss, soft, hard, faults,
    DIVERGENCE: tl.constexpr, CENTRED: tl.constexpr, EXACT: tl.constexpr, FORM_S: tl.constexpr, FORM_T: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED_S: tl.constexpr,
    ALIGNED_T: tl.constexpr,
):  # fmt: skip
    """Row `program_id` of [rows / inner, inner, cols]: its shares of the terms to soft and hard (and, where nothing is
    reduced, to loss), and its gradient in units of `unit` to grad, which may be student, or None. faults: where a
    teacher given by probabilities is recorded; None where it is given by logits."""
    row, rows = tl.program_id(0).to(tl.int64), rows.to(tl.int64)
    soft_weight_, hard_weight_ = tl.load(weights + row), tl.load(weights + rows + row)
    soft_share, hard_share = tl.load(weights + 2 * rows + row), tl.load(weights + 3 * rows + row)
    temperature = tl.load(weights + 4 * rows + row)
    parameters, how = (scalar(first), scalar(second)), (scalar(smoothing), scalar(z_loss))
    zero = tl.full((), 0.0, tl.float32)
    soft_value, hard_value, mass = zero, zero, zero
    s_at = row_start(row, inner, s_start, s_outer, s_row)
    if (soft_weight_ != 0.0) | (hard_weight_ != 0.0):
        of_t = t_factor
        if faults is not None:  # what is given at the temperature already is multiplied with it
            of_t = temperature
        t_at = row_start(row, inner, t_start, t_outer, t_row)
        pair = ((student, s_at, s_factor, s_cap), (teacher, t_at, of_t, t_cap))
        inverse_t = 1.0 / temperature
        if HARD:
            ref_s, z_s, hard_value, hard_terms = hard_term(
                pair[0], cols, labels + row, hard_weight_, temperature, how, FORM_S, VEC, BLOCK
            )
        else:
            ref_s, z_s = exponential_sum(pair[0], cols, inverse_t * LOG2E, FORM_S, VEC, BLOCK)
            hard_terms = ()
        ref_t, z_t, shift, rho, centre, g_sum = zero, zero + 1.0, zero, zero, zero, zero
        frame = s_at
        if grad is not None:
            frame = row_start(row, inner, g_start, g_outer, g_row)
        if SOFT:
            if soft_weight_ != 0.0:
                ref_t, z_t = exponential_sum(pair[1], cols, inverse_t * LOG2E, FORM_T, VEC, BLOCK)
                if faults is not None:
                    mass = z_t * exp(ref_t * inverse_t)
                shift, rho = distance(ref_s, ref_t, z_s, z_t, inverse_t)
                models = (ref_s, ref_t, z_s, z_t, shift, rho, inverse_t)
                lead = lead_of(frame, VEC)
                if CENTRED:
                    centre = mean_difference(
                        pair, lead, cols, models, DIVERGENCE, EXACT, FORM_S, FORM_T, VEC, BLOCK, ALIGNED_S, ALIGNED_T
                    )
                soft_value, g_sum = divergence_sums(
                    pair, lead, cols, models, parameters, centre, DIVERGENCE, EXACT, FORM_S, FORM_T, VEC, BLOCK,
                    ALIGNED_S, ALIGNED_T,
                )  # fmt: skip
        if grad is not None:
            tl.debug_barrier()  # in place: every warp has read what the lines above read
            models = (ref_s, ref_t, z_s, z_t, shift, rho, inverse_t)
            scale = 1.0
            if unit is not None:
                scale = 1.0 / tl.load(unit)
            soft_terms = (soft_weight_ * scale * inverse_t, g_sum, parameters, centre)
            hard_terms = (hard_weight_ * scale, how, hard_terms)
            at_fault = False
            if faults is not None:
                at_fault = above_one(mass, teacher)
            if at_fault:
                write_zeros(grad, frame, cols, VEC, BLOCK)
            else:
                write_gradient(
                    grad, frame, pair, cols, models, soft_terms, hard_terms, DIVERGENCE, EXACT, FORM_S, FORM_T, SOFT,
                    HARD, VEC, BLOCK, ALIGNED_S, ALIGNED_T,
                )  # fmt: skip
    elif grad is not None:
        write_zeros(grad, row_start(row, inner, g_start, g_outer, g_row), cols, VEC, BLOCK)
    soft_part, hard_part = times(soft_share, soft_value), times(hard_share, hard_value)
    if faults is not None:
        at_fault = above_one(mass, teacher)
        record_row(faults, row, rows, tl.where(at_fault, TEACHER_MASS, NOTHING), tl.where(at_fault, mass, 0.0))
        soft_part = tl.where(at_fault, float("nan"), soft_part)
        hard_part = tl.where(at_fault & (scalar(hard_weight) != 0.0), float("nan"), hard_part)
    tl.store(soft + row, soft_part)
    tl.store(hard + row, hard_part)
    if loss is not None:
        tl.store(loss + row, weighted(soft_weight, soft_part) + weighted(hard_weight, hard_part))
