"""exp, expm1, log1p and the difference of two logits, of blocks of floats: the Triton twin of csrc/cpu/math.h.

Only operations that compile for every GPU and run in Triton's interpreter, so no libdevice; the polynomials are those
of the CPU, with the same errors. It knows nothing of rows or divergences. Next: divergences.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def expm1_tail(x):
    """expm1(x) - x for |x| <= 1/2; its error relative to expm1(x) is 1.2e-7."""
    x2 = x * x
    low = 0.49999982 + 0.16666135 * x
    middle = 0.04166897 + 0.008402393 * x
    return x2 * ((0.0013875746 * x2 + middle) * x2 + low)


@triton.jit
def expm1(x):
    """expm1(x) for x <= 80."""
    return tl.where(tl.abs(x) < 0.5, x + expm1_tail(x), tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def log1p_tail(x):
    """log1p(x) - x for sqrt(1/2) - 1 <= x < sqrt(2) - 1; its error relative to itself is 4e-7."""
    poly = -0.07634438 * x + 0.12761563
    poly = poly * x - 0.13160197
    poly = poly * x + 0.1420176
    poly = poly * x - 0.16623355
    poly = poly * x + 0.20001227
    poly = poly * x - 0.25000823
    poly = poly * x + 0.3333333
    return poly * x * (x * x) - 0.5 * x * x


@triton.jit
def log(y, relative_lost=0.0):
    """log(y + lost) for normal y > 0: y = 2^e (1 + z) with |z| < 0.42, a polynomial in z, and what y has lost."""
    bits = y.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    z = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    return e.to(tl.float32) * LN2 + (z + (log1p_tail(z) + relative_lost))


@triton.jit
def log1p(x):
    """log(1 + x) for -1 < x, finite."""
    y = tl.maximum(1.0 + x, 1e-30)
    return log(y, (x - (y - 1.0)) / y)


@triton.jit
def difference(s, t, shift, EXACT: tl.constexpr):
    """s - t - shift with one rounding: what the first subtraction rounds off is added back (Knuth's TwoSum).

    Logits that carry a constant offset keep differences of 1e-4. EXACT: both have 16 bits, nothing is rounded off.
    """
    d = s - t
    if EXACT:
        apart = d - shift
    else:
        back = d - s
        lost = (s - (d - back)) - (t + back)
        apart = (d - shift) + tl.where(lost == lost, lost, 0.0)  # an infinite d has lost nothing
    return apart


@triton.jit
def times(weight, factor):
    """weight * factor, where a weight of 0 wins over an infinite or undefined factor: 0 log 0 = 0."""
    return tl.where(weight == 0.0, 0.0, weight * factor)
