"""From the options of a command to what it measures: suite, device, cases, effort.

It imports what measures only when it runs, and knows neither tables nor formulae. Next: quick.py, suite.py and
train.py, which do it; grid.py for cases made to order.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from distil_fast.bench import cases, grid
    from distil_fast.bench.results import Results
    from distil_fast.bench.suite import Note

NEED_GPU = {"gpu": "gpu", "train-gpu": "train-gpu", "train": "train-gpu"}  # on a GPU: the suite that has its sizes
AXES = ("vocab", "rows", "dtype", "temperature", "labelled", "top_k")
DTYPES = ("fp32", "bf16", "fp16")

Value = TypeVar("Value")


def add_axes(suite: argparse.ArgumentParser) -> None:
    """The options of cases made to order."""
    axes = suite.add_argument_group(
        "cases made to order",
        "Any of these replaces the suite's cases by all combinations of their comma-separated values",
    )
    axes.add_argument("--vocab", metavar="V,..", type=_several(_at_least(1)), help="columns (default: 30522)")
    axes.add_argument("--rows", metavar="N,..", type=_several(_at_least(4)), help="tokens (default: 512)")
    axes.add_argument("--dtype", metavar="D,..", type=_several(_dtype), help=f"of {', '.join(DTYPES)} (default: fp32)")
    axes.add_argument("--temperature", metavar="T,..", type=_several(_positive), help="T (default: 2)")
    axes.add_argument(
        "--labelled",
        metavar="S,..",
        type=_several(_share),
        help="share of tokens that take part, 0.15 or 15%% (default: 1)",
    )
    axes.add_argument("--top-k", metavar="K,..", type=_several(_at_least(1)), help="a teacher's top k, of suite loss")


def _several(one: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    return lambda text: [one(part.strip()) for part in text.split(",")]


def _expected(what: str, text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"expected {what}, got {text!r}")


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise _expected(f"whole numbers of at least {least}", text)
        return int(text)

    return parse


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _positive(text: str) -> float:
    if not 0.0 < (value := _number(text)) < math.inf:
        raise _expected("numbers above 0", text)
    return value


def _share(text: str) -> float:
    value = _number(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    if not 0.0 < value <= 1.0:
        raise _expected("shares above 0 and up to 1", text)
    return value


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise _expected(f"one of {', '.join(DTYPES)}", text)
    return text


# ------------------------------------------------------------------------------------------------ what they ask for


def measured(arguments: argparse.Namespace, note: Note) -> Results:
    """Runs the suite that was asked for; `note` is told what is going on.

    Raises:
        SystemExit: there is no such case, none that fits into memory, or no such device.
    """
    from distil_fast.bench import hosts, integrations, measure, quick

    device = _device(arguments)
    suite = NEED_GPU.get(arguments.suite, arguments.suite) if device == "cuda" else arguments.suite
    effort = measure.QUICK if arguments.quick else measure.FULL
    how = {"processes": arguments.processes, "command": command(arguments), "note": note}
    try:
        if suite == "quick":
            found = quick.run(device, arguments.filter, **how)
        elif suite == "integrations":
            found = integrations.run(_select(arguments, hosts.CASES), effort, **how)
        elif suite in ("train", "train-gpu", "encoders"):
            found = _of_training(arguments, suite, how)
        else:
            found = _of_losses(arguments, suite, device, effort, how)
    except ValueError as error:
        raise SystemExit(f"bench {arguments.suite}: {error}.") from None
    return replace(found, suite=suite)


def _device(arguments: argparse.Namespace) -> str:
    import torch

    there = torch.cuda.is_available()
    always = arguments.suite in ("gpu", "train-gpu")
    if always and arguments.device == "cpu":
        raise SystemExit(f"bench {arguments.suite}: expected a GPU, got --device cpu. Ask suite loss, linear or train.")
    if (always or arguments.device == "cuda") and not there:
        raise SystemExit(f"bench {arguments.suite}: expected a GPU, and torch {torch.__version__} sees none here.")
    if arguments.suite in ("encoders", "integrations") and arguments.device == "cuda":
        raise SystemExit(f"bench {arguments.suite}: expected --device cpu, got cuda: its cases are of a CPU.")
    by_itself = "cuda" if always or (arguments.suite == "quick" and there) else "cpu"
    return arguments.device or by_itself


def _of_training(arguments: argparse.Namespace, suite: str, how: dict[str, Any]) -> Results:
    from distil_fast.bench import encoders, measure, train, train_cases

    if suite == "encoders":
        effort = measure.QUICK if arguments.quick else measure.FULL
        return encoders.run(_select(arguments, train_cases.ENCODERS), effort, **how)
    effort = measure.QUICK if arguments.quick else measure.STEPS
    return train.run(_select(arguments, train_cases.SUITES[suite]), effort, **how)


def _of_losses(arguments: argparse.Namespace, name: str, device: str, effort: Any, how: dict[str, Any]) -> Results:
    from distil_fast.bench import cases, grid, room, suite

    axes = _axes(arguments)
    table = grid.made(name, axes, device) if axes else cases.on_device(name, device)
    chosen, left_out = room.fitting(_select(arguments, table, quick=arguments.quick and not axes))
    for case, reason in left_out.items():
        how["note"](f"{case} is left out: {reason}")
    if not chosen:
        raise ValueError("nothing fits into memory: " + "; ".join(f"{case}: {why}" for case, why in left_out.items()))
    with_memory = name == "loss" and device == "cpu" and not (arguments.quick or arguments.filter or axes)
    found = suite.run(chosen, cases.MEMORY if with_memory else (), effort, **how)
    return replace(found, left_out=left_out)


def _axes(arguments: argparse.Namespace) -> grid.Axes:
    import torch

    from distil_fast.bench import grid

    dtypes = dict(zip(DTYPES, (torch.float32, torch.bfloat16, torch.float16), strict=True))
    given = {name: getattr(arguments, name, ()) for name in AXES}
    given["dtype"] = [dtypes[name] for name in given["dtype"]]
    return grid.Axes(**given)


def _select(
    arguments: argparse.Namespace, table: Sequence[cases.AnyCase], quick: bool | None = None
) -> list[cases.AnyCase]:
    """The cases of the quick run, or all, whose name contains what was asked for."""
    from distil_fast.bench import cases

    chosen = cases.select(table, quick=arguments.quick if quick is None else quick, containing=arguments.filter)
    if not chosen:
        raise ValueError(f"no case's name contains {arguments.filter!r}")
    return chosen


def command(arguments: argparse.Namespace) -> str:
    """The options that matter to the numbers, as one would type them."""
    parts = ["distil-fast bench", arguments.suite]
    parts += ["--quick"] if arguments.quick else []
    parts += ["--filter", repr(arguments.filter)] if arguments.filter else []
    parts += ["--device", arguments.device] if arguments.device else []
    for name in AXES:
        values = getattr(arguments, name, ())
        parts += [f"--{name.replace('_', '-')}", ",".join(map(str, values))] if values else []
    parts += ["--processes", str(arguments.processes)] if arguments.processes > 1 else []
    return " ".join(parts)
