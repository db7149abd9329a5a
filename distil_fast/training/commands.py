"""The commands whose options are the fields of a configuration: `distil-fast train`, `eval` and `env`.

It knows which configuration belongs to which command, and how an error is shown; what a command does is a file of its
own. Next: command_line.py, run.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from distil_fast.training import environment, judge, run
from distil_fast.training.command_line import parse
from distil_fast.training.health import NonFiniteLoss
from distil_fast.training.interrupt import Interrupted
from distil_fast.training.settings import EvalConfig, InputError, TrainConfig


def _train(argv: Sequence[str], prog: str, about: str) -> None:
    run.train(parse(TrainConfig, argv, prog, about, presets=True))


def _eval(argv: Sequence[str], prog: str, about: str) -> None:
    judge.judge_run(parse(EvalConfig, argv, prog, about), Console())


def _env(argv: Sequence[str], prog: str, about: str) -> None:
    parser = argparse.ArgumentParser(prog=prog, description=about)
    parser.parse_args(list(argv))
    Console().print(environment.table(environment.environment()))


COMMANDS = {"train": _train, "eval": _eval, "env": _env}


def run_command(name: str, argv: Sequence[str], about: str) -> int:
    """Runs a command; returns the exit status: 1 for an error, which is one message, 130 after a signal."""
    prog = f"distil-fast {name}"
    try:
        COMMANDS[name](argv, prog, about)
    except (InputError, NonFiniteLoss, FloatingPointError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except Interrupted as stopped:
        print(f"{prog}: {stopped}", file=sys.stderr)
        return 130
    return 0
