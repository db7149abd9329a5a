"""Where text comes from: strict files, documents and their marks, held-out parts, Hugging Face datasets."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from distil_fast.training import documents as documents_module
from distil_fast.training import sources
from distil_fast.training.documents import (
    DOCUMENT_CHARACTERS,
    digest_of_files,
    documents_in,
    split,
    text_files,
    without_held_out,
)
from distil_fast.training.settings import DataConfig, InputError
from distil_fast.training.sources import documents_from_rows, documents_source, open_sources, text_source

# Streams of `datasets` that are not read to their end leave the closing of files to the collection of garbage.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def silent() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    gc.collect()  # within this mark's reach


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path) -> list[list[str]]:
    return list(text_source([path]).documents())


# ---------------------------------------------------------------------------------------------- documents


def test_a_block_of_lines_is_a_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\ufeffone\n two \r\n\r\n \t\n\nthree\n\n\nfour\nfive")
    assert read(path) == [["one", "two"], ["three"], ["four", "five"]]


def test_titles_as_of_wikitext_begin_documents(tmp_path: Path) -> None:
    text = " \n = First = \n \n One . \n \n = = Section = = \n \n Two . \n \n = A second : one = \n \n Three . \n"
    assert read(write(tmp_path / "a.txt", text)) == [
        ["= First =", "One .", "= = Section = =", "Two ."],
        ["= A second : one =", "Three ."],
    ]
    later = "One .\n\n = Title = \n\nTwo .\n"  # a file that does not begin with one is of blocks
    assert read(write(tmp_path / "b.txt", later)) == [["One ."], ["= Title ="], ["Two ."]]


def test_endless_blocks_and_lines_are_cut_between_words(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(8000)]
    for separator in (" ", "\n"):
        found = read(write(tmp_path / "a.txt", separator.join(words)))
        assert len(found) > 5
        assert [word for document in found for line in document for word in line.split()] == words
        assert all(sum(map(len, document)) < 2 * DOCUMENT_CHARACTERS for document in found)
    unbroken = write(tmp_path / "b.txt", "ü" * 30_000)
    assert "".join(line for document in read(unbroken) for line in document) == "ü" * 30_000


def test_folders_are_read_in_order_and_whole(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/c.txt", "a/ignored.md"):
        write(tmp_path / name, name)
    files = text_files([tmp_path])
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["a/c.txt", "a/z.txt", "b.txt"]
    assert list(documents_in(files)) == [["a/c.txt"], ["a/z.txt"], ["b.txt"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text \xff\xfe more", r"expected UTF-8, and .*file.txt has the byte 0xff at offset 5\. Convert it"),
        ("tail \u20ac".encode()[:-1], r"has the byte 0xe2 at offset 5\."),
        (b"PK\x03\x04 \x00\x01", r"expected text, and .*file.txt has a zero byte at offset 5\. Leave it out"),
        (b"", r"file.txt is empty \(0 bytes"),
        ("\ufeff \n\n \t\n", r"is empty \(9 bytes"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes | str, message: str) -> None:
    write(tmp_path / "good.txt", "good")
    write(tmp_path / "file.txt", content)
    for path in (tmp_path, tmp_path / "file.txt"):
        with pytest.raises(InputError, match=message):
            text_source([path])


def test_the_offset_is_right_far_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "CHUNK_BYTES", 7)
    text = "äöü€ " * 20  # chunks cut characters in every way
    good = write(tmp_path / "good.txt", text)
    assert digest_of_files([good])
    for bad, at in ((b"\xc3(", 0), (b"a\x00", 1)):
        path = write(tmp_path / "bad.txt", text.encode() + bad + text.encode())
        with pytest.raises(InputError, match=rf"at offset {len(text.encode()) + at}\."):
            digest_of_files([path])


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.txt cannot be read: no such file"):
        text_source([tmp_path / "absent.txt"])
    with pytest.raises(InputError, match=r"expected \*\.txt files in the folder .*found none"):
        text_source([tmp_path])


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.txt", "one two"), write(tmp_path / "2.txt", "three")
    first = text_source([one, two]).fingerprint
    assert first == text_source([write(tmp_path / "other" / "1.txt", "one two"), two]).fingerprint
    assert first != text_source([two, one]).fingerprint
    assert first != text_source([write(tmp_path / "1.txt", "one twothree")]).fingerprint
    assert first != text_source([write(tmp_path / "1.txt", "one tw0"), two]).fingerprint
    assert documents_source("", [["a", "b"]]).fingerprint != documents_source("", [["a"], ["b"]]).fingerprint


# ---------------------------------------------------------------------------------------------- parts


def test_split_is_deterministic_and_shares_no_paragraph() -> None:
    documents = [[f"own {i}", f"shared {i % 7}", f"own {i}", f"also own {i}"] for i in range(100)]
    found = list(split(documents, 20))
    assert found == list(split(documents, 20))
    parts = [{p for part, document in found if part == which for p in document} for which in (False, True)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {p for document in documents for p in document}
    assert sum(len(document) for _, document in found) == 207  # each once
    assert [i for i, (part, _) in enumerate(found) if part] == [0, 20, 40, 60, 80]


def test_a_document_of_nothing_new_does_not_shift_the_split() -> None:
    documents = [[f"paragraph {i}"] for i in range(40)]
    assert list(split(documents, 7)) == list(split([*documents[:10], documents[3], *documents[10:]], 7))


def test_what_is_held_out_elsewhere_is_not_trained_on() -> None:
    found = list(without_held_out([["a", "b"], ["c"], ["d", "b", "e"]], [["b", "x"], ["c", "x"]]))
    assert found == [(True, ["b", "x"]), (True, ["c"]), (False, ["a"]), (False, ["d", "e"])]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "REMEMBERED_PARAGRAPHS", 3)
    found = [document for _, document in split([["a", "b", "c", "d", "d", "a"], ["b", "d"]], 2)]
    assert found == [["a", "b", "c", "d", "d"], ["d"]]


# ---------------------------------------------------------------------------------------------- datasets

ROWS = [f"row {i}\nits second line" for i in range(30)]
EXPECTED = [row.split("\n") for row in ROWS]


def saved(tmp_path: Path, kind: str) -> str:
    dataset = Dataset.from_dict({"text": ROWS, "number": list(range(30))})
    path = tmp_path / kind
    match kind:
        case "disk":
            dataset.save_to_disk(str(path))
        case "dict":
            DatasetDict(train=dataset, validation=dataset.select(range(3))).save_to_disk(str(path))
        case "rows.jsonl":
            dataset.to_json(str(path))
        case "rows.csv":
            dataset.to_csv(str(path), index=False)
        case "rows.parquet":
            dataset.to_parquet(str(path))
        case "folder":
            path.mkdir()
            dataset.to_parquet(str(path / "train.parquet"))
            dataset.select(range(3)).to_parquet(str(path / "validation.parquet"))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["disk", "dict", "rows.jsonl", "rows.csv", "rows.parquet", "folder"])
def test_local_datasets(tmp_path: Path, kind: str, streaming: bool) -> None:
    config = DataConfig(dataset=saved(tmp_path, kind), streaming=streaming)
    training, held_out = open_sources(config, tmp_path)
    assert held_out is None
    assert list(training.documents()) == EXPECTED == list(training.documents())
    if kind in ("dict", "folder"):
        held_out = open_sources(DataConfig(dataset=config.dataset, held_out="validation"), tmp_path)[1]
        assert held_out is not None
        assert list(held_out.documents()) == EXPECTED[:3]
        assert held_out.fingerprint != training.fingerprint


def test_rows_as_of_wikitext() -> None:
    rows = ["", " = One = \n", "", " a \n", None, " = = S = = \n", " b ", " = Two = \n", " c \n"]
    assert list(documents_from_rows(rows)) == [["= One =", "a", "= = S = =", "b"], ["= Two =", "c"]]
    assert list(documents_from_rows(rows[3:])) == [["a", "= = S = =", "b"], ["= Two =", "c"]]
    assert list(documents_from_rows(["", "a", "b\n\nc", " "])) == [["a"], ["b", "c"]]
    assert list(documents_from_rows([])) == []


def test_a_held_out_file_beside_a_dataset(tmp_path: Path) -> None:
    config = DataConfig(dataset=saved(tmp_path, "disk"), held_out=[write(tmp_path / "held.txt", "held out")])
    held_out = open_sources(config, tmp_path)[1]
    assert held_out is not None
    assert list(held_out.documents()) == [["held out"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either `text` .* or `dataset` .*, got neither"),
        ({"dataset": "x", "text": [Path("y")]}, "got both"),
        ({"dataset": "{dict}", "split": "test"}, "has the splits train, validation, not test"),
        ({"dataset": "{folder}", "split": "test"}, r"folder \(split test\) cannot be loaded: .*Unknown split"),
        ({"dataset": "{disk}", "column": "txt"}, "has the columns text, number, not 'txt'. Did you mean 'text'"),
        ({"dataset": "{disk}", "column": "number"}, "expected strings in the column 'number' .*, got Value"),
        ({"dataset": "{rows.jsonl}", "column": "x", "streaming": True}, "has the columns text, number, not 'x'"),
        ({"dataset": "{rows.xlsx}"}, "expected a file ending in .jsonl, .*, got .*rows.xlsx"),
        ({"dataset": "{empty}"}, "empty .*cannot be loaded"),
    ],
)
def test_datasets_that_cannot_be_used(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    name = options.get("dataset", "")
    if name.startswith("{"):
        kind = name[1:-1]
        saved(tmp_path, kind)
        if kind == "rows.xlsx":
            write(tmp_path / kind, b"not ours")
        if kind == "empty":
            (tmp_path / kind).mkdir()
        options = options | {"dataset": str(tmp_path / kind)}
    with pytest.raises(InputError, match=message):
        open_sources(DataConfig(**options), tmp_path)


def test_a_broken_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", b"PAR1 and then nothing")
    with pytest.raises(InputError, match=r"rows.parquet \(split train\) cannot be loaded: .* Check the path"):
        open_sources(DataConfig(dataset=str(path)), tmp_path)


def test_the_hub_by_name_and_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> Dataset:
        asked.append((arguments, options))
        return Dataset.from_dict({"text": ROWS})

    monkeypatch.setattr(sources.datasets, "load_dataset", load_dataset)
    for name in ("owner/name:raw-v1", "name"):
        open_sources(DataConfig(dataset=name, split="some"), tmp_path)
    options = {"split": "some", "streaming": False}
    assert asked == [(("owner/name", "raw-v1"), options), (("name", None), options)]


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> Dataset:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (LocalEntryNotFoundError)\nlong trace")

    monkeypatch.setattr(sources.datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"owner/name .*cannot be loaded: Couldn't reach .* check the name"):
        open_sources(DataConfig(dataset="owner/name"), tmp_path)
