"""What a tensor's entries are as logits: as they stand, scaled, capped softly, or the logarithms of probabilities.

The form is compiled in, its numbers are not. tanh without libdevice keeps its digits towards 0, and its
derivative where it saturates. It knows nothing of rows, temperatures or divergences. Next: sums.py, which loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distil_fast.kernels.maths import exp, expm1

PLAIN = tl.constexpr(0)
SCALED = tl.constexpr(1)
CAPPED = tl.constexpr(2)
LOGARITHM = tl.constexpr(3)


@triton.jit
def tanh(x):
    """-e / (2 + e) with e = expm1(-2 |x|), and the sign of x."""
    e = expm1(-2.0 * tl.abs(x))
    size = -e / (2.0 + e)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def transformed(x, factor, cap, FORM: tl.constexpr):
    """factor x, cap tanh(factor x), or factor log(x). -inf, a masked column, stays; a probability below 0 becomes
    nan."""
    if FORM == SCALED:
        y = factor * x
    elif FORM == CAPPED:
        y = tl.where(x == float("-inf"), x, cap * tanh(factor * x))
    elif FORM == LOGARITHM:
        y = factor * tl.log(x)
    else:
        y = x
    return y


@triton.jit
def slope(x, factor, cap, FORM: tl.constexpr):
    """The derivative of `transformed`, of logits: of tanh it is 4 e / (1 + e)^2, e = exp(-2 |factor x|); 0 at -inf."""
    if FORM == CAPPED:
        e = exp(-2.0 * tl.abs(factor * x))
        y = 4.0 * factor * cap * e / ((1.0 + e) * (1.0 + e))
    else:
        y = tl.zeros(x.shape, tl.float32) + factor
    return y
