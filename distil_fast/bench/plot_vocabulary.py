"""The picture of the fused heads over the size of the vocabulary: time and peak memory of everyone, for a README.

It measures nothing. Next: plot.py, which draws the other cases; results.py, whose numbers these are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from distil_fast.bench.cases import LINEAR, PRODUCTS, Case
from distil_fast.bench.plot import COLOURS, FLOOR, LABELS
from distil_fast.bench.results import Results, Row

LINES = {**COLOURS, "liger": "#c58b2a", PRODUCTS: FLOOR}
NAMES = {**LABELS, "liger": "Liger, chunked distillation", PRODUCTS: "the four matrix products alone"}
ROWS = 512  # of the cases that differ in nothing but their vocabulary
MIB = 1 << 20


def cases() -> list[Case]:
    """The cases of the picture, by vocabulary."""
    shown = (case for case in LINEAR if (case.problem, case.rows) == ("linear KL+CE", ROWS))
    return sorted(shown, key=lambda case: case.cols)


def save(results: Results, path: Path) -> None:
    """Writes the picture.

    Raises:
        ValueError: fewer than two of its cases were timed.
    """
    timed = [case for case in cases() if results.ms(case.name, "ours")]
    if len(timed) < 2:
        raise ValueError(
            f"it shows linear cases of {ROWS} rows over at least two vocabularies; this run has {len(timed)}"
        )
    figure = Figure(figsize=(9, 3.6), dpi=160, layout="constrained")
    time, memory = figure.subplots(1, 2)
    _lines(time, results, timed, lambda row: row.timing.p50 if row.timing else None)
    _lines(memory, results, timed, lambda row: row.peak_extra_bytes / MIB if row.peak_extra_bytes else None)
    time.set_title("milliseconds, loss and gradients", fontsize=9, loc="left")
    memory.set_title("MiB at the peak, gradients included", fontsize=9, loc="left")
    machine = results.machine
    figure.suptitle(
        f"KL + CE from hidden states, {ROWS} rows, H = {timed[0].width}, fp32; {machine['cpu']}, threads: "
        f"{machine['threads']}, torch {machine['torch']}, {results.date[:10]}",
        fontsize=9,
        color="#555",
        x=0.01,
        ha="left",
    )
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _lines(axes: Axes, results: Results, timed: list[Case], value: Callable[[Row], float | None]) -> None:
    for name, colour in LINES.items():
        points = [
            (case.cols, y) for case in timed if (row := results.row(case.name, name)) is not None and (y := value(row))
        ]
        if points:
            style = "--" if name == PRODUCTS else "-"
            axes.plot(*zip(*points, strict=True), style, color=colour, label=NAMES[name], marker="o", ms=3, lw=1.6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([case.cols for case in timed], [f"{case.cols // 1000}k" for case in timed], fontsize=8)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("vocabulary", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eee")
