"""Hidden states with the head that makes logits of them, the gradients of both as chunks of rows add to them, and where
a chunk's rows are.

What fused heads have in common, be they whole or sharded along the vocabulary. It knows no loss and no option. Next:
products.py; chunks.py and parallel/linear.py, which run the loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from distil_fast.backends.layout import real_dtype
from distil_fast.products import WeightGradient, hidden_gradient, logits


class Head(NamedTuple):
    """Hidden states `[rows, H]` and the head that makes logits of them: weights `[V, H]`, bias `[V]`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def rows(self, part: slice | Tensor) -> Head:
        return self._replace(hidden=self.hidden[part])

    def computed(self) -> Head:
        """The head in its hidden states' dtype."""
        bias = None if self.bias is None else self.bias.to(self.hidden.dtype)
        return Head(self.hidden, self.weight.to(self.hidden.dtype), bias)

    def logits(self, wide: bool) -> Tensor:
        return logits(*self, wide)


class Wanted(NamedTuple):
    """Which gradients are: of the student's hidden states (or logits), of its weights, of its bias."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class Gradients:
    """The wanted gradients while chunks are added: of weights `[V, H]` and bias summed in float32 (float64 beside it);
    of hidden states `[rows, H]` in their dtype, or, if `wide`, unrounded in the precision of the sums.
    """

    def __init__(self, values: Tensor, cols: int, wanted: Wanted, *, wide: bool = False) -> None:
        """values: all chunks' hidden states, or logits of a student without a head."""
        self.real, self.wide = real_dtype(values), wide
        self.hidden = values.new_empty(values.shape, dtype=self.real if wide else None) if wanted.hidden else None
        self.weight = WeightGradient(cols, values) if wanted.weight else None
        self.bias = values.new_zeros(cols, dtype=self.real) if wanted.bias else None

    def add(self, part: slice, head: Head, of_logits: Tensor) -> None:
        """What the gradient of a chunk's logits comes to; `head` has the chunk's rows."""
        hidden = head.hidden.to(self.real) if self.wide else head.hidden
        if self.bias is not None:
            self.bias += of_logits.sum(0, dtype=self.bias.dtype)
        if of_logits.is_cuda:
            of_logits = of_logits.to(hidden.dtype)
        if self.weight is not None:
            self.weight.add(of_logits, hidden)
        if self.hidden is not None:
            self.hidden[part] = hidden_gradient(of_logits, head.weight, self.wide)

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weights and bias."""
        return self.hidden, None if self.weight is None else self.weight.sum, self.bias


def slices(rows: int, most: int) -> Iterator[slice]:
    """Chunks of at most so many rows (but one), as equal in size as possible: no product is left with a few rows."""
    number = math.ceil(rows / max(1, most))
    for i in range(number):
        yield slice(rows * i // number, rows * (i + 1) // number)


def places(used: Tensor | None) -> Tensor | None:
    """Where the used rows are; None: everywhere. On a GPU this waits, for how many they are."""
    if used is None:
        return None
    index = used.nonzero().squeeze(1)
    return None if index.shape[0] == used.shape[0] else index


def spread(values: Tensor, index: Tensor | None, rows: int, dim: int = 0) -> Tensor:
    """The values of used rows in their places among all `rows`, zeros elsewhere."""
    if index is None:
        return values
    shape = *values.shape[:dim], rows, *values.shape[dim + 1 :]
    return values.new_zeros(shape).index_copy_(dim, index, values)
