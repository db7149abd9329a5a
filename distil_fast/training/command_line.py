"""From words to a configuration: presets, a YAML file and options, later ones over earlier ones, all of them typed.

The fields, their help and their defaults are settings.py's; parsing is jsonargparse's. It knows nothing of what a
configuration does. Next: settings.py; run.py, which does it.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

from distil_fast.training.results import plain
from distil_fast.training.settings import InputError

PRESETS = Path(__file__).parent / "presets"
CLOSE = 0.6  # how alike two names must be for one to be proposed in the place of the other

Config = TypeVar("Config")


def preset_names() -> list[str]:
    """What `--preset` takes beside a file."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def parse(kind: type[Config], argv: Sequence[str], prog: str, description: str, presets: bool = False) -> Config:
    """The configuration that a command line asks for.

    Args:
        kind: a dataclass of settings.py.
        argv: the words behind the command's name.
        prog, description: of the help.
        presets: whether `--preset NAME` may stand for a file of `presets/`.

    Raises:
        InputError: an option, key or value that is not as `--help` says; with the nearest name of an unknown one.
        SystemExit: after `--help` and `--print_config`, with 0.
    """
    parser = _parser(kind, prog, description, presets)
    try:
        values = parser.parse_args(_without_presets(argv) if presets else list(argv))
        made = parser.instantiate(values)
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise InputError(_explained(str(error), parser)) from error
    fields = {name: value for name, value in vars(made).items() if name not in ("config", "preset")}
    return kind(**fields)


def as_yaml(config: Any) -> str:
    """A configuration as a YAML file that gives it again."""
    return yaml.safe_dump(plain(asdict(config)), sort_keys=False)


def _parser(kind: type[Any], prog: str, description: str, presets: bool) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file of the fields below; later options win")
    if presets:
        names = ", ".join(preset_names())
        parser.add_argument("--preset", metavar="NAME", help=f"one of the configurations that come with it: {names}")
    parser.add_class_arguments(kind, fail_untyped=True)
    return parser


def _without_presets(argv: Sequence[str]) -> list[str]:
    """`--preset NAME` as the configuration file that it stands for.

    Raises:
        InputError: no such preset.
    """
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word != "--preset" and not word.startswith("--preset="):
            words.append(word)
            continue
        name = word.partition("=")[2] or next(rest, "")
        if name not in preset_names():
            raise InputError(
                f"--preset: expected one of {', '.join(preset_names())}, got {name!r}.{_nearest(name, preset_names())}"
            )
        words += ["--config", str(PRESETS / f"{name}.yaml")]
    return words


def _explained(message: str, parser: ArgumentParser) -> str:
    """The parser's message, with the known name that is nearest to an unknown one."""
    known = [action.dest for action in parser._actions]
    unknown = re.findall(r"--([\w.]+)", message) + re.findall(r"option '([\w.]+)'", message)
    hints = [_nearest(name, known) for name in unknown if name not in known]
    return message.strip().rstrip(".") + "." + next((hint for hint in hints if hint), "")


def _nearest(name: str, known: Sequence[str]) -> str:
    """ " Did you mean ...?", or nothing."""
    by_last_part = {one.rpartition(".")[2]: one for one in known}
    close = difflib.get_close_matches(name, known, 1, CLOSE) or [
        by_last_part[part] for part in difflib.get_close_matches(name.rpartition(".")[2], list(by_last_part), 1, CLOSE)
    ]
    return f" Did you mean {close[0]!r}?" if close else ""
