"""Text files to documents: strict UTF-8, blocks of lines or whole articles, and no paragraph in two parts.

A document is a list of paragraphs. Everything is read line by line, so that a corpus may be larger than memory. It
knows neither tokens nor Hugging Face. Next: sources.py.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, TypeAlias

from distil_fast.training.settings import InputError

Document: TypeAlias = list[str]  # its paragraphs, none of them blank

DOCUMENT_CHARACTERS = 8000  # a block of lines, or a line, that is longer is several documents
REMEMBERED_PARAGRAPHS = 10_000_000  # against which later ones are compared, at about 70 bytes each
CHUNK_BYTES = 1 << 20
WIKITEXT_TITLE = re.compile(r"= [^=](?:.*[^=])? =")  # " = Title = ", but not " = = Section = = "


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and the *.txt files of the folders named and of the folders in them, sorted.

    Raises:
        InputError: a path does not exist, or a folder holds no such file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*.txt") if file.is_file())
            if not found:
                raise InputError(f"text: expected *.txt files in the folder {path}, found none. Name files instead.")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise InputError(f"text: {path} cannot be read: no such file or folder. Check the path.")
    return files


def digest_of_files(files: Sequence[Path]) -> str:
    """A hash of all bytes of the files, in their order; every byte is checked on the way.

    Raises:
        InputError: a file cannot be read, is binary or not UTF-8, or is blank; with its name and the offset in bytes.
    """
    digest = blake2b(digest_size=16)
    for path in files:
        try:
            with path.open("rb") as file:
                size = _check(path, file, digest)
        except OSError as error:
            raise InputError(
                f"text: {path} cannot be read: {error.strerror}. Check the path and its rights."
            ) from error
        digest.update(size.to_bytes(8, "little"))  # two files are not one
    return digest.hexdigest()


def _check(path: Path, file: BinaryIO, digest: blake2b) -> int:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, blank, chunk = 0, True, b"-"
    while chunk:
        chunk = file.read(CHUNK_BYTES)
        digest.update(chunk)
        pending = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise InputError(
                f"text: expected UTF-8, and {path} has the byte {error.object[error.start]:#04x} at offset "
                f"{offset - pending + error.start}. Convert it, for example with iconv, or leave it out."
            ) from error
        if "\0" in text:
            at = offset + chunk.index(0)
            raise InputError(f"text: expected text, and {path} has a zero byte at offset {at}. Leave it out.")
        blank = blank and not text.lstrip("\ufeff").strip()
        offset += len(chunk)
    if blank:
        raise InputError(f"text: {path} is empty ({offset} bytes, no word among them). Leave it out.")
    return offset


def documents_in(files: Sequence[Path]) -> Iterator[Document]:
    """The documents of files that `digest_of_files` has checked, by the rule of `documents_from_lines`."""
    for path in files:
        yield from documents_from_lines(_lines(path))


def documents_from_lines(lines: Iterable[str], titled: bool | None = None) -> Iterator[Document]:
    """Lines as paragraphs; a document is a block of lines between blank ones.

    If `titled`, documents are what stands between titles as WikiText has them (` = Title = `), however long; None: if
    the first line is one. Other blocks end after `DOCUMENT_CHARACTERS` at the latest.
    """
    document: Document = []
    characters = 0
    for line in map(str.strip, lines):
        title = WIKITEXT_TITLE.fullmatch(line) is not None
        if titled is None and line:
            titled = title
        ends = title if titled else not line or characters >= DOCUMENT_CHARACTERS
        if ends and document:
            yield document
            document, characters = [], 0
        if line:
            document.append(line)
            characters += len(line)
    if document:
        yield document


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        rest = ""
        while piece := rest + file.readline(DOCUMENT_CHARACTERS):  # a whole corpus may be one line
            whole = len(piece) < DOCUMENT_CHARACTERS or piece[-1] == "\n"
            cut = len(piece) if whole else piece.rfind(" ") + 1 or len(piece)
            rest = piece[cut:]
            yield piece[:cut]


class Unseen:
    """Keeps what it has seen, and lets nothing pass twice: so that no paragraph is in two parts of a text.

    Paragraphs are known by 64 bits of a hash. Beyond `REMEMBERED_PARAGRAPHS` new ones pass without being remembered,
    so that memory stays below a gigabyte: a corpus of more than about 5 GB is deduplicated against its beginning, and
    against all that is held out, if that comes first.
    """

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def __call__(self, document: Document) -> Document:
        """The paragraphs of `document` that were not there before."""
        return [paragraph for paragraph in document if self._is_new(paragraph)]

    def _is_new(self, paragraph: str) -> bool:
        known = int.from_bytes(blake2b(paragraph.encode(), digest_size=8).digest(), "little")
        if known in self.seen:
            return False
        if len(self.seen) < REMEMBERED_PARAGRAPHS:
            self.seen.add(known)
        return True


def split(documents: Iterable[Document], every: int) -> Iterator[tuple[bool, Document]]:
    """Each document and whether it is held out: one in `every` is, the first included.

    Paragraphs that occurred before are dropped first, whole documents of them are not counted.
    """
    unique = filter(None, map(Unseen(), documents))
    for index, document in enumerate(unique):
        yield index % every == 0, document


def without_held_out(training: Iterable[Document], held_out: Iterable[Document]) -> Iterator[tuple[bool, Document]]:
    """All held-out documents, then those for training, without the paragraphs that occurred before."""
    unseen = Unseen()
    for part, documents in ((True, held_out), (False, training)):
        for document in filter(None, map(unseen, documents)):
            yield part, document
