"""The endless stream of micro-batches of a text that lies on disk, which can stop anywhere and go on.

Where it is, is two numbers, pass and position; everything else follows from the seed. It knows nothing of masks or
models. Next: masking.py for what happens to a batch, stream.py for text that does not lie on disk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distil_fast.training.arrange import Sequences, epoch_order, to_device
from distil_fast.training.batch import Batch
from distil_fast.training.protocols import Feed
from distil_fast.training.settings import InputError


class TokenFeed(Feed):
    """Pass after pass over sequences, each in another order; see `epoch_order`.

    Ranks see different sequences, of each pass equally many micro-batches; less than one micro-batch of all ranks is
    left out of a pass. The state is the same on every rank.

    Args:
        sequences: all of them, on every rank the same.
        micro_batch_size: sequences of one batch of this rank.
        seed: of the order, on every rank the same.
        device: where the batches go.
        rank, ranks: this process, and how many there are.

    Raises:
        InputError: the sequences do not fill one micro-batch of every rank.
    """

    def __init__(
        self,
        sequences: Sequences,
        micro_batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if len(sequences) < micro_batch_size * ranks:
            raise InputError(
                f"The text is too small: expected a micro-batch of {micro_batch_size} sequences for each of {ranks} "
                f"ranks, got {len(sequences)} sequences. Give more text, or take a smaller micro-batch."
            )
        self.sequences = sequences
        self.micro_batch_size = micro_batch_size
        self.device = torch.device(device)
        self.rank, self.ranks = rank, ranks
        self.known_by: dict[str, Any] = {
            "seed": seed,
            "sequences": sequences.key,
            "micro_batch_size": micro_batch_size,
            "ranks": ranks,
        }
        self.epoch = self.position = 0
        self._order = self._draw()

    def __len__(self) -> int:
        """Micro-batches of a pass, on every rank."""
        return len(self.sequences) // (self.micro_batch_size * self.ranks)

    def __iter__(self) -> TokenFeed:
        return self

    def __next__(self) -> Batch:
        batch = self.sequences.batch(self._order[self.position])
        self.position += 1
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._draw()
        return to_device(batch, self.device)

    def _draw(self) -> NDArray[np.int64]:
        seed = (self.known_by["seed"], self.epoch)
        return epoch_order(self.sequences.lengths, self.micro_batch_size, self.ranks, seed)[:, self.rank]

    def state_dict(self) -> dict[str, Any]:
        """The next micro-batch, and what the order depends on."""
        return {"epoch": self.epoch, "position": self.position, **self.known_by}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the micro-batch that would have come next.

        Raises:
            InputError: the state is one of other text, another seed, micro-batch size or number of ranks.
        """
        check_state(state, self.known_by)
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._draw()


def check_state(state: dict[str, Any], known_by: dict[str, Any]) -> None:
    """Raise InputError where a state belongs to another feed than that which is known by these."""
    for name, here in known_by.items():
        if state.get(name) != here:
            raise InputError(
                f"The state is of another feed: expected {name} {here!r}, got {state.get(name)!r}. Resume with the "
                "text, seed, micro-batch size and ranks of the run's beginning, or start a new run."
            )
