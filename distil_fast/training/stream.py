"""Micro-batches of a dataset that is read as it is used, window by window, and that can stop anywhere and go on.

A window is a number of rows, tokenised, arranged and shuffled as a whole text is (arrange.py). The state is where the
window began, as `datasets` tells it, and the position in it. Next: text.py, which chooses between this and feed.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from datasets import IterableDataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from distil_fast.training.arrange import Sequences, arrange, epoch_order, specials_of, to_device
from distil_fast.training.batch import Batch
from distil_fast.training.documents import Document
from distil_fast.training.feed import check_state
from distil_fast.training.protocols import Feed
from distil_fast.training.settings import InputError
from distil_fast.training.sources import documents_from_rows
from distil_fast.training.tokenise import ENCODED_TOGETHER, Part, token_ids

WINDOW_ROWS = 2000  # of each rank, or fewer:
WINDOW_CHARACTERS = 16_000_000  # of each rank, about four million tokens


class StreamFeed(Feed):
    """Pass after pass over a streamed dataset; the rows of a window in another order in each of them.

    Every rank reads all rows, and tokenises its own: a window is cut into one run of rows for each. In a window, what
    does not fill a micro-batch is left out. Ranks may begin a pass at different steps, and so the state is each rank's
    own. When a window ends, the feed waits for the next one to be read and tokenised. `WINDOW_CHARACTERS` end a window
    of long rows.

    Args:
        dataset: rows to train on; its order is fixed.
        column: that holds the text.
        tokenizer: of the teacher.
        arrangement, length: of the sequences; see `arrange`.
        micro_batch_size: sequences of one batch of this rank.
        seed: of the order.
        device: where the batches go.
        rank, ranks: this process, and how many there are.
        window_rows: rows of a window, on each rank.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        column: str,
        tokenizer: PreTrainedTokenizerBase,
        arrangement: Literal["packed", "buckets"],
        length: int,
        micro_batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
        window_rows: int = WINDOW_ROWS,
    ) -> None:
        self.dataset = copy.deepcopy(dataset)  # its position is in it
        self.column = column
        self.tokenizer = tokenizer
        self.arrangement: Literal["packed", "buckets"] = arrangement
        self.length = length
        self.micro_batch_size = micro_batch_size
        self.device = torch.device(device)
        self.rank, self.ranks = rank, ranks
        self.window_rows = window_rows
        self.specials = specials_of(tokenizer)
        self.known_by: dict[str, Any] = {
            "seed": seed,
            "sequences": f"{column} {arrangement} {length} {window_rows}",
            "micro_batch_size": micro_batch_size,
            "rank": rank,
            "ranks": ranks,
        }
        self.epoch = self.window = self.position = 0
        self._begins: dict[str, Any] = {}  # the dataset's own state before the window; {}: the beginning
        self._rows: Iterator[str] | None = None
        self._sequences: Sequences | None = None
        self._order: NDArray[np.int64] = np.empty((0, micro_batch_size), np.int64)

    def __iter__(self) -> StreamFeed:
        return self

    def __next__(self) -> Batch:
        if self._sequences is None:
            self._read_window()
        last = self.epoch + 2  # one whole pass, wherever it began
        while self.position == len(self._order):
            self._begins, self.window, self.position = self.dataset.state_dict(), self.window + 1, 0
            self._read_window()
            if self.epoch > last:
                raise InputError(
                    f"The dataset is too small: a whole pass does not make {self.micro_batch_size} sequences of a "
                    "micro-batch. Take a smaller micro-batch, or read it without streaming."
                )
        assert self._sequences is not None
        batch = self._sequences.batch(self._order[self.position])
        self.position += 1
        return to_device(batch, self.device)

    def _read_window(self) -> None:
        rows = self._next_rows()
        if not rows:  # the pass has ended
            self.epoch, self.window, self._begins, self._rows = self.epoch + 1, 0, {}, None
            rows = self._next_rows()
        share = -(-len(rows) // self.ranks)
        documents = documents_from_rows(rows[self.rank * share : (self.rank + 1) * share])
        self._sequences = arrange(self._tokenised(documents), self.length, self.arrangement, self.specials, "")
        seed = (self.known_by["seed"], self.rank, self.epoch, self.window)
        self._order = epoch_order(self._sequences.lengths, self.micro_batch_size, 1, seed)[:, 0]

    def _next_rows(self) -> list[str]:
        if self._rows is None:
            self.dataset.load_state_dict(self._begins)
            self._rows = (row[self.column] or "" for row in self.dataset)
        rows: list[str] = []
        characters = 0
        for row in self._rows:
            rows.append(row)
            characters += len(row)
            if len(rows) == self.window_rows * self.ranks or characters >= WINDOW_CHARACTERS * self.ranks:
                break
        return rows

    def _tokenised(self, documents: Iterator[Document]) -> Part:
        flat: list[NDArray[np.int32]] = []
        while group := [" ".join(document) for document in islice(documents, ENCODED_TOGETHER)]:
            flat += [np.array([*ids, self.specials.sep], np.int32) for ids in token_ids(group, self.tokenizer)]
        offsets = np.cumsum([0, *map(len, flat)], dtype=np.int64)
        return Part(np.concatenate(flat) if flat else np.empty(0, np.int32), offsets)

    def state_dict(self) -> dict[str, Any]:
        """Where the window begins, the next micro-batch in it, and what the order depends on."""
        at = {"epoch": self.epoch, "window": self.window, "position": self.position, "begins": self._begins}
        return copy.deepcopy(at) | self.known_by

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the micro-batch that would have come next; the window is read again.

        Raises:
            InputError: the state is one of another arrangement, seed, micro-batch size, rank or number of ranks.
        """
        check_state(state, self.known_by)
        self.epoch, self.window, self.position = state["epoch"], state["window"], state["position"]
        self._begins = copy.deepcopy(state["begins"])
        self._rows = self._sequences = None
