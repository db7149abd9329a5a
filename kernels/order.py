"""A top-k teacher's entries, before a logit is read: whether they are at fault, and their columns in ascending order.

One program a row. A column's place in the order is the number of those before it, counted by comparing all with all,
which finds what stands twice as well: k^2 comparisons, for k up to MOST. Next: topk.py, which sweeps past them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distil_fast.kernels.faults import NOTHING, TEACHER_MASS, TOPK_ID, TOPK_LOG_PROB, above_one, record_row, rounding_of
from distil_fast.kernels.maths import exp

MOST = 1024  # entries a row
LAST = tl.constexpr(2**31 - 1)  # behind every column: what is no entry


@triton.jit
def load_ids(ids, at, i, k, cols):
    """(entries as they stand, whether each is a column, and its column or LAST)"""
    entry = tl.load(ids + at + i, mask=i < k, other=-1).to(tl.int64)
    valid = (entry >= 0) & (entry < cols)
    return entry, valid, tl.where(valid, entry, LAST).to(tl.int32)


@triton.jit
def first_of(bad, i, values, at):
    """The value of the first entry that is bad, in float64; there is one."""
    return tl.load(values + at + tl.min(tl.where(bad, i, LAST), axis=0)).to(tl.float64)


@triton.jit(do_not_specialize=["rows", "cols", "k"], do_not_specialize_on_alignment=["ids", "log_probs"])
def order_kernel(ids, log_probs, weights, rows, cols, k, ordered, faults, K: tl.constexpr, CHUNK: tl.constexpr):
    """ordered [rows, K + 1]: the columns, and LAST behind them. faults: see faults.py. Rows without a soft weight are
    not read, and have no entries."""
    row, rows = tl.program_id(0).to(tl.int64), rows.to(tl.int64)
    kind = tl.full((), NOTHING, tl.int32)
    value = tl.full((), 0.0, tl.float64)
    ordered += row * (K + 1)
    if tl.load(weights + row) != 0.0:
        at = row * k
        i = tl.arange(0, K)
        entry, valid, column = load_ids(ids, at, i, k, cols)
        before = tl.zeros((K,), tl.int32)
        same = tl.zeros((K,), tl.int32)
        for start in range(0, K, CHUNK):
            j = start + tl.arange(0, CHUNK)
            _, _, other = load_ids(ids, at, j, k, cols)
            is_same = (other[None, :] == column[:, None]) & (j[None, :] < i[:, None])
            same += tl.sum(is_same.to(tl.int32), axis=1)
            before += tl.sum((is_same | (other[None, :] < column[:, None])).to(tl.int32), axis=1)
        tl.store(ordered + before, column)
        tl.store(ordered + K, LAST)
        log_p = tl.load(log_probs + at + i, mask=valid, other=0.0).to(tl.float32)
        bad_id = (entry < -1) | (entry >= cols) | (valid & (same > 0))
        bad_log_p = valid & ~(log_p <= rounding_of(log_probs))
        mass = tl.sum(tl.where(valid, exp(log_p), 0.0), axis=0)
        if tl.max(bad_id.to(tl.int32), axis=0) > 0:
            kind = tl.full((), TOPK_ID, tl.int32)
            value = first_of(bad_id, i, ids, at)
        elif tl.max(bad_log_p.to(tl.int32), axis=0) > 0:
            kind = tl.full((), TOPK_LOG_PROB, tl.int32)
            value = first_of(bad_log_p, i, log_probs, at)
        elif above_one(mass, log_probs):
            kind = tl.full((), TEACHER_MASS, tl.int32)
            value = mass.to(tl.float64)
    else:
        tl.store(ordered, LAST)
    record_row(faults, row, rows, kind, value)
