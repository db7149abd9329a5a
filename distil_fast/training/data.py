"""From documents to batches: deduplicate, hold some out, tokenise, pack into sequences, and group by length.

It knows text and token ids; nothing of models. Everything is deterministic: the split depends on the text alone,
the order of batches on a generator. Next: masking.py.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distil_fast.training.arrange import collate
from distil_fast.training.batch import Batch
from distil_fast.training.documents import Document
from distil_fast.training.settings import InputError

DOCUMENT_CHARACTERS = 4000  # a plain text file has no marks of its documents: runs of about this length stand for them
HELD_OUT_EVERY = 20  # documents
MINIMUM_SEQUENCES = 8  # in either part
MINIMUM_TOKENS = 12  # shorter sequences teach nothing; the original drops the same
SORTED_TOGETHER = 50  # batches within which sequences are sorted by length


def documents_from_file(path: Path) -> list[Document]:
    """The lines of a UTF-8 text file as paragraphs, in runs of about `DOCUMENT_CHARACTERS` as documents.

    Raises:
        InputError: no such file, not UTF-8, or nothing in it.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise InputError(f"--text: {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"--text: expected UTF-8 text, and {path} has the byte {error.object[error.start]:#04x} at {error.start}. "
            "Convert it, for example with iconv."
        ) from error
    documents: list[Document] = []
    room = 0
    for line in text.splitlines():
        for paragraph in textwrap.wrap(line, DOCUMENT_CHARACTERS):  # cuts only what is longer than a document
            if room <= 0:
                documents.append([])
                room = DOCUMENT_CHARACTERS
            documents[-1].append(paragraph)
            room -= len(paragraph)
    if not documents:
        raise InputError(f"--text: {path} is empty.")
    return documents


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents: every `HELD_OUT_EVERY`th is held out, the first included.

    A paragraph that occurs again, in whatever document, is dropped first, so that none is in both parts.
    """
    seen: set[str] = set()
    unique = []
    for document in documents:
        fresh = list(dict.fromkeys(paragraph for paragraph in document if paragraph not in seen))
        seen.update(fresh)
        if fresh:
            unique.append(fresh)
    training = [document for index, document in enumerate(unique) if index % HELD_OUT_EVERY]
    return training, unique[::HELD_OUT_EVERY]


def pack(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Tensor]:
    """Sequences `[CLS] ... [SEP]` of at most `length` tokens, int64; a document is cut where a sequence is full.

    Raises:
        InputError: fewer than `MINIMUM_SEQUENCES` result.
    """
    texts = [" ".join(document) for document in documents]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    content = length - 2
    sequences = [
        torch.tensor([start, *ids[i : i + content], end])
        for ids in encoded
        for i in range(0, len(ids), content)
        if len(ids) - i + 2 >= MINIMUM_TOKENS
    ]
    if len(sequences) < MINIMUM_SEQUENCES:
        raise InputError(
            f"The text is too small: expected at least {MINIMUM_SEQUENCES} sequences of {length} tokens both for "
            f"training and held out (1 document in {HELD_OUT_EVERY}), got {len(sequences)}. Give a longer --text."
        )
    return sequences


def batches(
    sequences: Sequence[Tensor], batch_size: int, pad_id: int, generator: torch.Generator | None = None
) -> Iterator[Batch]:
    """One pass over the sequences, in batches of similar length; the last batch may be smaller.

    Without a generator the order is fixed: all sorted by length. With one, sequences are shuffled, sorted within
    pools of `SORTED_TOGETHER` batches, and the batches shuffled in turn.
    """
    count = len(sequences)
    order = list(range(count)) if generator is None else torch.randperm(count, generator=generator).tolist()
    pool = count if generator is None else batch_size * SORTED_TOGETHER
    groups: list[list[int]] = []
    for i in range(0, count, pool):
        by_length = sorted(order[i : i + pool], key=lambda index: len(sequences[index]))
        groups += [by_length[j : j + batch_size] for j in range(0, len(by_length), batch_size)]
    if generator is not None:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    for group in groups:
        yield collate([sequences[index] for index in group], pad_id)


def endless_batches(
    sequences: Sequence[Tensor], batch_size: int, pad_id: int, generator: torch.Generator
) -> Iterator[Batch]:
    """Pass after pass over the sequences, each in a new order."""
    while True:
        yield from batches(sequences, batch_size, pad_id, generator)


def token_counts(sequences: Sequence[Tensor], vocabulary: int) -> Tensor:
    """How often each token id occurs, int64 [vocabulary]."""
    return torch.bincount(torch.cat(list(sequences)), minlength=vocabulary)
