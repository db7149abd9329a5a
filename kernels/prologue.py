"""What each row weighs: mask, labels, temperature, denominators and upstream gradients, in five numbers a row.

One program, two readings of the vectors, before any logit is read. The conventions are those of csrc/cpu/shares.h and
of RowCall::weigh in csrc/cpu/row_call.h: a row whose share is 0 is not used, and never read. A row at fault (a
label outside [0, V), a token's or class's weight that is negative or not finite, a temperature that is no number > 0)
weighs 0 and has a share of nan: nothing of it is read, its loss is nan, its gradient 0. Next: rows.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distil_fast.kernels.faults import CLASS_WEIGHT, LABEL, MASK, TEMPERATURE


@triton.jit
def scalar(x):
    """A number, or what a 0-d tensor holds, in float32."""
    value = tl.to_tensor(x)
    if value.dtype.is_ptr():
        value = tl.load(value)
    return value.to(tl.float32)


@triton.jit
def weighted(weight, value):
    """weight * value; a term of weight 0 adds nothing, not even nan."""
    w = scalar(weight)
    return tl.where(w == 0.0, 0.0, w * value)


@triton.jit
def share_scale(count, counted, MEAN: tl.constexpr):
    """1 / denominator of a mean, 0 where that is not > 0, else 1. A number below 0 says: as counted."""
    given = scalar(count)
    if not tl.to_tensor(count).dtype.is_ptr():
        given = tl.where(given < 0.0, counted, given)
    scale = 1.0
    if MEAN:
        scale = tl.where(given > 0.0, tl.div_rn(1.0, given), 0.0)
    return scale


@triton.jit
def unit_of(largest):
    """The power of two, 64 times below the least one that is not below the largest weight; 1 where there is none.

    From the bits of the float, exactly; not below 2^-126, where floats lose digits.
    """
    bits = largest.to(tl.int32, bitcast=True)
    exponent = tl.maximum((bits >> 23) + tl.where((bits & 0x7FFFFF) != 0, 1, 0) - 6, 1)
    unit = (exponent << 23).to(tl.float32, bitcast=True)
    return tl.where((largest > 0.0) & (largest < float("inf")), unit, 1.0)


@triton.jit
def load_weight(weights, place, inside):
    """(weight, whether it is one), 1 where there are no weights; one that is none counts nothing."""
    weight = tl.where(inside, 1.0, 0.0)
    valid = inside
    if weights is not None:
        weight = tl.load(weights + place, mask=inside, other=0).to(tl.float32)
        valid = inside & (weight >= 0.0) & (weight < float("inf"))
        weight = tl.where(valid, weight, 0.0)
    return weight, valid


@triton.jit
def load_label(labels, class_weights, row, inside, ignore_index, cols):
    """(what the row counts in the hard term, its label, whether that is at fault, whether its class's weight is)"""
    label = tl.load(labels + row, mask=inside, other=0).to(tl.int64)
    given = inside & (label != ignore_index)
    bad = given & ((label < 0) | (label >= cols))
    weight, valid = load_weight(class_weights, label, given & ~bad)
    return weight, label, bad, given & ~bad & ~valid


@triton.jit
def load_temperature(temperature, row, inside, PER_ROW: tl.constexpr):
    if PER_ROW:
        t = tl.load(temperature + row, mask=inside, other=1.0).to(tl.float32)
    else:
        t = tl.zeros(row.shape, tl.float32) + scalar(temperature)
    return t


@triton.jit
def valid_temperature(t):
    """Bounds that keep 1 / T, T^2 and their products with a share inside a float."""
    return (t >= 1e-15) & (t <= 1e15)


@triton.jit
def soft_part(share, temperature, row, inside, PER_ROW: tl.constexpr, T_SQUARED: tl.constexpr):
    """(share with T^2, temperature, whether that is at fault); of a row that is not used, the temperature is 1."""
    given = load_temperature(temperature, row, inside, PER_ROW)
    bad = (share != 0.0) & ~valid_temperature(given)
    t = tl.where((share != 0.0) & ~bad, given, 1.0)
    if T_SQUARED:
        share *= t * t
    return share, t, bad


@triton.jit
def record_fault(
    fault, mask, labels, class_weights, temperature, bad_mask, bad_label, bad_class, bad_temperature, rows, cols,
    PER_ROW: tl.constexpr,
):  # fmt: skip
    """(kind, row, value) of the first row at fault, or (0, -1, 0): masks first, then labels, then their classes (of
    which the first is the `row`), then temperatures."""
    kind = tl.full((), 0, tl.int32)
    row = tl.full((), -1, tl.int64)
    value = tl.full((), 0.0, tl.float64)
    if bad_temperature < rows:
        kind, row = tl.full((), TEMPERATURE, tl.int32), bad_temperature
        if PER_ROW:
            value = tl.load(temperature + bad_temperature).to(tl.float32).to(tl.float64)
        else:
            value = scalar(temperature).to(tl.float64)
    if class_weights is not None:
        if bad_class < cols:
            kind, row = tl.full((), CLASS_WEIGHT, tl.int32), bad_class.to(tl.int64)
            value = tl.load(class_weights + bad_class).to(tl.float32).to(tl.float64)
    if labels is not None:
        if bad_label < rows:
            kind, row = tl.full((), LABEL, tl.int32), bad_label
            value = tl.load(labels + bad_label).to(tl.float64)
    if mask is not None:
        if bad_mask < rows:
            kind, row = tl.full((), MASK, tl.int32), bad_mask
            value = tl.load(mask + bad_mask).to(tl.float32).to(tl.float64)
    tl.store(fault, kind.to(tl.float64))
    tl.store(fault + 1, row.to(tl.float64))
    tl.store(fault + 2, value)


@triton.jit(
    do_not_specialize=[
        "temperature", "soft_weight", "hard_weight", "soft_count", "hard_count", "ignore_index", "rows", "cols",
    ],
    do_not_specialize_on_alignment=[
        "labels", "mask", "class_weights", "temperature", "upstream", "soft_weight", "hard_weight", "soft_count",
        "hard_count",
    ],
)  # fmt: skip
def prologue_kernel(
    labels, mask, class_weights, temperature, upstream, soft_weight, hard_weight, soft_count, hard_count,
    ignore_index, rows, cols, weights, unit, fault,
    SOFT: tl.constexpr, PER_ROW: tl.constexpr, MEAN: tl.constexpr, T_SQUARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weights [5, rows]: soft weight, hard weight, soft share, hard share, temperature. labels None: no hard term;
    unit None: the gradient is stored as it is. fault [3], float64."""
    rows = rows.to(tl.int64)
    zeros = tl.zeros((BLOCK,), tl.float32)
    tokens, labelled, largest = zeros, zeros, zeros
    bad_mask = tl.zeros((BLOCK,), tl.int64) + rows
    bad_label, bad_temperature = bad_mask, bad_mask
    bad_class = tl.zeros((BLOCK,), tl.int32) + cols
    has_soft = SOFT & (scalar(soft_weight) != 0.0)
    has_hard = (labels is not None) & (scalar(hard_weight) != 0.0)
    # ---- count
    for i in range((rows + BLOCK - 1) // BLOCK):
        row = i * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        inside = row < rows
        if SOFT:
            weight, valid = load_weight(mask, row, inside & has_soft)
            tokens += weight
            bad_mask = tl.where(inside & has_soft & ~valid, tl.minimum(bad_mask, row), bad_mask)
        if labels is not None:
            weight, label, bad, bad_weight = load_label(
                labels, class_weights, row, inside & has_hard, ignore_index, cols
            )
            labelled += weight
            bad_label = tl.where(bad, tl.minimum(bad_label, row), bad_label)
            bad_class = tl.where(bad_weight, tl.minimum(bad_class, label.to(tl.int32)), bad_class)
    soft_scale = share_scale(soft_count, tl.sum(tokens, axis=0), MEAN)
    hard_scale = share_scale(hard_count, tl.sum(labelled, axis=0), MEAN)
    # ---- weigh
    for i in range((rows + BLOCK - 1) // BLOCK):
        row = i * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
        inside = row < rows
        fault_here = row < 0
        soft_share, hard_share, t = zeros, zeros, zeros + 1.0
        if SOFT:
            weight, valid = load_weight(mask, row, inside & has_soft)
            soft_share, t, bad_t = soft_part(weight * soft_scale, temperature, row, inside, PER_ROW, T_SQUARED)
            bad_temperature = tl.where(bad_t, tl.minimum(bad_temperature, row), bad_temperature)
            fault_here = (inside & has_soft & ~valid) | bad_t
        if labels is not None:
            weight, _, bad, bad_weight = load_label(labels, class_weights, row, inside & has_hard, ignore_index, cols)
            hard_share = weight * hard_scale
            fault_here = fault_here | bad | bad_weight
        factor = tl.where(fault_here, 0.0, 1.0)
        if upstream is not None:
            factor *= tl.load(upstream + row, mask=inside, other=0.0).to(tl.float32)
        soft_weight_ = tl.where((soft_share == 0.0) | fault_here, 0.0, soft_share * scalar(soft_weight) * factor)
        hard_weight_ = tl.where((hard_share == 0.0) | fault_here, 0.0, hard_share * scalar(hard_weight) * factor)
        largest = tl.maximum(largest, tl.where(inside, tl.abs(soft_weight_ / t) + tl.abs(hard_weight_), 0.0))
        tl.store(weights + row, soft_weight_, mask=inside)
        tl.store(weights + rows + row, hard_weight_, mask=inside)
        tl.store(weights + 2 * rows + row, tl.where(fault_here & has_soft, float("nan"), soft_share), mask=inside)
        tl.store(weights + 3 * rows + row, tl.where(fault_here & has_hard, float("nan"), hard_share), mask=inside)
        tl.store(weights + 4 * rows + row, tl.where(soft_weight_ == 0.0, 1.0, t), mask=inside)
    if unit is not None:
        tl.store(unit, unit_of(tl.max(largest, axis=0)))
    record_fault(
        fault, mask, labels, class_weights, temperature, tl.min(bad_mask, axis=0), tl.min(bad_label, axis=0),
        tl.min(bad_class, axis=0), tl.min(bad_temperature, axis=0), rows, cols, PER_ROW,
    )  # fmt: skip
