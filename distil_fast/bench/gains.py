"""What a run says to a newcomer, in a line a case: from PyTorch as one writes it to distil_fast.

It measures nothing. Next: quick.py, the suite that ends with these lines; report.py, which prints them.
"""

from __future__ import annotations

from collections.abc import Iterator

from distil_fast.bench.results import Results, Row
from distil_fast.bench.tables import MIB, number
from distil_fast.bench.train_cases import COMPILED, ORIGINAL

OURS = "ours"
BEFORE = ("eager", ORIGINAL)  # what is replaced, by the name of the contender
CALLED = {"eager": "eager PyTorch", ORIGINAL: "the original DistilBERT trainer"}
TRACED = ("compiled", COMPILED)


def lines(results: Results) -> list[str]:
    """A heading, a line for every case where both were timed, and what to make of it."""
    found = list(_each(results))
    if not found:
        return ["Nothing was timed both with and without distil_fast: the lines above say why."]
    told = ["", "What you would gain on this machine:", *found]
    if results.canary and results.canary.noisy:
        told.append("  (Rough numbers: something else kept this machine busy. Run it again when it is idle.)")
    return [*told, "Everything: distil-fast bench loss, linear, train. Then: distil-fast bench show FILE."]


def _each(results: Results) -> Iterator[str]:
    for case, _ in results.by_case():
        ours = results.row(case, OURS)
        before = next((row for name in BEFORE if (row := results.row(case, name)) and row.timing), None)
        if ours and ours.timing and before and before.timing:
            yield f"  {case}: {_line(results, before, ours, before.timing.p50 / ours.timing.p50)}"


def _line(results: Results, before: Row, ours: Row, times: float) -> str:
    assert before.timing
    assert ours.timing
    text = (
        f"{number(before.timing.p50)} ms with {CALLED[before.contender]}, {number(ours.timing.p50)} with distil_fast: "
    )
    text += f"{number(times)} x faster" if times >= 1.0 else f"{number(1.0 / times)} x SLOWER"
    traced = next((ms for name in TRACED if (ms := results.ms(ours.case, name))), None)
    if traced:
        text += f" ({number(traced / ours.timing.p50)} x torch.compile)"
    if before.peak_extra_bytes and ours.peak_extra_bytes is not None:
        text += f"; memory {before.peak_extra_bytes / MIB:.0f} -> {ours.peak_extra_bytes / MIB:.0f} MiB"
    if before.errors and ours.errors and before.errors.near and ours.errors.near is not None:
        text += f"; gradient error where the models agree {before.errors.near:.1e} -> {ours.errors.near:.1e}"
    return text
