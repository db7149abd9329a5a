"""Labelled texts as batches: tokenised once, grouped by length, shuffled anew each epoch, and resumable anywhere.

It knows texts, labels and a tokenizer; nothing of tasks or models. Order and position are plain numbers, so that a
feed goes on from its state exactly. Next: classification.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distil_fast.training.batch import Batch
from distil_fast.training.settings import InputError

TOKENISED_TOGETHER = 10_000  # texts
SORTED_TOGETHER = 50  # batches within which examples are sorted by length


class Examples(NamedTuple):
    """Tokenised texts, one after the other, and their labels."""

    ids: npt.NDArray[np.int32]  # [tokens]
    types: npt.NDArray[np.uint8]  # [tokens], 1 in the second text of a pair
    starts: npt.NDArray[np.int64]  # [examples + 1], where each begins
    labels: Tensor  # [examples], int64 classes or float32 values
    pad_id: int

    def __len__(self) -> int:
        return len(self.labels)


def tokenise(
    texts: Sequence[tuple[str, ...]],
    labels: Sequence[int] | Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Examples:
    """Texts or pairs of them, with their special tokens; what is longer than `max_length` tokens is cut.

    Raises:
        InputError: no texts, or a tokenizer without a padding token.
    """
    if not texts:
        raise InputError("examples: expected at least one, got none.")
    if tokenizer.pad_token_id is None:
        raise InputError("tokenizer: expected one with a padding token. Set its pad_token.")
    ids, types, lengths = [], [], []
    for start in range(0, len(texts), TOKENISED_TOGETHER):
        part = texts[start : start + TOKENISED_TOGETHER]
        second = [text[1] for text in part] if len(part[0]) == 2 else None
        encoded = tokenizer(
            [text[0] for text in part],
            second,
            truncation=True,
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=True,
        )
        lengths += [len(one) for one in encoded["input_ids"]]
        ids.append(np.concatenate([np.asarray(one, np.int32) for one in encoded["input_ids"]]))
        types.append(np.concatenate([np.asarray(one, np.uint8) for one in encoded["token_type_ids"]]))
    kind = torch.float32 if isinstance(labels[0], float) else torch.int64
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Examples(
        np.concatenate(ids), np.concatenate(types), starts, torch.tensor(labels, dtype=kind), tokenizer.pad_token_id
    )


def collate(examples: Examples, chosen: Sequence[int], device: torch.device | str = "cpu") -> Batch:
    """The chosen examples as one batch, padded to the longest."""
    lengths = [int(examples.starts[i + 1] - examples.starts[i]) for i in chosen]
    shape = len(chosen), max(lengths)
    ids = np.full(shape, examples.pad_id, np.int64)
    types = np.zeros(shape, np.int64)
    for row, (index, length) in enumerate(zip(chosen, lengths, strict=True)):
        part = slice(int(examples.starts[index]), int(examples.starts[index]) + length)
        ids[row, :length], types[row, :length] = examples.ids[part], examples.types[part]
    mask = np.arange(shape[1]) < np.asarray(lengths)[:, None]
    host = Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        tokens=torch.from_numpy(np.flatnonzero(mask)),
        labels=examples.labels[list(chosen)],
        token_type_ids=torch.from_numpy(types),
    )
    return Batch(*(None if tensor is None else tensor.to(device) for tensor in host))  # type: ignore[arg-type]


def in_order(examples: Examples, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
    """Every example once, the longest first; the order is the same at every call. For evaluation."""
    order = np.argsort(-np.diff(examples.starts), kind="stable")
    for start in range(0, len(order), batch_size):
        yield collate(examples, order[start : start + batch_size].tolist(), device)


class ClassificationFeed:
    """Endless micro-batches of one rank, on its device: the loop's `Feed`.

    Each epoch has its own order, drawn from the seed: examples are shuffled, sorted by length within pools of
    `SORTED_TOGETHER` batches, cut into micro-batches, and these are shuffled. The ranks take turns; what is left over
    when each has had as many, less than one micro-batch for each rank, is not seen in that epoch.

    Args:
        examples: all of them, on every rank.
        batch_size: examples of a micro-batch; the last one of an epoch may have fewer.
        seed: of the order.
        rank, ranks: this process, and how many there are.
        device: where the batches go.

    Raises:
        InputError: fewer micro-batches than ranks.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 <= rank < ranks or batch_size < 1:
            raise ValueError(f"expected 0 <= rank < ranks and batch_size >= 1, got {rank}, {ranks} and {batch_size}.")
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.device = device
        self.epoch = 0
        self.position = 0
        self._order: tuple[int, list[list[int]]] | None = None  # the epoch it is of, and its micro-batches
        if len(self) == 0:
            raise InputError(
                f"examples: expected at least a micro-batch for each of {ranks} ranks, got {len(examples)} examples in "
                f"micro-batches of {batch_size}. Use smaller ones."
            )

    def __len__(self) -> int:
        """Micro-batches of an epoch on this rank."""
        return -(-len(self.examples) // self.batch_size) // self.ranks

    def __iter__(self) -> ClassificationFeed:
        return self

    def __next__(self) -> Batch:
        if self._order is None or self._order[0] != self.epoch:
            self._order = self.epoch, self._micro_batches(self.epoch)
        chosen = self._order[1][self.position * self.ranks + self.rank]
        self.position += 1
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        return collate(self.examples, chosen, self.device)

    def _micro_batches(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.examples))
        lengths = np.diff(self.examples.starts)
        groups = []
        pool = self.batch_size * SORTED_TOGETHER
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            part = part[np.argsort(lengths[part], kind="stable")]
            groups += [part[i : i + self.batch_size].tolist() for i in range(0, len(part), self.batch_size)]
        return [groups[i] for i in random.permutation(len(groups))]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "examples": len(self.examples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the micro-batch that would have come next.

        Raises:
            InputError: the state is of another seed or of other examples.
        """
        own = self.state_dict()
        for name in ("seed", "examples"):
            if state[name] != own[name]:
                raise InputError(f"feed: expected a state with {name} {own[name]}, got {state[name]}. Start anew.")
        self.epoch, self.position = state["epoch"], state["position"]


class Unchanged:
    """The `Prepare` of task distillation: batches go to the objective as they are."""

    def __call__(self, batch: Batch) -> Batch:
        return batch

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """There is nothing to load."""
