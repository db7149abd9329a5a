"""Text to token ids, once: in parallel, through Arrow files, into flat arrays that are then mapped from the cache.

Each part of a text, for training and held out, is one array of ids in which a separator ends every document, and the
offsets of the documents. Nothing here needs memory for more than a shard of the text. It knows nothing of sequences.
Next: arrange.py, which cuts sequences out of the arrays.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from filelock import FileLock
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from distil_fast.training.atomic import replacing
from distil_fast.training.cache import make_writable
from distil_fast.training.documents import Document, split, without_held_out
from distil_fast.training.settings import InputError
from distil_fast.training.sources import Source

Progress: TypeAlias = Callable[[str, int, "int | None"], None]  # what is done, how much, out of how much

PARTS = ("training", "held_out")
FORMAT = 1  # of the files in the cache
WRITTEN_TOGETHER = 1000  # documents
ENCODED_TOGETHER = 200  # documents
SHARD_DOCUMENTS = 20_000  # tokenised between two reports of the progress
PARALLEL_DOCUMENTS = 500  # per worker: fewer are not worth a process
TEXT_SCHEMA = pa.schema({"text": pa.string()})


def silent(what: str, done: int, total: int | None) -> None:
    """No progress bar."""


class Part(NamedTuple):
    """The documents of one part, as they lie on disk."""

    tokens: NDArray[Any]  # [n] uint16 or int32, mapped; each document, and a separator after it
    offsets: NDArray[np.int64]  # [documents + 1]: document i is tokens[offsets[i] : offsets[i + 1]]


@dataclass(frozen=True)
class TokenisedText:
    """Both parts of a text.

    Args:
        training, held_out: the parts.
        counts: how often each id occurs in the training part, int64 [V] with V the size of the tokenizer.
        key: of text, tokenizer and split together: the name in the cache.
    """

    training: Part
    held_out: Part
    counts: NDArray[np.int64]
    key: str


def tokenise(
    training: Source,
    held_out: Source | None,
    every: int,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    workers: int | None = None,
    progress: Progress = silent,
) -> TokenisedText:
    """The text as token ids, from the cache if it was tokenised before.

    Special tokens are not added but for the separator after each document. Of several processes that ask for the same
    text one does the work and the others wait for it (on a file system that knows locks).

    Args:
        training: the text to train on.
        held_out: the text to evaluate on; None: one document in `every` is taken from `training`. Either way no
            paragraph is in both parts.
        every: see `held_out`.
        tokenizer: its serialised form is a part of the cache's key.
        cache: folder; what is written appears whole or not at all, and what is broken is written anew.
        workers: processes; None: one a core that this process may use.
        progress: is told what is being done.

    Raises:
        InputError: the cache cannot be written, or the disk is full; `every` is below 2.
    """
    if held_out is None and every < 2:
        raise InputError(f"held_out_every: expected 2 or more documents, got {every}.")
    make_writable(cache, "cache")
    key = _key(training, held_out, every, tokenizer)
    folder = cache / f"text-{key}"
    with FileLock(cache / f".text-{key}.lock"):
        found = _open(folder, key)
        if found is not None:
            return found
        for leftover in filter(Path.is_dir, cache.glob(f".text-{key}.*")):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            documents = (
                split(training.documents(), every)
                if held_out is None
                else without_held_out(training.documents(), held_out.documents())
            )
            work = tempfile.mkdtemp(prefix=f".text-{key}.", dir=cache)
            try:
                texts = _write_texts(documents, Path(work), progress)
                with replacing(folder) as scratch:
                    scratch.mkdir()
                    _Tokenising(tokenizer, workers or _cores(), Path(work), progress).write(texts, scratch)
            finally:
                shutil.rmtree(work, ignore_errors=True)
        except (OSError, pa.ArrowException) as error:
            free = shutil.disk_usage(cache).free / 2**20
            raise InputError(
                f"cache: the tokenised text cannot be written to {cache}: {error}; {free:.0f} MiB are free there. Make "
                "room (about six bytes a character while tokenising, one afterwards), or name another folder."
            ) from error
        found = _open(folder, key)
        assert found is not None, folder
        return found


def _key(training: Source, held_out: Source | None, every: int, tokenizer: PreTrainedTokenizerBase) -> str:
    parts = [training.fingerprint, held_out.fingerprint if held_out else every]
    described = json.dumps([FORMAT, *parts, _serialised(tokenizer), tokenizer.sep_token_id], sort_keys=True)
    return blake2b(described.encode(), digest_size=16).hexdigest()


def _serialised(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: its class, vocabulary and arguments are all there is to see
        return [type(tokenizer).__name__, tokenizer.get_vocab(), repr(sorted(tokenizer.init_kwargs.items()))]
    content = json.loads(backend.to_str())
    return content | {"truncation": None, "padding": None}  # which the last call left behind


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------- the cache's files


def _open(folder: Path, key: str) -> TokenisedText | None:
    """What is in the cache, or None: nothing, or files that do not fit each other."""
    try:
        described = json.loads((folder / "text.json").read_text())
        training, held_out = (_open_part(folder, name, described["dtype"], described[name]) for name in PARTS)
        counts = np.load(folder / "counts.npy")
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    separators = len(training.offsets) - 1
    return TokenisedText(training, held_out, counts, key) if counts.sum() + separators == len(training.tokens) else None


def _open_part(folder: Path, name: str, dtype: str, size: int) -> Part:
    path = folder / f"{name}.tokens"
    offsets = np.load(folder / f"{name}.offsets.npy")
    expected = size * np.dtype(dtype).itemsize
    if path.stat().st_size != expected or offsets[0] != 0 or offsets[-1] != size or (np.diff(offsets) < 1).any():
        raise ValueError(f"{path} is broken")
    return Part(np.memmap(path, dtype, "r") if size else np.empty(0, dtype), offsets)  # nothing cannot be mapped


def _write_texts(documents: Iterable[tuple[bool, Document]], work: Path, progress: Progress) -> dict[str, Path]:
    """The text of the documents of each part as an Arrow file."""
    paths = {name: work / f"{name}.arrow" for name in PARTS}
    done = 0
    with ExitStack() as stack:
        files = [stack.enter_context(pa.OSFile(str(path), "wb")) for path in paths.values()]
        writers = [stack.enter_context(pa.ipc.new_stream(file, TEXT_SCHEMA)) for file in files]
        for group in _groups(documents, WRITTEN_TOGETHER):
            for part, writer in enumerate(writers):
                texts = [" ".join(document) for held_out, document in group if held_out == part]
                writer.write_batch(pa.record_batch([pa.array(texts, pa.string())], schema=TEXT_SCHEMA))
            done += len(group)
            progress("Reading text", done, None)
    return paths


def _groups(documents: Iterable[tuple[bool, Document]], size: int) -> Iterator[list[tuple[bool, Document]]]:
    iterator = iter(documents)
    while group := list(islice(iterator, size)):
        yield group


class _Tokenising:
    """From Arrow files of text to the files of the cache, a shard at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, workers: int, work: Path, progress: Progress) -> None:
        self.tokenizer = tokenizer
        self.workers = workers
        self.work = work
        self.progress = progress
        self.dtype = "uint16" if len(tokenizer) <= 1 << 16 else "int32"
        self.encode = _Encode(tokenizer, self.dtype)

    def write(self, texts: dict[str, Path], folder: Path) -> None:
        described: dict[str, Any] = {"dtype": self.dtype}
        parts = {name: Dataset.from_file(str(path)) for name, path in texts.items()}
        self.total = sum(map(len, parts.values()))
        self.done = 0
        for name, dataset in parts.items():
            counts = np.zeros(len(self.tokenizer), np.int64)
            with (folder / f"{name}.tokens").open("wb") as file:
                offsets = self._write_part(dataset, file, counts)
            np.save(folder / f"{name}.offsets.npy", offsets)
            described[name] = int(offsets[-1])
            if name == "training":
                counts[self.tokenizer.sep_token_id] -= len(dataset)  # these are ours
                np.save(folder / "counts.npy", counts)
        (folder / "text.json").write_text(json.dumps(described))

    def _write_part(self, dataset: Dataset, file: BinaryIO, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        lengths = array("q", [0])
        for begin in range(0, len(dataset), SHARD_DOCUMENTS):
            shard = dataset.select(range(begin, min(begin + SHARD_DOCUMENTS, len(dataset))))
            for chunk in self._encoded(shard).data.column("ids").chunks:
                ids = chunk.flatten().to_numpy()
                file.write(np.ascontiguousarray(ids).data)
                counts += np.bincount(ids, minlength=len(counts))
                lengths.frombytes(np.diff(chunk.offsets.to_numpy()).astype(np.int64).tobytes())
            self.done += len(shard)
            self.progress("Tokenising", self.done, self.total)
        return np.frombuffer(lengths, np.int64).cumsum()

    def _encoded(self, shard: Dataset) -> Dataset:
        workers = min(self.workers, len(shard) // PARALLEL_DOCUMENTS)
        with _quiet_workers(workers > 1):
            return shard.map(
                self.encode,
                batched=True,
                batch_size=ENCODED_TOGETHER,
                num_proc=workers if workers > 1 else None,
                remove_columns=["text"],
                features=Features({"ids": List(Value(self.dtype))}),
                load_from_cache_file=False,
                cache_file_name=str(self.work / "ids.arrow"),
                new_fingerprint=f"{self.done:x}",  # or the tokenizer would be hashed for one
            )


class _Encode:
    """A batch of texts to their ids; a class, so that workers can be sent it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, dtype: str) -> None:
        self.tokenizer = tokenizer
        self.dtype = dtype

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[NDArray[Any]]]:
        encoded = token_ids(batch["text"], self.tokenizer)
        return {"ids": [np.array([*ids, self.tokenizer.sep_token_id], self.dtype) for ids in encoded]}


def token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each text, without special tokens, however long it is."""
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return encoded["input_ids"]


@contextmanager
def _quiet_workers(several: bool) -> Iterator[None]:
    """No progress bars of `datasets`, and, in several processes, no threads of `tokenizers`."""
    bars = datasets.are_progress_bars_disabled()
    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    datasets.disable_progress_bars()
    if several:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
        if several:
            del os.environ["TOKENIZERS_PARALLELISM"]
            if threads is not None:
                os.environ["TOKENIZERS_PARALLELISM"] = threads
