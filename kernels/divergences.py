"""THE MATHS: a divergence is (r, p, q) -> (f, g), of blocks of floats: the Triton twin of csrc/divergences.h.

p is the teacher's probability, q the student's, r = log q - log p; D = sum f, and g = df / dlog q up to c q, with c
such that g = 0 where p = q. Each takes two parameters, of which most need fewer, and `centre`, the row's estimate of D.
It knows nothing of softmax, temperature, dtype, labels or reduction. Derivations: docs/math.md. Next: soft.py, which
calls them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distil_fast.kernels.maths import exp, expm1, expm1_tail, log, log1p, times


@triton.jit
def forward_kl(r, p, q, first, second, centre):
    """KL(p || q): f = p (expm1(r) - r), g = q - p; both from r alone, without cancellation, as r -> 0."""
    tail = expm1_tail(r)
    gap = q - p
    close = tl.abs(r) < 0.5
    return tl.where(close, p * tail, gap - times(p, r)), tl.where(close, p * (r + tail), gap)


@triton.jit
def reverse_kl(r, p, q, first, second, centre):
    """KL(q || p): f = q (r + expm1(-r)), g = q (r - centre)."""
    f = tl.where(tl.abs(r) < 0.5, q * expm1_tail(-r), times(q, r) + (p - q))
    return f, times(q, r - centre)


@triton.jit
def jsd(r, p, q, first, second, centre):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; g = (1 - beta) q (log q - log m).

    log m relative to the larger of p and q, as in reference.py: one exponential and one logarithm for both sides, and
    nothing overflows. The other side is r away.
    """
    other = 1.0 - first
    q_larger = r > 0.0
    to_m = -log1p(tl.where(q_larger, first, other) * expm1(-tl.abs(r)))  # log of the larger - log m
    log_p_m = tl.where(q_larger, to_m - r, to_m)
    log_q_m = tl.where(q_larger, to_m, to_m + r)
    g = other * times(q, log_q_m)
    return first * times(p, log_p_m) + g, g


@triton.jit
def gap_of(r, p, q):
    """q - p, from r alone as r -> 0."""
    return tl.where(tl.abs(r) < 0.5, p * (r + expm1_tail(r)), q - p)


@triton.jit
def total_variation(r, p, q, first, second, centre):
    """sum |p - q| / 2: g = q sign(q - p) / 2."""
    gap = gap_of(r, p, q)
    half = 0.5 * q
    g = tl.where(gap > 0.0, half, tl.where(gap < 0.0, -half, 0.0 * gap))  # nan stays nan
    return 0.5 * tl.abs(gap), g


@triton.jit
def mixture(weight, r):
    """Of m = weight a + (1 - weight) b, from r = log b - log a: b / a, m / a - 1, m / a and log(m / a).

    Where b is the smaller and m / a - 1 near -1, m / a is summed from its two parts, which are positive.
    """
    other = 1.0 - weight
    bounded = tl.minimum(r, 80.0)  # beyond e^80 the other side has no weight left
    ratio = exp(bounded)
    excess = other * expm1(bounded)
    cancels = excess < -0.5
    mixed = tl.maximum(tl.where(cancels, weight + other * ratio, 1.0 + excess), 1e-30)
    lost = tl.where(cancels, 0.0, (excess - (mixed - 1.0)) / mixed)
    return ratio, excess, mixed, log(mixed, lost)


@triton.jit
def skewed_kl(r, p, q, first, second, centre):
    """KL(p || m), m = alpha p + (1 - alpha) q: f = p (expm1(l) - l) with l = log m - log p, g = (1 - alpha)^2 (q - p)
    q / m."""
    other = 1.0 - first
    gap = gap_of(r, p, q)
    ratio, _, mixed, log_m = mixture(first, r)
    f = tl.where(tl.abs(log_m) < 0.5, p * expm1_tail(log_m), other * gap - times(p, log_m))
    return f, times(other * other * gap, ratio / mixed)


@triton.jit
def skewed_reverse_kl(r, p, q, first, second, centre):
    """KL(q || m), m = alpha q + (1 - alpha) p: f = q (expm1(l) - l) with l = log m - log q, g = q (alpha (1 - q / m) -
    l)."""
    other = 1.0 - first
    _, excess, mixed, log_m = mixture(first, -r)
    from_m = excess / mixed  # 1 - q / m
    close = tl.abs(log_m) < 0.5
    f = tl.where(close, q * expm1_tail(log_m), other * (p - q) - times(q, log_m))
    g = tl.where(close, -expm1_tail(-log_m) - other * from_m, first * from_m - log_m)
    return f, times(q, g)


@triton.jit
def alpha_beta(r, p, q, first, second, centre):
    """f = (a/(a+b) p^(a+b) + b/(a+b) q^(a+b) - p^a q^b) / (a b), g = (q^(a+b) - p^a q^b) / a.

    The larger probability's power a + b is a factor of both; what is left is exponentials of |r|, and the smaller
    probability need not be a float.
    """
    both = first + second
    top = tl.maximum(p, q)
    nothing = top == 0.0
    power = exp(both * tl.log(tl.where(nothing, 1.0, top)))
    d = tl.abs(r)
    u, v = tl.where(r > 0.0, first, second), tl.where(r > 0.0, second, first)  # exponents of the smaller, the larger
    per_first, per_second = 1.0 / first, 1.0 / second
    per_u, per_v = tl.where(r > 0.0, per_first, per_second), tl.where(r > 0.0, per_second, per_first)
    x, y = -u * d, -v * d
    less = expm1(x)
    of_x, of_y = less * per_u, exp(x) * expm1(y) * per_v
    near = (1.0 + less) * expm1_tail(y) * per_v - expm1_tail(x) * per_u - d * less
    f = tl.where(both * d < 0.5, near, of_y - of_x) * (1.0 / both)
    g = tl.where(r > 0.0, -of_x, of_y)
    return tl.where(nothing, 0.0, power * f), tl.where(nothing, 0.0, power * g)


@triton.jit
def hellinger(r, p, q, first, second, centre):
    """sum (sqrt p - sqrt q)^2 / 2: g = sqrt q (sqrt q - sqrt p) / 2."""
    h = -0.5 * tl.abs(r)  # the smaller root is e^h of the larger
    less = expm1(h)
    half = 0.5 * tl.where(r > 0.0, q, p)
    return times(half, less * less), times(half, tl.where(r > 0.0, -less, less * exp(h)))


@triton.jit
def soft_cross_entropy(r, p, q, first, second, centre):
    """-sum p log q: the forward KL and the teacher's entropy, which has no gradient."""
    f, g = forward_kl(r, p, q, first, second, centre)
    return f - times(p, tl.log(tl.where(p == 0.0, 1.0, p))), g


# By the names of reference.py. Those of CENTRED have a g that grows with r, and take it relative to the row's
# estimate of D, so that nothing cancels later. Those of HEAVY need more registers than the others.
DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "total_variation": total_variation,
    "skewed_kl": skewed_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "alpha_beta": alpha_beta,
    "hellinger": hellinger,
    "soft_cross_entropy": soft_cross_entropy,
}
CENTRED = {"reverse_kl"}
HEAVY = {"skewed_kl", "skewed_reverse_kl", "alpha_beta", "hellinger"}
