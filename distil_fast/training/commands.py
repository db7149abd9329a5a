"""The commands whose options are the fields of a configuration: `distil-fast train`, `eval` and `env`.

It knows which configuration belongs to which command, and how an error is shown; what a command does is a file of its
own. Next: command_line.py, run.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from distil_fast.training import environment, judge, run
from distil_fast.training.command_line import parse
from distil_fast.training.settings import EnvironmentConfig, EvalConfig, InputError, TrainConfig


def _train(argv: Sequence[str], prog: str, about: str) -> None:
    run.train(parse(TrainConfig, argv, prog, about, presets=True))


def _eval(argv: Sequence[str], prog: str, about: str) -> None:
    judge.run(parse(EvalConfig, argv, prog, about), Console())


def _env(argv: Sequence[str], prog: str, about: str) -> None:
    environment.show(parse(EnvironmentConfig, argv, prog, about), Console())


COMMANDS = {"train": _train, "eval": _eval, "env": _env}


def run_command(name: str, argv: Sequence[str], about: str) -> int:
    """Runs a command; returns the exit status: 1 for an error, which is one line, 2 for options that do not parse."""
    prog = f"distil-fast {name}"
    try:
        COMMANDS[name](argv, prog, about)
    except (InputError, FloatingPointError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    return 0
