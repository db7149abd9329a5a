"""What a run found, as tables, for the terminal or in Markdown.

It measures nothing. Next: results.py, whose numbers these are; plot.py for the picture;
train_report.py for training steps.
"""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distil_fast.bench import compare, gains, integrations, targets, train_report
from distil_fast.bench.cases import PRODUCTS, QUICK
from distil_fast.bench.correctness import Errors
from distil_fast.bench.results import Results, Row
from distil_fast.bench.tables import MIB, empty, number

ERRORS = ("loss error", "error", "loss p~q", "error p~q")
STEADY = 0.85  # of the fastest copy
WIDE = 240  # so that no cell is cut where no terminal limits the line

NOTES = (
    "ms: the median. GB/s and % of floor: the operation's least traffic (losses with a gradient and softmax backward 3 "
    "arrays, CE, softmax and KL+CE value 2) at the speed of the copy, credited to everyone. Outside the clock, caches "
    "are emptied before each call, and what a call in place overwrites is refilled; calls of 4x16 are timed 200 at a "
    "time.",
    "Of linear cases the floor is the time of the matrix products alone, by torch.mm in the case's dtype.",
    "Errors are relative, against float64, of the loss and of the gradient or output; p~q: where student and teacher "
    "nearly agree (0.01 between their logits), in every row of a divergence alone, in two rows of the others. Peak "
    "MiB is beyond the inputs; a fresh gradient or output counts, one in place does not.",
    "A fresh gradient of ours uses the memory of a freed one, as in every step of a training but the first; "
    '"first call" writes to memory that is new to the process.',
)


def show(results: Results, console: Console, *, markdown: bool = False) -> None:
    """Prints everything."""
    if markdown or not console.is_terminal:
        console = Console(file=console.file, width=WIDE, color_system=None)
    for line in header(results):
        _say(console, line)
    for table in tables(results):
        console.print()
        table.box = box.MARKDOWN if markdown else box.SIMPLE_HEAD
        console.print(table)
    for row in results.rows:
        if row.refused:
            _say(console, f"{row.case}: {row.contender} was not timed: {row.refused}")
    for case, reason in results.left_out.items():
        _say(console, f"{case} did not run: {reason}")
    for note in notes(results):
        _say(console, note)
    if results.suite == QUICK:
        for line in gains.lines(results):
            _say(console, line)


def show_comparison(old: Results, new: Results, console: Console) -> bool:
    """Prints a run beside an earlier one; whether one of ours became slower beyond noise."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDE, color_system=None)
    found = compare.changes(old, new)
    table = compare.table(found)
    table.box = box.SIMPLE_HEAD
    console.print()
    console.print(table)
    for line in compare.summary(old, new, found):
        _say(console, line)
    return any(change.is_regression for change in found)


def tables(results: Results) -> list[Table]:
    """Those that have rows, of whatever suite it was."""
    of_training, of_losses = train_report.split(results)
    own = integrations.tables(results) or [measurements(of_losses)]
    found = (*train_report.tables(of_training), *own, memory(results), reached(results))
    return [table for table in found if table.row_count]


def notes(results: Results) -> tuple[str, ...]:
    """What a reader of the tables must know."""
    of_training, of_losses = train_report.split(results)
    own = integrations.NOTES if integrations.tables(results) else NOTES
    return (*(own if of_losses.rows else ()), *(train_report.NOTES if of_training.rows else ()))


def _say(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False)


def header(results: Results) -> list[str]:
    """What was run, on what, and how steady the machine was."""
    machine = results.machine
    slowest, fastest = results.copy_range
    medians = f"; medians over {results.processes} processes" if results.processes > 1 else ""
    gpu = f"{machine['gpu']}, CUDA {machine['cuda']}, Triton {machine['triton']}; " if "gpu" in machine else ""
    lines = [
        f"{results.command}  ({results.date}, {results.seconds:.0f} s, commit {machine['commit']})",
        f"{gpu}{machine['cpu']}, threads: {machine['threads']}, {machine['instruction_set']}, "
        f"{machine['memory_gib']} GiB; Python {machine['python']}, torch {machine['torch']}{medians}",
        f"floors from a copy of memory in the same rounds ({results.copy_method}): {slowest:.1f} to {fastest:.1f} "
        "GB/s, read and written",
    ]
    if slowest < STEADY * fastest:
        lines.append(
            "THE MACHINE WAS NOT STEADY: the copy's speed changed from case to case. Compare within a case, and run it "
            "again for the rest."
        )
    if results.canary:
        lines.append(
            f"canary: the copy's slow times were {results.canary.spread:.0%} above its fast ones, and it changed by "
            f"{results.canary.drift:+.0%} from the first to the last"
        )
        if results.canary.noisy:
            lines.append("THE MACHINE WAS TOO NOISY for ratios between cases or runs: something else ran beside this.")
    return lines


def measurements(results: Results) -> Table:
    """Time, rates, ratios, memory and errors of every contender."""
    table = empty("", "ms", "GB/s", "% of floor", "x eager", "x compiled", "peak MiB", *ERRORS)
    for case, rows in results.by_case():
        floor = f"floor {number(rows[0].floor_ms)} ms" if rows[0].floor_bytes else ""
        table.add_row(f"[bold]{escape(case)}[/bold]", floor)
        for row in rows:
            table.add_row(f"  {escape(row.contender)}", *_cells(results, row))
        table.add_section()
    return table


def _cells(results: Results, row: Row) -> list[str]:
    errors = row.errors or Errors(None, float("nan"), None)
    told = (errors.loss, errors.array, errors.near_loss, errors.near)
    shown = ["-" if e is None or e != e else f"{e:.1e}" for e in told]
    if row.timing is None:
        return ["not timed", "", "", "", "", "", *shown]
    ms = row.timing.p50
    rates = ["", ""]
    if row.floor_bytes:
        rates = [f"{row.floor_bytes / ms / 1e6:.1f}", f"{100 * row.floor_ms / ms:.0f}"]
    elif (of_products := results.times_faster(row, PRODUCTS)) is not None:
        rates[1] = f"{100 * of_products:.0f}"
    ratios = [number(results.times_faster(row, than)) for than in ("eager", "compiled")]
    peak = "" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / MIB:.1f}"
    return [number(ms), *rates, *ratios, peak, *shown]


def memory(results: Results) -> Table:
    """What a call takes beyond the gradient."""
    table = empty("memory beyond the gradient", "peak MiB", "MiB a thread")
    for found in results.memory:
        peak = found.peak_extra_bytes / MIB
        table.add_row(escape(found.case), f"{peak:.2f}", f"{peak / results.machine['threads']:.2f}")
    return table


def reached(results: Results) -> Table:
    """The targets, what was measured, and whether that meets them."""
    table = empty("target", "wanted", "measured", "")
    for target, measured, met in targets.judge(results):
        if measured is not None:
            wanted = f"{'<=' if target.at_most else '>='} {number(target.limit)}"
            table.add_row(escape(target.text), wanted, number(measured), "met" if met else "[bold]not met[/bold]")
    return table
