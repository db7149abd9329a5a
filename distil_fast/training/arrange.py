"""Token ids to sequences and batches: cut or packed, beside others of their length, in an order drawn from a seed.

A sequence is [CLS], a piece of the flat array of a tokenised text, and [SEP]; only where it begins and how long it is
are kept. It knows nothing of text, devices or ranks' communication. Next: feed.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distil_fast.training.batch import Batch
from distil_fast.training.settings import InputError
from distil_fast.training.tokenise import Part

MINIMUM_TOKENS = 12  # shorter sequences teach nothing; the original drops the same
SORTED_TOGETHER = 50  # micro-batches of all ranks within which sequences are sorted by length


class Specials(NamedTuple):
    """The ids around a sequence, and after it."""

    cls: int
    sep: int
    pad: int


def specials_of(tokenizer: PreTrainedTokenizerBase) -> Specials:
    """The ids of a tokenizer.

    Raises:
        InputError: it lacks one of [CLS], [SEP], [PAD] and [MASK], so that it is none of a masked language model.
    """
    names = ("cls", "sep", "pad", "mask")
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    missing = [f"[{name.upper()}]" for name, value in ids.items() if value is None]
    if missing:
        raise InputError(f"tokenizer: expected that of a masked language model, got one without {', '.join(missing)}.")
    return Specials(ids["cls"], ids["sep"], ids["pad"])


class Sequences(Sequence[Tensor]):
    """Sequences of token ids, made as they are asked for.

    Args:
        tokens: the flat array of ids, [n].
        starts: where in `tokens` each sequence begins, int64 [N].
        lengths: tokens of each sequence, [CLS] and [SEP] included, int64 [N].
        specials: the ids around it.
        key: what the sequences are known by; other sequences have another one.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        specials: Specials,
        key: str,
    ) -> None:
        self.tokens = tokens
        self.starts = starts
        self.lengths = lengths
        self.specials = specials
        self.key = key

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        """One sequence, int64 [S]; or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, length = int(self.starts[index]), int(self.lengths[index])
        row = np.empty(length, np.int64)
        row[0], row[-1] = self.specials.cls, self.specials.sep
        row[1:-1] = self.tokens[start : start + length - 2]
        return torch.from_numpy(row)

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The sequences of these indices, padded to the longest."""
        return collate([self[index] for index in indices], self.specials.pad)


def arrange(
    part: Part, length: int, arrangement: Literal["packed", "buckets"], specials: Specials, key: str
) -> Sequences:
    """All sequences of at most `length` tokens, [CLS] and [SEP] included.

    "buckets": a document is cut where a sequence is full; a rest of less than `MINIMUM_TOKENS` is dropped. "packed":
    documents one after the other, [SEP] between, cut wherever a sequence is full; all have `length` tokens, and the
    rest at the end is dropped. (One that ends where a document does has two [SEP] there.)

    Raises:
        InputError: `length` is below 3, so that nothing fits between [CLS] and [SEP].
    """
    if length < 3:
        raise InputError(f"sequence_length: expected 3 tokens or more, [CLS] and [SEP] among them, got {length}.")
    starts, lengths = _packed(part, length) if arrangement == "packed" else _cut(part, length)
    return Sequences(part.tokens, starts, lengths, specials, f"{key} {arrangement} {length}")


def _packed(part: Part, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    content = length - 2
    starts = np.arange(len(part.tokens) // content, dtype=np.int64) * content
    return starts, np.full(len(starts), length, np.int64)


def _cut(part: Part, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    content = length - 2
    sizes = np.diff(part.offsets) - 1  # without the separator
    pieces = -(-sizes // content)
    last = sizes - (pieces - 1) * content
    pieces -= last + 2 < min(MINIMUM_TOKENS, length)
    document = np.repeat(np.arange(len(sizes)), pieces)
    within = (np.arange(len(document)) - np.repeat(pieces.cumsum() - pieces, pieces)) * content
    return part.offsets[document] + within, np.minimum(sizes[document] - within, content) + 2


def collate(sequences: Sequence[Tensor], pad_id: int, labels: Tensor | None = None) -> Batch:
    """Sequences of int64 ids [S] as one batch on the host, padded to the longest."""
    lengths = np.array([len(sequence) for sequence in sequences])
    real = np.arange(lengths.max()) < lengths[:, None]
    input_ids = torch.full(real.shape, pad_id)
    for row, sequence in zip(input_ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    mask = torch.from_numpy(real.astype(np.int64))
    return Batch(input_ids, mask, torch.from_numpy(np.flatnonzero(real)), labels)


def epoch_order(
    lengths: NDArray[np.int64], micro_batch_size: int, ranks: int, seed: Sequence[int]
) -> NDArray[np.int64]:
    """Which sequences every rank sees in a pass, [micro-batches, ranks, micro_batch_size].

    Sequences are shuffled, then sorted by length within pools of `SORTED_TOGETHER` micro-batches, and the micro-batches
    shuffled in turn; what the ranks do at the same time is of similar length. No sequence is there twice. Fewer than
    `ranks * micro_batch_size` are left out, in each pass others.

    Args:
        lengths: of all sequences, in tokens.
        micro_batch_size: sequences of one rank.
        ranks: how many there are.
        seed: of the order; numbers such as the run's seed and the pass.
    """
    random = np.random.default_rng([*seed])
    together = micro_batch_size * ranks
    count = len(lengths) // together
    order = random.permutation(len(lengths))[: count * together]
    pool = np.arange(len(order)) // (together * SORTED_TOGETHER)
    order = order[np.lexsort((lengths[order], pool))]
    return order.reshape(count, ranks, micro_batch_size)[random.permutation(count)]


def evaluation_batches(sequences: Sequences, batch_size: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
    """All sequences in a fixed order, the short ones first; the last batch may be smaller."""
    order = np.argsort(sequences.lengths, kind="stable")
    for i in range(0, len(order), batch_size):
        yield to_device(sequences.batch(order[i : i + batch_size]), torch.device(device))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; to a GPU from pinned memory, so that the host need not wait."""
    if device.type == "cpu":
        return batch

    def moved(x: Tensor) -> Tensor:
        return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)

    labels = None if batch.labels is None else moved(batch.labels)
    return Batch(moved(batch.input_ids), moved(batch.attention_mask), moved(batch.tokens), labels)
