"""From a DataConfig and a tokenizer to the sequences of both parts, and to the feed of one of them.

It alone knows the order of things: sources.py, tokenise.py, arrange.py, feed.py or stream.py. Next: feed.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from transformers import PreTrainedTokenizerBase

from distil_fast.training.arrange import Sequences, arrange, specials_of
from distil_fast.training.cache import cache_folder, make_writable
from distil_fast.training.feed import TokenFeed
from distil_fast.training.masking import DynamicMasking
from distil_fast.training.settings import DataConfig, InputError, MaskingConfig
from distil_fast.training.sources import (
    Source,
    documents_from_rows,
    documents_source,
    held_out_source,
    load,
    open_sources,
)
from distil_fast.training.stream import StreamFeed
from distil_fast.training.tokenise import Part, Progress, silent, tokenise
from distil_fast.training.words import continues_word

MINIMUM_SEQUENCES = 8  # in either part
HELD_OUT_ROWS = 1000  # of a stream without a held-out part of its own: its first rows


@dataclass(frozen=True)
class Text:
    """A text, ready to train on.

    Args:
        training: the sequences, or the stream, to train on.
        held_out: the sequences to evaluate on.
        counts: how often each id occurs in the training part (of a stream: in the held-out one), int64 [V], V the
            size of the tokenizer.
        summary: numbers of documents, sequences and tokens of either part, for the reader.
        tokenizer, config: what it was made with.
    """

    training: Sequences | IterableDataset
    held_out: Sequences
    counts: NDArray[np.int64]
    summary: dict[str, int]
    tokenizer: PreTrainedTokenizerBase
    config: DataConfig

    def feed(
        self, micro_batch_size: int, seed: int, device: torch.device | str = "cpu", rank: int = 0, ranks: int = 1
    ) -> TokenFeed | StreamFeed:
        """The endless micro-batches of the training part; see `TokenFeed`, or `StreamFeed` for a stream."""
        if isinstance(self.training, Sequences):
            return TokenFeed(self.training, micro_batch_size, seed, device, rank, ranks)
        config = self.config
        how = (config.column, self.tokenizer, config.arrangement, config.sequence_length)
        return StreamFeed(self.training, *how, micro_batch_size, seed, device, rank, ranks)

    def masking(
        self, config: MaskingConfig, vocabulary: int, seed: int, device: torch.device | str = "cpu"
    ) -> DynamicMasking:
        """Masks for batches of this text.

        Args:
            config: rate, shares, scheme.
            vocabulary: ids of the model, from which random ones are drawn.
            seed: of the draws; each rank needs another one.
            device: of the batches.
        """
        tokenizer = self.tokenizer
        counts = torch.zeros(vocabulary, dtype=torch.int64)
        known = torch.from_numpy(self.counts)[:vocabulary]
        counts[: len(known)] = known
        continues = continues_word(tokenizer, vocabulary) if config.whole_word else None
        special_ids = tokenizer.all_special_ids
        return DynamicMasking(counts.to(device), special_ids, tokenizer.mask_token_id, config, seed, continues)


def open_text(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    documents: Source | None = None,
    progress: Progress = silent,
) -> Text:
    """Read, split, tokenise and arrange a text; a second time, all of it is found in the cache.

    Args:
        config: the text, and what to make of it.
        tokenizer: that of the teacher.
        documents: the text, where it is none that `config` can name; `config.held_out` may name the held-out part.
        progress: is told what is being done; see `progress_bars`.

    Raises:
        InputError: the text cannot be read, or is too small; the tokenizer is none of a masked language model; the
            cache cannot be written.
    """
    specials_of(tokenizer)
    cache = config.cache or cache_folder()
    make_writable(cache, "cache")
    if config.streaming:
        return _streamed(config, tokenizer, cache, progress)
    training, held_out = (
        (documents, held_out_source(config, cache)) if documents is not None else open_sources(config, cache)
    )
    every, workers = config.held_out_every, config.workers
    tokenised = tokenise(training, held_out, every, tokenizer, cache, workers, progress)
    sequences = {
        name: _arranged(name, part, tokenised.key, config, tokenizer)
        for name, part in (("training", tokenised.training), ("held_out", tokenised.held_out))
    }
    summary = _summary("training", tokenised.training, sequences["training"])
    summary |= _summary("held_out", tokenised.held_out, sequences["held_out"])
    return Text(**sequences, counts=tokenised.counts, summary=summary, tokenizer=tokenizer, config=config)


def _arranged(name: str, part: Part, key: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Sequences:
    length, arrangement = config.sequence_length, config.arrangement
    sequences = arrange(part, length, arrangement, specials_of(tokenizer), f"{key} {name}")
    if len(sequences) < MINIMUM_SEQUENCES:
        raise InputError(
            f"The text is too small: expected at least {MINIMUM_SEQUENCES} sequences of {length} tokens both for "
            f"training and held out, got {len(sequences)} ({name}). Give more text, shorter sequences, or a held_out "
            "part of its own."
        )
    return sequences


def _streamed(config: DataConfig, tokenizer: PreTrainedTokenizerBase, cache: Path, progress: Progress) -> Text:
    if config.dataset is None or config.text:
        raise InputError("data: streaming needs a `dataset`, and no `text`. Text files are read as they are anyway.")
    stream = load(config, config.split, cache)
    assert isinstance(stream, IterableDataset)
    held_out = held_out_source(config, cache)
    if held_out is None:
        rows = list(documents_from_rows(row[config.column] for row in stream.take(HELD_OUT_ROWS)))
        held_out = documents_source(f"{config.dataset}, the first {HELD_OUT_ROWS} rows", rows)
        stream = stream.skip(HELD_OUT_ROWS)
    nothing = documents_source("nothing", [])
    tokenised = tokenise(nothing, held_out, 2, tokenizer, cache, config.workers, progress)
    sequences = _arranged("held_out", tokenised.held_out, tokenised.key, config, tokenizer)
    counts = np.bincount(tokenised.held_out.tokens, minlength=len(tokenizer))
    counts[tokenizer.sep_token_id] -= len(tokenised.held_out.offsets) - 1  # these end the documents
    return Text(stream, sequences, counts, _summary("held_out", tokenised.held_out, sequences), tokenizer, config)


def _summary(name: str, part: Part, sequences: Sequences) -> dict[str, int]:
    return {
        f"{name}_documents": len(part.offsets) - 1,
        f"{name}_sequences": len(sequences),
        f"{name}_tokens": int(sequences.lengths.sum()),
    }


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """Progress bars of a preparation, which appear with the first report and stay."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(f"{what} (documents)", total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report
