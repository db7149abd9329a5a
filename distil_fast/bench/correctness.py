"""Whether a contender computes what it should: its errors against float64, and the line beyond which it is not timed.

The line is drawn far from rounding: it is there for what is wrong, and the errors stand in the table for the rest.
It knows nothing of time. Next: suite.py, which asks before it times.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distil_fast.bench.problem import Exact, Outcome

# dtype: relative error of the loss, and of the array in the rows where the models differ. bf16 eager torch, which
# rounds probabilities, log-probabilities and the loss on the way, reaches half of them.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (3e-2, 1e-2), torch.float16: (3e-2, 1e-2)}


class Errors(NamedTuple):
    """Relative errors: |loss - exact| / |exact| of the loss; ||array - exact|| / ||exact|| over the checked rows of
    the array, where the models differ (`loss`, `array`) and where they nearly agree (`near_loss`, `near`). inf where
    a value is not finite."""

    loss: float | None
    array: float
    near: float | None
    near_loss: float | None = None


def errors(outcome: Outcome, exact: Exact) -> Errors:
    """Compares what a call returned with the answer."""
    got = outcome.array.detach().flatten(0, -2)[exact.rows].double()
    far = len(exact.rows) - exact.near
    loss = None
    if outcome.loss is not None and exact.loss is not None:
        loss = _finite(abs(float(outcome.loss.detach()) - exact.loss) / abs(exact.loss))
    array = _relative(got[:far], exact.array[:far]) if outcome.array.isfinite().all() else math.inf
    return Errors(loss, array, _relative(got[far:], exact.array[far:]) if exact.near else None)


def beside_near(found: Errors, near: Errors) -> Errors:
    """The errors where the models differ, beside those of the same call where they nearly agree in every row."""
    return found._replace(near=near.near if near.near is not None else near.array, near_loss=near.loss)


def verdict(found: Errors, dtype: torch.dtype, slack: float = 1.0) -> str | None:
    """Why a contender with these errors is not timed; None if it is. `slack`: Problem.slack."""
    loss, array = TOLERANCES[dtype]
    array *= slack if dtype != torch.float32 else 1.0
    if found.loss is not None and found.loss > loss:
        return f"wrong: relative error of the loss {found.loss:.1e}, expected at most {loss:.0e}"
    if found.array > array:
        return f"wrong: relative error of the gradient or output {found.array:.1e}, expected at most {array:.0e}"
    return None


def _relative(got: Tensor, exact: Tensor) -> float:
    if not exact.any():
        return math.inf if got.any() else 0.0
    return _finite(float((got - exact).norm() / exact.norm()))


def _finite(error: float) -> float:
    return error if math.isfinite(error) else math.inf
