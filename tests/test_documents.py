"""What the documents say is true: Python blocks run, commands parse by their real parsers, verbs and extras exist.

CONTRIBUTING.md, "The documents", says how a block is marked. It knows no formula; numbers in tables are not its matter.
Next: docs/, mkdocs.yml.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import distil_fast
from distil_fast import bench, cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("pip", "make", "distil-fast", "python", "torchrun", "accelerate", ".ci/run")

MARK = re.compile(r"<!-- test: (skip|needs|setup)\b(.*?)-->", re.DOTALL)
FENCE = re.compile(r"```(\w*)$")


class Block(NamedTuple):
    """A block of code with its language, its first line's number, and what a comment above it says to the test."""

    language: str
    line: int
    text: str
    mark: str
    argument: str


def blocks(page: str) -> Iterator[Block]:
    """Fenced blocks, indented ones, and hidden setups, in order."""
    lines = page.splitlines()
    at, mark, argument = 0, "", ""
    while at < len(lines):
        start = at
        at += 1
        if lines[start].startswith("<!-- test: "):
            while "-->" not in lines[at - 1]:
                at += 1
            found = MARK.fullmatch("\n".join(lines[start:at]).strip())
            assert found, f"line {start + 1}: expected <!-- test: skip REASON -->, needs MODULE, or setup and code"
            mark, argument = found[1], found[2].strip()
            if mark == "setup":
                yield Block("python", start + 2, argument, "", "")
                mark, argument = "", ""
            continue
        if fence := FENCE.match(lines[start]):
            while lines[at] != "```":
                at += 1
            yield Block(fence[1], start + 2, "\n".join(lines[start + 1 : at]), mark, argument)
            at += 1
        elif lines[start].startswith("    ") and (start == 0 or not lines[start - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            text = "\n".join(line[4:] for line in lines[start:at]).rstrip()
            language = "console" if text.split(maxsplit=1)[0] in PROGRAMS else ""
            yield Block(language, start + 1, text, mark, argument)
        elif not lines[start].strip():
            continue
        mark, argument = "", ""


def marked_out(block: Block) -> bool:
    """Whether a block is not for this machine."""
    assert block.mark != "skip" or block.argument, f"line {block.line}: a reason is missing"
    if block.mark == "needs":
        return any(importlib.util.find_spec(module) is None for module in block.argument.split())
    return block.mark == "skip"


def commands(text: str) -> Iterator[list[str]]:
    """A console block's commands as words; comments and continuations are the shell's."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def of_language(*languages: str) -> list[Any]:
    """(page, block) of each block in one of the languages."""
    return [
        pytest.param(page, block, id=f"{page.name}:{block.line}")
        for page in PAGES
        for block in blocks(page.read_text("utf-8"))
        if block.language in languages
    ]


# ------------------------------------------------------------------------------------------------ Python


@pytest.mark.filterwarnings("default")  # those of other people's packages
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page.read_text("utf-8")):
        if block.language == "python" and not marked_out(block):
            code = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's line
            exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_is_fenced(page: Path) -> None:
    """Indented code would be shown without colours, and would not be run."""
    for block in blocks(page.read_text("utf-8")):
        if not block.language:
            uses = re.search(r"^(import|from) \w|distil_fast\.\w+\(|\.backward\(\)", block.text, re.MULTILINE)
            assert not uses, f"{page.name}:{block.line}: {uses and uses[0]!r} belongs into ```python"


# ------------------------------------------------------------------------------------------------ commands


class ParsedError(Exception):
    """Thrown in the place of what a command would do once its options are read."""


def parse_ours(words: list[str]) -> None:
    """`distil-fast WORDS`, read by its own parser and not run."""
    command = cli.COMMANDS[words[0]]
    if isinstance(command, cli.Command):
        parser = argparse.ArgumentParser(exit_on_error=False)
        command.add_options(parser)
        parser.parse_args(words[1:])
        return
    from distil_fast.training import command_line, settings

    kind = {"train": settings.TrainConfig, "eval": settings.EvalConfig, "env": None}[words[0]]
    assert kind or words == ["env"], words
    if kind:
        command_line.parse(kind, words[1:], "distil-fast", "", presets=words[0] == "train")


def parse_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m MODULE ...` or `python FILE ...`, of this repository."""
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file(), words
    elif words[1] == "benchmarks":
        parser = argparse.ArgumentParser(exit_on_error=False)
        bench.add_arguments(parser)
        parser.parse_args(words[2:])
    elif words[1] == "benchmarks.ablation":
        from benchmarks import ablation

        def stop(*_: object) -> None:
            raise ParsedError

        monkeypatch.setattr(ablation, "run", stop)
        with pytest.raises(ParsedError):
            ablation.main(words[2:])
    else:
        assert importlib.util.find_spec(words[1]), words


def parse_launcher(program: str, words: list[str]) -> None:
    """torchrun's and accelerate's own options, then those of ours behind `-m distil_fast.cli`."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    given = (get_args_parser() if program == "torchrun" else launch_command_parser()).parse_args(words)
    assert given.module
    assert given.training_script == "distil_fast.cli"
    parse_ours(given.training_script_args)


def extras() -> set[str]:
    """The names of pyproject.toml's extras; tomllib is not in Python 3.10."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises, or exits, where a command would not be understood."""
    program, *rest = words
    if program == "distil-fast":
        parse_ours(rest)
    elif program == "python":
        parse_python(rest, monkeypatch)
    elif program == "accelerate":
        assert rest[0] == "launch"
        parse_launcher(program, rest[1:])
    elif program == "torchrun":
        parse_launcher(program, rest)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        asked = [word for word in rest if "=" not in word and not word.startswith("-")]
        assert set(asked) <= set(targets), words
    elif program == "pip":
        named = [name for word in rest for name in re.findall(r"(?:distil-fast|\.|whl)\[([\w,]+)\]", word)]
        assert {extra for names in named for extra in names.split(",")} <= extras(), words
    else:
        assert (ROOT / program).is_file(), words


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the file that the guide writes, docs/training.md's mine.yaml."""
    monkeypatch.chdir(tmp_path)
    guide = (ROOT / "docs" / "training.md").read_text("utf-8")
    (configuration,) = (block.text for block in blocks(guide) if block.language == "yaml")
    (tmp_path / "mine.yaml").write_text(configuration)
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("page", "block"), of_language("console"))
def test_commands_are_understood(page: Path, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    if marked_out(block):
        pytest.skip(f"{block.mark} {block.argument}")
    for words in commands(block.text):
        check(words, monkeypatch)


@pytest.mark.usefixtures("folder")
def test_the_configuration_of_the_guide_is_read() -> None:
    from distil_fast.training import command_line, settings

    config = command_line.parse(settings.TrainConfig, ["--config", "mine.yaml"], "distil-fast", "")
    assert config.accumulation_steps == 8
    assert config.data.arrangement == "packed"


@pytest.mark.parametrize(
    "line",
    [
        "distil-fast train --temprature 3",
        "distil-fast bench loss --quik",
        "distil-fast bench speed",
        "python -m benchmarks.ablation --output x --minute-hand 3",
        "python benchmarks/no_such_file.py",
        "make no-such-verb",
        "pip install 'distil-fast[no_such_extra]'",
        "torchrun --nproc_per_node 2 -m distil_fast.cli train --presets mine",
    ],
)
def test_wrong_commands_are_seen(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((Exception, SystemExit)):
        check(next(commands(line)), monkeypatch)


# ------------------------------------------------------------------------------------------------ this file, the site


def test_blocks_are_found() -> None:
    """Blocks of each kind, and the marks above them."""
    page = (
        "text\n\n    make test  # indented\n\nmore\n    not code\n\n```python\nx = 1\n```\n\n"
        "<!-- test: skip a GPU -->\n\n```python\nraise\n```\n\n<!-- test: setup\ny = 2\n-->\n\n    f = sum(x)\n"
    )
    found = [(block.language, block.line, block.text, block.mark) for block in blocks(page)]
    assert found == [
        ("console", 3, "make test  # indented", ""),
        ("python", 9, "x = 1", ""),
        ("python", 15, "raise", "skip"),
        ("python", 19, "y = 2", ""),
        ("", 22, "f = sum(x)", ""),
    ]
    assert [parameter.id for parameter in of_language("python")]
    assert len(of_language("console")) > 5


def test_the_site_has_every_public_name() -> None:
    reference = "\n".join(path.read_text("utf-8") for path in (ROOT / "docs" / "site").glob("*.md"))
    named = re.findall(r"^::: distil_fast\.(\w+)$", reference, re.MULTILINE)
    assert sorted(set(named) - {"integrations"}) == sorted(distil_fast.__all__)


def test_the_navigation_has_every_page() -> None:
    listed = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    made = {"index.md", "contributing.md"}  # by docs/site/pages.py
    assert listed == pages | made


def test_every_python_block_compiles() -> None:
    """Those that are not run here too."""
    for parameter in of_language("python"):
        ast.parse(parameter.values[1].text)
