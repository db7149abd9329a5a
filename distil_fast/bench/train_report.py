"""Training steps as tables: tokens a second, ratios and memory of each contender, and where its time goes.

It measures nothing. Next: train.py, whose rows these are; report.py, which prints them.
"""

from __future__ import annotations

from dataclasses import replace

from rich.markup import escape
from rich.table import Table

from distil_fast.bench.results import Results, Row
from distil_fast.bench.tables import MIB, empty, number
from distil_fast.bench.train_cases import (
    BERT_BASE,
    COMPILED,
    EAGER,
    LOSS_ALONE,
    MASKED,
    MASKING,
    ORIGINAL,
    PADDING,
    PARAMETERS,
    PARTS,
    SYNCS,
    TOKENS,
)

NOTES = (
    "A step is forward, backward, clipping, AdamW and schedule of one micro-batch; weights, sequences and masked "
    "tokens are the same for everyone, weights random and float32, dropout off. Tokens are real ones, without "
    "padding. x original: always than the original's own objective, KL on all real tokens; x modern and x compiled: "
    "than the one with KL on the same tokens.",
    "Errors are relative differences to the original's losses (the worst of them) and gradient; of masked KL, to its "
    "restrict_ce_to_mask. Peak MiB: beyond weights and AdamW's moments; gradients count. Host syncs on a CPU are "
    "operators that would make a GPU's host wait.",
    "Parts are of a step by itself, the clock read at each border. The loss alone is measured on logits that are whole "
    "in memory, also where a step never has them; it belongs to heads and loss. Masking comes before the step.",
)


def split(results: Results) -> tuple[Results, Results]:
    """The rows that are of training steps or encoders, and the others."""
    told = [TOKENS in row.facts or PARAMETERS in row.facts for row in results.rows]
    mine, others = (
        [row for row, is_mine in zip(results.rows, told, strict=True) if is_mine is w] for w in (True, False)
    )
    return replace(results, rows=mine), replace(results, rows=others)


def tables(results: Results) -> list[Table]:
    """Those of a run of training steps, or of encoders; none of another run."""
    if any(TOKENS in row.facts for row in results.rows):
        return [measurements(results), parts(results)]
    if any(PARAMETERS in row.facts for row in results.rows):
        return [encoders(results)]
    return []


def measurements(results: Results) -> Table:
    """Time, tokens a second, ratios, memory and errors of every contender."""
    table = empty(
        "", "ms", "tokens/s", "x original", "x modern", "x compiled", "syncs", "peak MiB", "error", "grad. error"
    )
    for case, rows in results.by_case():
        tokens, padding = rows[0].facts[TOKENS], rows[0].facts[PADDING]
        table.add_row(f"[bold]{escape(case)}[/bold]", f"{tokens:.0f} tokens", f"{padding:.1%} pad")
        for row in rows:
            table.add_row(f"  {escape(row.contender)}", *_cells(results, row))
        table.add_section()
    return table


def _cells(results: Results, row: Row) -> list[str]:
    errors = ["-" if not row.errors or e is None else f"{e:.1e}" for e in (row.errors or (None, None))[:2]]
    syncs = f"{row.facts[SYNCS]:.0f}" if SYNCS in row.facts else "-"
    if row.timing is None:
        return ["not timed", "", "", "", "", syncs, "", *errors]
    ms = row.timing.p50
    suffix = MASKED if row.contender.endswith(MASKED) else ""
    others = (results.ms(row.case, name) for name in (ORIGINAL, EAGER + suffix, COMPILED + suffix))
    ratios = [number(other / ms) if other else "" for other in others]
    peak = "" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / MIB:.0f}"
    return [number(ms), f"{1e3 * row.facts[TOKENS] / ms:,.0f}", *ratios, syncs, peak, *errors]


def parts(results: Results) -> Table:
    """Where the time of each contender's step goes."""
    table = empty("ms of a step's parts", *PARTS, LOSS_ALONE, MASKING)
    for case, rows in results.by_case():
        taken_apart = [row for row in rows if row.parts]
        if taken_apart:
            table.add_row(f"[bold]{escape(case)}[/bold]")
        for row in taken_apart:
            cells = [number(row.parts[part]) for part in (*PARTS, LOSS_ALONE, MASKING)]
            table.add_row(f"  {escape(row.contender)}", *cells)
        table.add_section()
    return table


def encoders(results: Results) -> Table:
    """Size and latency of both encoders."""
    table = empty("", "million parameters", "ms", f"x {BERT_BASE}")
    for case, rows in results.by_case():
        table.add_row(f"[bold]{escape(case)}[/bold]")
        for row in rows:
            ratio = number(results.times_faster(row, BERT_BASE))
            ms = number(results.ms(case, row.contender))
            table.add_row(f"  {escape(row.contender)}", f"{row.facts[PARAMETERS] / 1e6:.2f}", ms, ratio)
        table.add_section()
    return table
