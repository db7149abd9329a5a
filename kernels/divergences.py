"""THE MATHS: a divergence is (r, p, q) -> (f, g), of blocks of floats: the Triton twin of csrc/divergences.h.

p is the teacher's probability, q the student's, r = log q - log p; D = sum f, and g = df / dlog q up to c q, with c
such that g = 0 where p = q. It knows nothing of softmax, temperature, dtype, labels or reduction. Derivations:
docs/math.md. Next: rows.py, which calls them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distil_fast.kernels.maths import expm1, expm1_tail, log1p, times


@triton.jit
def forward_kl(r, p, q, parameter, centre):
    """KL(p || q): f = p (expm1(r) - r), g = q - p; both from r alone, without cancellation, as r -> 0."""
    tail = expm1_tail(r)
    gap = q - p
    close = tl.abs(r) < 0.5
    return tl.where(close, p * tail, gap - times(p, r)), tl.where(close, p * (r + tail), gap)


@triton.jit
def reverse_kl(r, p, q, parameter, centre):
    """KL(q || p): f = q (r + expm1(-r)), g = q (r - centre)."""
    f = tl.where(tl.abs(r) < 0.5, q * expm1_tail(-r), times(q, r) + (p - q))
    return f, times(q, r - centre)


@triton.jit
def jsd(r, p, q, parameter, centre):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; g = (1 - beta) q (log q - log m).

    log m relative to the larger of p and q, as in reference.py: one exponential and one logarithm for both sides, and
    nothing overflows. The other side is r away.
    """
    other = 1.0 - parameter
    q_larger = r > 0.0
    to_m = -log1p(tl.where(q_larger, parameter, other) * expm1(-tl.abs(r)))  # log of the larger - log m
    log_p_m = tl.where(q_larger, to_m - r, to_m)
    log_q_m = tl.where(q_larger, to_m, to_m + r)
    g = other * times(q, log_q_m)
    return parameter * times(p, log_p_m) + g, g


# By the names of reference.py. Those of the second line have a g that grows with r, and take it relative to the row's
# estimate of D, so that nothing cancels later.
DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}
CENTRED = {"reverse_kl"}
