"""The row kernel: soft term by any divergence, hard term, and the gradient of both, one program a row, three sweeps.

The first sums exponentials, the second f and g, the third writes the gradient; the later two find the row in L2.
(A divergence whose g is taken relative to D has one sweep more, for its estimate.) Weights come from prologue.py, the
row's values go to reduction.py. It knows no formula of a divergence. Next: sums.py; docs/math.md for the derivation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distil_fast.kernels.maths import LOG2E, log1p, times
from distil_fast.kernels.prologue import scalar, weighted
from distil_fast.kernels.soft import compare, distance, divergence_sums, mean_difference
from distil_fast.kernels.sums import OWN, SAME, SQUARE, exponential_sum, hard_exponentials, hard_sums, load_logits
from distil_fast.kernels.tiles import edge_tile, lead_of, row_start, store_rows, whole_tile, whole_tiles, write_zeros


@triton.jit
def cross_entropy(label_logit, ref, rest, mean, smoothing):
    """The hard term's value, and the sum of all exponentials, from that of all but the label's."""
    shifted = label_logit - ref
    own = tl.exp2(shifted * LOG2E)
    z = rest + own
    nll = tl.where(own > rest, log1p(rest / own), tl.log(z) - shifted)
    smoothed = (1.0 - smoothing) * nll + smoothing * (tl.log(z) - mean)
    return tl.where(smoothing == 0.0, nll, smoothed), z


@triton.jit
def hard_term(
    student, start, cols, label_at, weight, temperature, smoothing, VEC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The student's largest logit and sum at T, the hard term's value, and what its gradient needs. A row without a
    label (weight 0) has no value, and its gradient will weigh 0."""
    label = tl.full((), -1, tl.int32)
    kind = tl.full((), SAME, tl.int32)
    if weight != 0.0:
        label = tl.load(label_at).to(tl.int32)
        kind = tl.where(temperature == 1.0, SAME, tl.where(temperature == 2.0, SQUARE, OWN))
    label_logit = tl.load(student + start + tl.maximum(label, 0)).to(tl.float32)
    k = (1.0 / temperature) * LOG2E
    ref, z_t, rest, mean = hard_sums(student, start, cols, label, k, kind, VEC, BLOCK)
    entropy, z = cross_entropy(label_logit, ref, rest, mean, smoothing)
    return ref, z_t, tl.where(weight == 0.0, 0.0, entropy), (label, kind, rest, z, cols)


@triton.jit
def gradient_tile(
    rows, lead, place, inside, models, soft, hard, DIVERGENCE: tl.constexpr, EXACT: tl.constexpr, SOFT: tl.constexpr,
    HARD: tl.constexpr, VEC: tl.constexpr, ALIGNED_S: tl.constexpr, ALIGNED_T: tl.constexpr,
):  # fmt: skip
    """of_g (g - q sum g) + of_h exp(s) + constant. The projection comes first: where g is a multiple of q, nothing is
    left of it. At the label, softmax - 1 is taken as minus the others' part."""
    student, s_start, teacher, t_start = rows
    ref_s, _, _, _, _, _, inverse_t = models
    if SOFT:
        of_g, g_sum, parameter, centre = soft
        used = tl.where(of_g != 0.0, 1, 0) == 1
        s = load_logits(student, s_start, lead, place, inside, VEC, ALIGNED_S)
        t = load_logits(teacher, t_start, lead, place, inside & used, VEC, ALIGNED_T)
        _, g, q, _ = compare(s, t, models, parameter, centre, DIVERGENCE, EXACT)
        x = tl.where(used, of_g * (g - q * g_sum), 0.0)
    else:
        s = load_logits(student, s_start, lead, place, inside, VEC, ALIGNED_S)
        x = tl.zeros(s.shape, tl.float32)
    if HARD:
        weight, smoothing, found = hard
        label, kind, rest, z, cols = found
        of_h, at_label, constant = weight / z, weight * (smoothing - rest / z), -weight * smoothing / cols
        shifted = s - ref_s
        h = hard_exponentials(tl.exp2(shifted * (inverse_t * LOG2E)), shifted, kind)
        x += tl.where(place == label + lead, at_label, of_h * h) + constant
    return x


@triton.jit
def write_gradient(
    grad, g_start, rows, cols, models, soft, hard, DIVERGENCE: tl.constexpr, EXACT: tl.constexpr, SOFT: tl.constexpr,
    HARD: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED_S: tl.constexpr, ALIGNED_T: tl.constexpr,
):  # fmt: skip
    """In place (grad is the student's row), each element is read before it is written, and by no other program."""
    lead = lead_of(g_start, VEC)
    for i in range(whole_tiles(lead, cols, VEC, BLOCK)):
        place, inside = whole_tile(i, lead, cols, VEC, BLOCK)
        x = gradient_tile(
            rows, lead, place, inside, models, soft, hard, DIVERGENCE, EXACT, SOFT, HARD, VEC, ALIGNED_S, ALIGNED_T
        )
        store_rows(grad, g_start, lead, place, inside, x, VEC)
    place, inside = edge_tile(lead, cols, VEC)
    x = gradient_tile(
        rows, lead, place, inside, models, soft, hard, DIVERGENCE, EXACT, SOFT, HARD, VEC, ALIGNED_S, ALIGNED_T
    )
    store_rows(grad, g_start, lead, place, inside, x, VEC)


@triton.jit(
    do_not_specialize=[
        "s_start", "s_outer", "s_row", "t_start", "t_outer", "t_row", "g_start", "g_outer", "g_row", "inner", "cols",
        "rows", "soft_weight", "hard_weight", "smoothing", "parameter",
    ],
    do_not_specialize_on_alignment=["labels", "soft_weight", "hard_weight", "loss", "soft", "hard"],
)  # fmt: skip
def row_kernel(
    student, s_start, s_outer, s_row, teacher, t_start, t_outer, t_row, grad, g_start, g_outer, g_row, inner, cols,
    labels, weights, rows, unit, soft_weight, hard_weight, smoothing, parameter, loss, soft, hard,
    DIVERGENCE: tl.constexpr, CENTRED: tl.constexpr, EXACT: tl.constexpr, SOFT: tl.constexpr, HARD: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED_S: tl.constexpr, ALIGNED_T: tl.constexpr,
):  # fmt: skip
    """Row `program_id` of [rows / inner, inner, cols]: its shares of the terms to soft and hard (and, where nothing is
    reduced, to loss), and its gradient in units of `unit` to grad, which may be student, or None."""
    row, rows = tl.program_id(0).to(tl.int64), rows.to(tl.int64)
    soft_weight_, hard_weight_ = tl.load(weights + row), tl.load(weights + rows + row)
    soft_share, hard_share = tl.load(weights + 2 * rows + row), tl.load(weights + 3 * rows + row)
    temperature = tl.load(weights + 4 * rows + row)
    smoothing, parameter = scalar(smoothing), scalar(parameter)
    zero = tl.full((), 0.0, tl.float32)
    soft_value, hard_value = zero, zero
    s_at = row_start(row, inner, s_start, s_outer, s_row)
    if (soft_weight_ != 0.0) | (hard_weight_ != 0.0):
        t_at = row_start(row, inner, t_start, t_outer, t_row)
        inverse_t = 1.0 / temperature
        if HARD:
            ref_s, z_s, hard_value, hard_terms = hard_term(
                student, s_at, cols, labels + row, hard_weight_, temperature, smoothing, VEC, BLOCK
            )
        else:
            ref_s, z_s = exponential_sum(student, s_at, cols, inverse_t * LOG2E, VEC, BLOCK)
            hard_terms = ()
        ref_t, z_t, shift, rho, centre, g_sum = zero, zero + 1.0, zero, zero, zero, zero
        pair = (student, s_at, teacher, t_at)
        frame = s_at
        if grad is not None:
            frame = row_start(row, inner, g_start, g_outer, g_row)
        if SOFT:
            if soft_weight_ != 0.0:
                ref_t, z_t = exponential_sum(teacher, t_at, cols, inverse_t * LOG2E, VEC, BLOCK)
                shift, rho = distance(ref_s, ref_t, z_s, z_t, inverse_t)
                models = (ref_s, ref_t, z_s, z_t, shift, rho, inverse_t)
                lead = lead_of(frame, VEC)
                if CENTRED:
                    centre = mean_difference(
                        pair, lead, cols, models, DIVERGENCE, EXACT, VEC, BLOCK, ALIGNED_S, ALIGNED_T
                    )
                soft_value, g_sum = divergence_sums(
                    pair, lead, cols, models, parameter, centre, DIVERGENCE, EXACT, VEC, BLOCK, ALIGNED_S, ALIGNED_T
                )
        if grad is not None:
            tl.debug_barrier()  # in place: every warp has read what the lines above read
            models = (ref_s, ref_t, z_s, z_t, shift, rho, inverse_t)
            scale = 1.0
            if unit is not None:
                scale = 1.0 / tl.load(unit)
            soft_terms = (soft_weight_ * scale * inverse_t, g_sum, parameter, centre)
            write_gradient(
                grad, frame, pair, cols, models, soft_terms, (hard_weight_ * scale, smoothing, hard_terms), DIVERGENCE,
                EXACT, SOFT, HARD, VEC, BLOCK, ALIGNED_S, ALIGNED_T,
            )  # fmt: skip
    elif grad is not None:
        write_zeros(grad, row_start(row, inner, g_start, g_outer, g_row), cols, VEC, BLOCK)
    soft_part, hard_part = times(soft_share, soft_value), times(hard_share, hard_value)
    tl.store(soft + row, soft_part)
    tl.store(hard + row, hard_part)
    if loss is not None:
        tl.store(loss + row, weighted(soft_weight, soft_part) + weighted(hard_weight, hard_part))
