"""What the training loop asks of its parts: a feed of batches, their preparation, and the one module it trains.

The loop knows these and nothing more, so that masked-LM distillation and task distillation are the same loop. Next:
trainer.py, which uses them; feed.py, masking.py, objective.py and classification.py, which are them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from distil_fast.training.batch import Batch


class Feed(Protocol):
    """An endless stream of micro-batches on the device, that can say where it is and go on from there."""

    def __iter__(self) -> Feed: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists of them, as JSON holds them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the micro-batch that would have come next when the state was taken."""


class Prepare(Protocol):
    """What happens to a batch on the device before the module sees it, with random numbers of its own."""

    def __call__(self, batch: Batch) -> Any: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class Objective(nn.Module):
    """Teacher, student and losses in one forward: the module that is trained, and that DDP or FSDP wrap.

    The teacher is held outside of the registered submodules: it is in no state_dict, and nobody wraps it.
    """

    terms: ClassVar[tuple[str, ...]]  # the losses' names, without their weighted sum
    student: PreTrainedModel

    @abstractmethod
    def counts(self, batch: Any) -> Tensor:
        """The terms' denominators in one prepared micro-batch, float32 `[len(terms)]`, without asking the device."""

    @abstractmethod
    def forward(self, batch: Any, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted loss, 0-d, and its terms before their weights, detached `[len(terms)]`, in float32.

        Each term is a sum over this micro-batch divided by its entry of `counts`, which cover the whole optimiser step.
        """
