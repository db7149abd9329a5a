"""The benchmark: `distil-fast bench loss`, or `python -m benchmarks loss` in a checkout.

This file knows the options alone; what they ask for is imported when it runs. Next: cases.py and train_cases.py
for what is measured, suite.py and train.py for how.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from distil_fast.bench.results import Results

NEED_GPU = ("gpu", "train-gpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands and their options."""
    commands = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    for name, text in (
        ("loss", "time, memory and error of the losses against eager and compiled torch and a copy of memory"),
        ("linear", "the fused heads against eager and compiled torch, Liger, and their matrix products alone"),
        ("gpu", "the losses on a GPU, beside eager and compiled torch, Liger, and a copy of memory"),
        ("overhead", "the cost of a call, on tensors so small that nothing else counts"),
        ("train", "whole training steps beside the original DistilBERT trainer's and modern PyTorch's"),
        ("train-gpu", "the same on a GPU, at the shape of BERT-base and DistilBERT"),
        ("integrations", "the losses of other people's trainers, and ours in their place"),
        ("encoders", "parameters and latency of BERT-base and DistilBERT"),
    ):
        suite = commands.add_parser(name, help=text, description=text)
        suite.add_argument("--quick", action="store_true", help="the main cases only, with fewer samples")
        suite.add_argument("--filter", metavar="TEXT", default="", help="only cases whose name contains TEXT")
        suite.add_argument(
            "--processes",
            metavar="K",
            type=_at_least_one,
            default=1,
            help="medians over K fresh processes (default: this one)",
        )
        suite.add_argument("--json", metavar="FILE", type=Path, help="write the results")
        suite.add_argument("--png", metavar="FILE", type=Path, help="draw them")
        suite.add_argument("--html", metavar="FILE", type=Path, help="write a report with plots, one page by itself")
    show = commands.add_parser("show", help="the tables of an earlier run", description="The tables of an earlier run.")
    show.add_argument("files", metavar="FILE", type=Path, nargs="+", help="what --json wrote")
    show.add_argument("--markdown", action="store_true", help="tables in Markdown")
    show.add_argument("--png", metavar="FILE", type=Path, help="draw them; of one FILE")
    show.add_argument("--html", metavar="FILE", type=Path, help="write one report of all of them, with plots")


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def run(arguments: argparse.Namespace) -> int:
    """Runs a suite, or shows an earlier run; 1 if a contender of ours was wrong or failed."""
    from rich.console import Console

    from distil_fast.bench import report, results

    console = Console()
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
    return int(any(row.is_our_fault for found in runs for row in found.rows))


def _draw(runs: Sequence[Results], path: Path) -> None:
    """The picture of one run.

    Raises:
        SystemExit: there are several, or the run has nothing that is drawn.
    """
    from distil_fast.bench import plot, plot_vocabulary

    if len(runs) > 1:
        raise SystemExit(f"bench: no {path}: expected one FILE to draw, got {len(runs)}. --html takes several.")
    over_vocabulary = any(runs[0].row(case.name, "ours") for case in plot_vocabulary.cases())
    try:
        (plot_vocabulary if over_vocabulary else plot).save(runs[0], path)
    except ValueError as error:
        raise SystemExit(f"bench: no {path}: {error}.") from None


def _measured(arguments: argparse.Namespace, console: Console) -> Results:
    """Runs the suite that was asked for."""
    import torch

    from distil_fast.bench import cases, measure, suite, train_cases

    if arguments.suite in NEED_GPU and not torch.cuda.is_available():
        raise SystemExit(f"bench {arguments.suite}: expected a GPU, and torch {torch.__version__} sees none here.")

    def select(table: Sequence[cases.AnyCase]) -> list[cases.AnyCase]:
        chosen = cases.select(table, quick=arguments.quick, containing=arguments.filter)
        if not chosen:
            raise SystemExit(f"bench {arguments.suite}: no case's name contains {arguments.filter!r}.")
        return chosen

    effort = measure.QUICK if arguments.quick else measure.FULL
    with console.status("starting") as status:
        how = {"processes": arguments.processes, "command": _command(arguments), "note": status.update}
        if arguments.suite == "encoders":
            from distil_fast.bench import encoders

            return encoders.run(select(train_cases.ENCODERS), effort, **how)
        if arguments.suite in train_cases.SUITES:
            from distil_fast.bench import train

            return train.run(select(train_cases.SUITES[arguments.suite]), effort, **how)
        if arguments.suite == "integrations":
            from distil_fast.bench import hosts, integrations

            return integrations.run(select(hosts.CASES), effort, **how)
        with_memory = arguments.suite == "loss" and not arguments.quick and not arguments.filter
        memory = cases.MEMORY if with_memory else ()
        return suite.run(select(cases.SUITES[arguments.suite]), memory, effort, **how)


def _command(arguments: argparse.Namespace) -> str:
    """The options that matter to the numbers, as one would type them."""
    parts = ["distil-fast bench", arguments.suite]
    parts += ["--quick"] if arguments.quick else []
    parts += ["--filter", repr(arguments.filter)] if arguments.filter else []
    parts += ["--processes", str(arguments.processes)] if arguments.processes > 1 else []
    return " ".join(parts)
