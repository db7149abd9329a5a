"""The benchmark: `distil-fast bench loss`, or `python -m benchmarks loss` in a checkout.

This file knows the options alone (asked.py what they mean); what they ask for is imported when it runs. Next: cases.py
and train_cases.py for what is measured, suite.py and train.py for how.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distil_fast.bench import asked

if TYPE_CHECKING:
    from rich.console import Console

    from distil_fast.bench.results import Results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands and their options."""
    _add_options(parser)
    commands = parser.add_subparsers(dest="suite", metavar="SUITE", help="by default: quick")
    parser.set_defaults(suite="quick", quick=False, filter="", processes=1)
    for name, text in (
        ("quick", "what you would gain on this machine: losses, a fused head, a training step, in under two minutes"),
        ("loss", "time, memory and error of the losses against eager and compiled torch, TRL's and torchtune's"),
        (
            "linear",
            "the fused heads against eager and compiled torch, other libraries', and their matrix products alone",
        ),
        ("hidden", "the losses of hidden states and attention maps, with and without padding"),
        ("gpu", "the losses on a GPU, beside eager and compiled torch, Liger, and a copy of memory"),
        ("overhead", "the cost of a call, on tensors so small that nothing else counts"),
        ("train", "whole training steps beside the original DistilBERT trainer's and modern PyTorch's"),
        ("train-gpu", "the same on a GPU, at the shape of BERT-base and DistilBERT"),
        ("integrations", "the losses of other people's trainers, and ours in their place"),
        ("encoders", "parameters and latency of BERT-base and DistilBERT"),
    ):
        # what stands before the suite is kept unless it is said again after it
        suite = commands.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        _add_options(suite)
        if name in ("loss", "linear"):
            asked.add_axes(suite)
    show = commands.add_parser("show", help="the tables of an earlier run", description="The tables of an earlier run.")
    show.add_argument("files", metavar="FILE", type=Path, nargs="+", help="what --json wrote")
    show.add_argument("--markdown", action="store_true", help="tables in Markdown")
    show.add_argument("--png", metavar="FILE", type=Path, help="draw them; of one FILE")
    show.add_argument("--html", metavar="FILE", type=Path, help="write one report of all of them, with plots")
    show.add_argument("--compare", metavar="OLD", type=Path, help="beside an earlier run; of one FILE")


def _add_options(suite: argparse.ArgumentParser) -> None:
    """Those of every suite, without defaults."""
    suite.add_argument("--quick", action="store_true", help="the main cases only, with fewer samples")
    suite.add_argument("--filter", metavar="TEXT", help="only cases whose name contains TEXT")
    suite.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where (default: a CPU, but of quick a GPU if there is one; of gpu and train-gpu a GPU)",
    )
    suite.add_argument(
        "--processes", metavar="K", type=_at_least_one, help="medians over K fresh processes (default: this one)"
    )
    suite.add_argument("--json", metavar="FILE", type=Path, help="write the results")
    suite.add_argument("--png", metavar="FILE", type=Path, help="draw them")
    suite.add_argument("--html", metavar="FILE", type=Path, help="write a report with plots, one page by itself")
    suite.add_argument(
        "--compare",
        metavar="OLD",
        type=Path,
        help="beside an earlier run's --json: ratios, and exit status 1 if one of ours is slower beyond noise",
    )


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def run(arguments: argparse.Namespace) -> int:
    """Runs a suite, or shows an earlier run; 1 if a contender of ours was wrong, failed, or is slower than in the run
    that it is compared with."""
    from rich.console import Console

    from distil_fast.bench import report, results

    console = Console()
    old = results.load(arguments.compare) if arguments.compare else None  # before anything runs
    shown = arguments.suite == "show"
    if shown:
        runs = [results.load(file) for file in arguments.files]
    else:
        runs = [_measured(arguments, console)]
        if arguments.json:
            results.save(runs[0], arguments.json)
    for found in runs:
        report.show(found, console, markdown=shown and arguments.markdown)
    if arguments.png:
        _draw(runs, arguments.png)
    if arguments.html:
        from distil_fast.bench import html_report

        html_report.write(runs, arguments.html)
    slower = old is not None and report.show_comparison(old, _only(runs, "--compare"), console)
    return int(slower or any(row.is_our_fault for found in runs for row in found.rows))


def _only(runs: Sequence[Results], option: str) -> Results:
    if len(runs) > 1:
        raise SystemExit(f"bench: {option}: expected one FILE, got {len(runs)}. --html takes several.")
    return runs[0]


def _draw(runs: Sequence[Results], path: Path) -> None:
    """The picture of one run.

    Raises:
        SystemExit: there are several, or the run has nothing that is drawn.
    """
    from distil_fast.bench import plot, plot_vocabulary

    run = _only(runs, "--png")
    over_vocabulary = any(run.row(case.name, "ours") for case in plot_vocabulary.cases())
    try:
        (plot_vocabulary if over_vocabulary else plot).save(run, path)
    except ValueError as error:
        raise SystemExit(f"bench: no {path}: {error}.") from None


def _measured(arguments: argparse.Namespace, console: Console) -> Results:
    """Runs the suite that was asked for."""
    with console.status("starting") as status:
        return asked.measured(arguments, status.update)
