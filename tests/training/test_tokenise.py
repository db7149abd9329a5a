"""Tokenised once: the same arrays however many processes, found again, made anew if broken, refused without room."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from distil_fast.training import tokenise as module
from distil_fast.training.settings import InputError
from distil_fast.training.sources import Source, documents_source
from distil_fast.training.tokenise import TokenisedText, tokenise
from tests.training.conftest import VOCABULARY

SEP = 3


@pytest.fixture(scope="session")
def source(sentences: list[str]) -> Source:
    return documents_source("sentences", [sentences[i : i + 5] for i in range(0, 600, 5)])


def ids_of(document: list[str]) -> list[int]:
    return [VOCABULARY.index(word) for paragraph in document for word in paragraph.split()]


def documents_of(part: module.Part) -> list[list[int]]:
    return [part.tokens[a:b].tolist() for a, b in zip(part.offsets, part.offsets[1:], strict=False)]


def same(a: TokenisedText, b: TokenisedText) -> bool:
    arrays = ((*x.training, *x.held_out, x.counts) for x in (a, b))
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(*arrays, strict=True))


def untouched(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix != ".lock"}


def test_every_token_of_every_document(source: Source, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = tokenise(source, None, 20, tokenizer, tmp_path)
    expected = [[*ids_of(document), SEP] for document in source.documents()]
    assert documents_of(text.held_out) == expected[::20]
    assert documents_of(text.training) == [ids for i, ids in enumerate(expected) if i % 20]
    assert text.training.tokens.dtype == np.uint16
    assert isinstance(text.training.tokens, np.memmap)
    counts = np.bincount(text.training.tokens, minlength=len(tokenizer))
    counts[SEP] = 0  # no document has one of its own
    assert np.array_equal(text.counts, counts)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == [f"text-{text.key}"]


def test_a_held_out_source(source: Source, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    documents = list(source.documents())
    held_out = documents_source("", documents[3:5])
    text = tokenise(source, held_out, 20, tokenizer, tmp_path)
    assert documents_of(text.held_out) == [[*ids_of(document), SEP] for document in documents[3:5]]
    rest = [document for i, document in enumerate(documents) if i not in (3, 4)]
    assert documents_of(text.training) == [[*ids_of(document), SEP] for document in rest]


def test_shards_do_not_show(
    source: Source, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokenise(source, None, 20, tokenizer, tmp_path / "whole")
    monkeypatch.setattr(module, "SHARD_DOCUMENTS", 7)
    monkeypatch.setattr(module, "WRITTEN_TOGETHER", 11)
    reports: list[tuple[str, int, int | None]] = []
    parts = tokenise(source, None, 20, tokenizer, tmp_path / "parts", progress=lambda *report: reports.append(report))
    assert same(whole, parts)
    assert reports[-1] == ("Tokenising", 120, 120)
    assert ("Reading text", 120, None) in reports
    assert [done for what, done, _ in reports if what == "Tokenising"][:3] == [7, 14, 21]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_processes_do_not_show(
    source: Source, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = tokenise(source, None, 20, tokenizer, tmp_path / "alone", workers=1)
    monkeypatch.setattr(module, "PARALLEL_DOCUMENTS", 10)
    assert same(alone, tokenise(source, None, 20, tokenizer, tmp_path / "several", workers=2))
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_a_second_time_nothing_is_done(
    source: Source, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenise(source, None, 20, tokenizer, tmp_path)
    before = untouched(tmp_path)

    def unread() -> Iterator[list[str]]:
        raise AssertionError

    tokenizer("some text", padding="max_length", max_length=5, truncation=True)  # which a fast tokenizer remembers
    second = tokenise(Source("another name", source.fingerprint, unread), None, 20, tokenizer, tmp_path)
    assert same(first, second)
    assert untouched(tmp_path) == before


def test_the_key_is_of_text_split_and_tokenizer(
    source: Source, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    other_tokenizer = type(tokenizer)(vocab={**tokenizer.get_vocab(), "more": len(tokenizer)})
    assert len(other_tokenizer) == len(tokenizer) + 1
    keys = {
        module._key(*arguments)
        for arguments in (
            (source, None, 20, tokenizer),
            (source, None, 21, tokenizer),
            (source, source, 20, tokenizer),
            (documents_source("", [["another"]]), None, 20, tokenizer),
            (source, None, 20, other_tokenizer),
        )
    }
    assert len(keys) == 5


@pytest.mark.parametrize(
    "name", ["text.json", "training.tokens", "training.offsets.npy", "held_out.tokens", "counts.npy"]
)
@pytest.mark.parametrize("damage", ["gone", "empty", "truncated", "foreign"])
def test_what_is_broken_is_made_anew(
    source: Source, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, damage: str
) -> None:
    good = tokenise(source, None, 20, tokenizer, tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    path = tmp_path / "bad" / f"text-{good.key}" / name
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "foreign": b"[1] something else"}.get(damage, b""))
    if damage == "gone":
        path.unlink()
    assert same(good, tokenise(source, None, 20, tokenizer, tmp_path / "bad"))
    assert path.read_bytes() == content


def test_leftovers_of_a_killed_process_are_removed(
    source: Source, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    key = module._key(source, None, 20, tokenizer)
    for left in (f".text-{key}.abc", f".text-{key}.def"):  # of the text, and of the arrays
        (tmp_path / left).mkdir()
        (tmp_path / left / "training.arrow").write_text("half")
    tokenise(source, None, 20, tokenizer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".text-{key}.lock", f"text-{key}"]


def test_an_error_in_the_text_leaves_nothing(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    def documents() -> Iterator[list[str]]:
        yield ["the old cat"]
        raise InputError("no more")

    with pytest.raises(InputError, match="no more"):
        tokenise(Source("", "x", documents), None, 20, tokenizer, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@contextmanager
def room_for(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [1000, 6000])  # bytes of a file: too few for the text, and for the tokens
def test_no_room(source: Source, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, size: int) -> None:
    with room_for(size), pytest.raises(InputError, match=r"cannot be written to .*: .* MiB are free there. Make room"):
        tokenise(source, None, 20, tokenizer, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    tokenise(source, None, 20, tokenizer, tmp_path)


def test_a_folder_that_cannot_be_written(source: Source, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache: the folder .* cannot be made: Not a directory"):
        tokenise(source, None, 20, tokenizer, tmp_path / "file" / "cache")


def test_a_share_that_leaves_nothing(source: Source, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="held_out_every: expected 2 or more documents, got 1"):
        tokenise(source, None, 1, tokenizer, tmp_path)


def test_larger_vocabularies(source: Source, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    words = {**tokenizer.get_vocab()} | {f"word{i}": len(tokenizer) + i for i in range(1 << 16)}
    larger = type(tokenizer)(vocab=words)
    documents = [["the old cat word65000"]] * 2 + [["word65535 a dog"], ["the"]]
    text = tokenise(documents_source("", documents), None, 2, larger, tmp_path)
    assert text.training.tokens.dtype == np.int32
    assert documents_of(text.training) == [[words["word65535"], *ids_of(["a dog"]), SEP]]
    assert json.loads((tmp_path / f"text-{text.key}" / "text.json").read_text())["dtype"] == "int32"
