"""Denominators of a whole optimiser step for a LightningModule, which is given its micro-batches one at a time.

It knows how Lightning accumulates, and imports nothing of it; the loss is the module's affair. Next:
examples/lightning_module.py, the recipe that it belongs to; docs/integrations.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import RandomSampler, SequentialSampler

Batch = TypeVar("Batch")


class StepCounts(Generic[Batch]):
    """A loader whose batches bring the denominators of the optimiser step that they are part of.

    Iterating gives `(batch, counts)`, the same counts for the `accumulate_grad_batches` batches of a step (fewer at the
    end of an epoch), which are fetched together:

        counts = sum over the step's batches of count(batch) / accumulate_grad_batches

    float32, on the device of what `count` returns. Lightning divides the loss of every batch by
    `accumulate_grad_batches`, also in a step that has fewer; a term that is divided by its count, as `soft_count` and
    `hard_count` of `distillation_loss` do, is then divided by that of the whole step. Of several ranks, whose gradients
    are averaged, take the mean of their counts: `self.trainer.strategy.reduce(counts, reduce_op="mean")`.

    Lightning shards a DataLoader over ranks by itself, but no other iterable: there give the loader a
    `DistributedSampler`. `accumulate_grad_batches` must be constant, and `limit_train_batches` a multiple of it.

    Args:
        loader: any iterable of batches; that of one epoch, begun anew by each `iter`.
        count: the denominators of a batch, a tensor `[terms]`.
        accumulate_grad_batches: the Trainer's.

    Raises:
        ValueError: `accumulate_grad_batches` below 1; on several ranks, when iterated, a loader that is not sharded.
    """

    def __init__(
        self, loader: Iterable[Batch], count: Callable[[Batch], Tensor], accumulate_grad_batches: int = 1
    ) -> None:
        if accumulate_grad_batches < 1:
            raise ValueError(f"accumulate_grad_batches: expected 1 or more, got {accumulate_grad_batches}.")
        self.loader, self.count, self.accumulate_grad_batches = loader, count, accumulate_grad_batches

    @property
    def sampler(self) -> Any:
        """The loader's, which Lightning tells the epoch."""
        return getattr(self.loader, "sampler", None)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # of a loader that has one

    def __iter__(self) -> Iterator[tuple[Batch, Tensor]]:
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks > 1 and isinstance(self.sampler, (SequentialSampler, RandomSampler)):
            raise ValueError(
                f"loader: expected one that is sharded over {ranks} ranks, got a {type(self.sampler).__name__}, with "
                "which each has all data. Make the DataLoader with sampler=DistributedSampler(dataset)."
            )
        batches = iter(self.loader)
        while step := list(islice(batches, self.accumulate_grad_batches)):
            counts = torch.stack([self.count(batch) for batch in step]).sum(0) / self.accumulate_grad_batches
            for batch in step:
                yield batch, counts
