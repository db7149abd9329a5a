"""Where text comes from: files, folders, lists of documents, and Hugging Face datasets, on disk, on the hub, streamed.

Each source can be read again and again, and has a fingerprint of its content. It knows nothing of tokens, and nothing
of which documents are held out. Next: documents.py for files, tokenise.py for what becomes of the documents.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets import Dataset, DatasetDict, IterableDataset

from distil_fast.training.documents import (
    WIKITEXT_TITLE,
    Document,
    digest_of_files,
    documents_from_lines,
    documents_in,
    text_files,
)
from distil_fast.training.settings import DataConfig, InputError

READERS = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}  # by a file's ending: the builder of load_dataset, and its options
READ_TOGETHER = 1000  # rows

Loaded: TypeAlias = "Dataset | IterableDataset"


@dataclass(frozen=True)
class Source:
    """Documents, and what they are known by.

    Args:
        name: for the reader.
        fingerprint: the same for the same content only.
        documents: starts anew at every call.
    """

    name: str
    fingerprint: str
    documents: Callable[[], Iterator[Document]]


def open_sources(config: DataConfig, cache: Path) -> tuple[Source, Source | None]:
    """The training source and the held-out one, None where documents are to be held out of the first.

    Args:
        cache: folder for the copies that `datasets` makes of local files.

    Raises:
        InputError: none or two sources are named, or what is named cannot be read.
    """
    if bool(config.text) == bool(config.dataset):
        raise InputError(
            "data: expected either `text` (files or folders) or `dataset` (a Hugging Face dataset), got "
            + ("both. Leave one out." if config.text else "neither. Name one.")
        )
    return _training_source(config, cache), held_out_source(config, cache)


def _training_source(config: DataConfig, cache: Path) -> Source:
    if config.dataset is None:
        return text_source(config.text)
    return dataset_source(load(config, config.split, cache), config.column, config.dataset)


def held_out_source(config: DataConfig, cache: Path) -> Source | None:
    """What `config.held_out` names: files and folders, or a split of the dataset."""
    if not config.held_out:
        return None
    if isinstance(config.held_out, str) and config.dataset is not None:
        split = config.held_out
        return dataset_source(load(config, split, cache), config.column, f"{config.dataset}, {split}")
    return text_source([Path(config.held_out)] if isinstance(config.held_out, str) else config.held_out)


def text_source(paths: Sequence[Path]) -> Source:
    """UTF-8 text files and folders of them; see `documents_from_lines` for what a document is.

    Raises:
        InputError: a path is not there, or a file is binary, in another encoding, empty or unreadable.
    """
    files = text_files(paths)
    return Source(
        name=", ".join(map(str, paths)),
        fingerprint=f"text {digest_of_files(files)}",
        documents=lambda: documents_in(files),
    )


def documents_source(name: str, documents: Sequence[Document]) -> Source:
    """Documents that are in memory already."""
    digest = blake2b(digest_size=16)
    for document in documents:
        digest.update("\n".join([*document, "\n"]).encode())
    return Source(name, f"documents {digest.hexdigest()}", lambda: iter(documents))


def dataset_source(dataset: Loaded, column: str, name: str) -> Source:
    """A column of a dataset; see `documents_from_rows` for what a document is."""
    if isinstance(dataset, IterableDataset):  # its held-out part: as much as one waits for
        return documents_source(name, list(documents_from_rows(row[column] for row in dataset)))

    def documents() -> Iterator[Document]:
        batches = dataset.select_columns([column]).iter(READ_TOGETHER)
        return documents_from_rows(chain.from_iterable(batch[column] for batch in batches))

    return Source(name, f"dataset {dataset._fingerprint} {len(dataset)} {column}", documents)


def documents_from_rows(rows: Iterable[str | None]) -> Iterator[Document]:
    """Rows as documents, lines within a row as paragraphs, blank ones left out.

    Where one of the first rows is a title as WikiText has it, rows are lines, and documents begin with such titles.
    """
    texts = (row or "" for row in rows)
    first = list(islice(texts, READ_TOGETHER))
    if any(WIKITEXT_TITLE.fullmatch(text.strip()) for text in first):
        yield from documents_from_lines(chain(first, texts), titled=True)
        return
    for text in chain(first, texts):
        document = [line.strip() for line in text.splitlines() if line.strip()]
        if document:
            yield document


def load(config: DataConfig, split: str, cache: Path) -> Loaded:
    """The dataset that `config.dataset` names: a folder, a file, or "name:configuration" on the hub.

    A folder was written by `save_to_disk`, or holds files that `datasets.load_dataset` reads (JSON lines, CSV, Parquet,
    text), as does a file by its ending.

    Raises:
        InputError: it cannot be found, reached or read, has no such split, or no such column of strings.
    """
    assert config.dataset is not None
    try:
        loaded = _load(config.dataset, split, cache, config.streaming)
    except InputError:
        raise
    except Exception as error:  # whatever foreign files, the hub's client and the network may raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        remedy = (
            "Check the path."
            if Path(config.dataset).exists()
            else "It is no folder here: check the name and the network, or give a folder written by save_to_disk."
        )
        raise InputError(f"dataset: {config.dataset} (split {split}) cannot be loaded: {reason} {remedy}") from error
    _check_column(loaded, config.dataset, config.column)
    return loaded


def _load(name: str, split: str, cache: Path, streaming: bool) -> Loaded:
    path = Path(name)
    options: dict[str, Any] = {"split": split, "streaming": streaming}
    local = options | {"cache_dir": str(cache / "datasets")}  # of the hub, everyone has a cache
    if path.is_file():
        if path.suffix not in READERS:
            raise InputError(f"dataset: expected a file ending in {', '.join(READERS)}, got {name}. Name such a file.")
        builder, reading = READERS[path.suffix]
        return datasets.load_dataset(builder, data_files={split: str(path)}, **reading, **local)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _from_disk(path, split, streaming)
    if path.is_dir():
        return datasets.load_dataset(str(path), **local)
    name, _, configuration = name.partition(":")
    return datasets.load_dataset(name, configuration or None, **options)


def _from_disk(path: Path, split: str, streaming: bool) -> Loaded:
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise InputError(f"dataset: {path} has the splits {', '.join(saved)}, not {split}. Name one of them.")
        saved = saved[split]
    return saved.to_iterable_dataset() if streaming else saved


def _check_column(loaded: Loaded, name: str, column: str) -> None:
    columns = loaded.column_names if isinstance(loaded, Dataset) else list(next(iter(loaded), {}))
    if column not in columns:
        near = difflib.get_close_matches(column, columns, 1)
        hint = f"Did you mean {near[0]!r}?" if near else "Name one of them by `column`."
        raise InputError(f"dataset: {name} has the columns {', '.join(columns)}, not {column!r}. {hint}")
    kind = (loaded.features or {}).get(column)
    if kind is not None and getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise InputError(f"dataset: expected strings in the column {column!r} of {name}, got {kind}. Name another.")
