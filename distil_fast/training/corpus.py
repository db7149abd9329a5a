"""English prose without a download: the docstrings of Python's library and of packages that torch users have.

Files are parsed, never imported, and read in a fixed order, so the same installation gives the same text. Only
paragraphs of running prose are kept: no code, tables, signatures or formulas. It knows nothing of tokens.
Next: data.py, which splits and packs the documents.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from distil_fast.training.documents import Document

# All are dependencies of this package or of torch, but none is required: one that is absent adds no documents.
PACKAGES = ("numpy", "sympy", "networkx", "matplotlib", "mpmath", "jinja2", "fsspec", "huggingface_hub", "rich")
SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "dist-packages", "_vendor"}

FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been but by can do does for from has have if in into is it its may more must no not of "
        "on one only or other should so such than that the their then there these they this to used was when where "
        "which will with you",
    )
)
MARKUP = (
    (re.compile(r":[a-z:]+:`~?\.?([^`<]*?)(?:\s*<[^`]*>)?`"), r"\1"),  # :func:`name`, :ref:`text <target>`
    (re.compile(r"`{1,2}([^`]*)`{1,2}_{0,2}"), r"\1"),  # ``code``, `name`, `link`_
    (re.compile(r"\*{1,2}([^*]+)\*{1,2}"), r"\1"),  # *emphasis*
    (re.compile(r"\s+"), " "),
)
MINIMUM_WORDS = 12


def prose(text: str) -> list[str]:
    """The paragraphs of running English in `text`, reStructuredText or Markdown, each on one line, markup removed."""
    return [p for block in re.split(r"\n\s*\n", text) if (p := _as_prose(block)) is not None]


def _as_prose(block: str) -> str | None:
    lines = [line for line in block.split("\n") if line.strip()]
    if not lines or len({len(line) - len(line.lstrip()) for line in lines}) > 1:
        return None  # several indentations: a parameter list, code, or a figure
    paragraph = " ".join(line.strip() for line in lines)
    for pattern, replacement in MARKUP:
        paragraph = pattern.sub(replacement, paragraph)
    paragraph = paragraph.strip()
    if not paragraph[:1].isupper() or paragraph[-1] not in ".?!:":
        return None
    words = [word.strip(".,;:()?!'\"").lower() for word in paragraph.split(" ")]
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    running = sum(word in FUNCTION_WORDS for word in words)
    if len(words) < MINIMUM_WORDS or letters < 0.92 * len(paragraph) or running < 0.3 * len(words):
        return None
    return paragraph


def _docstrings(source: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            yield from _docstrings_below(ast.parse(source))
    except (SyntaxError, ValueError):  # templates, and files for another Python
        return


def _docstrings_below(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield docstring
    for child in node.body:  # not ast.walk: expressions are most of a tree and hold no docstrings
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings_below(child)


def _source_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.py")):
        if not SKIPPED_FOLDERS.intersection(path.relative_to(folder).parts):
            yield path


def _package_folders() -> Iterator[Path]:
    yield Path(sysconfig.get_paths()["stdlib"])
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        yield from map(Path, (spec.submodule_search_locations if spec else None) or [])


def documents_from_installed_packages() -> list[Document]:
    """Python's language reference, one document a topic, and the docstrings of `PACKAGES`, one document a file."""
    from pydoc_data.topics import topics  # the texts behind help("yield")

    texts = [topics[name] for name in sorted(topics)]
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are millions of objects without cycles: collections would take most of the time
    try:
        for folder in _package_folders():
            for path in _source_files(folder):
                texts.append("\n\n".join(_docstrings(path.read_text("utf-8", errors="replace"))))
    finally:
        if collecting:
            gc.enable()
    documents = (prose(text) for text in texts)
    return [document for document in documents if document]
