"""What every problem of the benchmark is: inputs, torch's formula, ours, a call, and the answer in float64.

It knows no operation, nor time, nor who calls it how. Next: problems.py and linear.py, which know operations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from distil_fast.bench.cases import Case

SOFT_WEIGHT, HARD_WEIGHT = 0.5, 0.5
NEAR = 2  # rows where the models nearly agree
DIFFERENCE = 0.01  # between their logits there
CHECKED = 8  # other rows whose gradient is compared
ORACLE_ROWS = 32  # at a time, to keep the float64 copies small

Function = Callable[..., Tensor]


class Outcome(NamedTuple):
    """What one call returned: a loss, if the operation has one, and the array of the operation, mostly a gradient."""

    loss: Tensor | None
    array: Tensor


class Exact(NamedTuple):
    """The float64 answer: the loss of all rows, and some rows of the array, the last `near` those that nearly agree."""

    loss: float | None
    rows: Tensor
    array: Tensor
    near: int


class Problem(ABC):
    """The inputs of one case, which all contenders share. `arrays` of the input's size must be read or written."""

    arrays: ClassVar[int] = 3
    slack: ClassVar[float] = 1.0  # times the half precisions' tolerance, where eager torch rounds more on the way
    inputs: tuple[Tensor, ...]
    backend: str | None = None  # of distil_fast, for the next call of `ours`
    precision = "exact"  # likewise, of linear problems

    @property
    def floor_bytes(self) -> int:
        """The least memory traffic of the operation, credited to every contender."""
        return self.arrays * self.inputs[0].numel() * self.inputs[0].element_size()

    @abstractmethod
    def formula(self, *inputs: Any) -> Tensor:
        """The operation in torch, as its users write it."""

    @abstractmethod
    def ours(self, *inputs: Any) -> Tensor:
        """The operation by distil_fast."""

    def prepare(self, function: Function) -> None:  # noqa: B027 - most need nothing
        """What a call needs and the clock must not see."""

    @abstractmethod
    def run(self, function: Function) -> Outcome:
        """One call, all of it timed."""

    @abstractmethod
    def exact(self) -> Exact:
        """The answer, from the inputs as rounded to the case's dtype."""

    def nearby(self) -> Problem | None:
        """The same problem of the same shapes where student and teacher nearly agree in every row; None where the
        loss has other terms, beside which that would not be seen."""
        return None


def normal_numbers(case: Case, seed: int) -> tuple[Callable[..., Tensor], torch.Generator]:
    """Standard normal numbers of any shape on the case's device, and where they come from."""
    generator = torch.Generator(case.device).manual_seed(seed)
    return partial(torch.randn, generator=generator, device=case.device), generator


def spread_out(rows: int) -> Tensor:
    """Numbers of a few rows, from the first to the last."""
    return torch.linspace(0, rows - 1, min(rows, CHECKED)).long()


def taking_part(case: Case, always: int = 0) -> Tensor | None:
    """Which rows take part in the loss, bool `[rows]`, the last `always` of them among them; None: all."""
    if case.labelled == 1.0:
        return None
    generator = torch.Generator(case.device).manual_seed(1)  # of its own, so that near problems have the same rows
    mask = torch.zeros(case.rows, dtype=torch.bool, device=case.device)
    mask[case.rows - always :] = True
    others = torch.randperm(case.rows - always, generator=generator, device=case.device)
    mask[others[: max(round(case.labelled * case.rows) - always, 1)]] = True
    return mask
