"""The picture of a run: time of eager, compiled and ours beside the floor, for a README.

It measures nothing. Next: results.py, whose numbers these are.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distil_fast.bench.cases import LOSS
from distil_fast.bench.contenders import family
from distil_fast.bench.results import Results, Row
from distil_fast.bench.tables import number

COLOURS = {"eager": "#b8bcc4", "compiled": "#7d8694", "ours": "#0b6e69"}
LABELS = {"eager": "PyTorch", "compiled": "torch.compile", "ours": "distil_fast"}
FLOOR = "#d1495b"
PLAIN = {
    case.name
    for case in LOSS
    if case.temperature in (2.0, None) and case.grad_output == 1 and case.labelled == 1 and not case.shifted
}
BAR = 0.26  # its height, where the distance of two cases is 1


def save(results: Results, path: Path) -> None:
    """Writes the picture: the plain cases in which all three were timed.

    Raises:
        ValueError: there are none.
    """
    chosen = [(case, bars) for case, rows in results.by_case() if case in PLAIN and (bars := _bars(rows))]
    if not chosen:
        raise ValueError("it shows the plain cases with eager, compiled and ours timed; this run has none")
    figure = Figure(figsize=(9, 1.4 + 0.62 * len(chosen)), dpi=160, layout="constrained")
    axes = figure.subplots()
    for place, (_, bars) in enumerate(chosen):
        _draw(axes, results, place, bars)
    axes.set_yticks(range(len(chosen)), [case for case, _ in chosen])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    axes.set_xlim(left=0.5 * min(bars["ours"].floor_ms for _, bars in chosen))
    axes.set_xlabel("milliseconds, logarithmic; shorter is better")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    machine = results.machine
    axes.set_title(
        f"{machine['cpu']}, threads: {machine['threads']}, torch {machine['torch']}, {results.date[:10]}",
        fontsize=9,
        color="#555",
        loc="left",
    )
    figure.legend(loc="outside upper left", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _bars(rows: list[Row]) -> dict[str, Row]:
    """The first timed contender of each family, if there is one of all."""
    first: dict[str, Row] = {}
    for row in rows:
        if row.timing and row.floor_bytes:
            first.setdefault(family(row.contender), row)
    return first if first.keys() >= COLOURS.keys() else {}


def _draw(axes: Axes, results: Results, place: int, bars: dict[str, Row]) -> None:
    for offset, (name, colour) in enumerate(COLOURS.items()):
        row = bars[name]
        assert row.timing is not None
        y = place + (offset - 1) * BAR
        label = LABELS[name] if place == 0 else None
        axes.barh(y, row.timing.p50, BAR, color=colour, label=label)
        text = f" {number(row.timing.p50)} ms"
        if name == "ours":
            text += f", {results.times_faster(row, 'eager'):.0f}x"
        axes.text(row.timing.p50, y, text, va="center", fontsize=8)
    floor = bars["ours"].floor_ms
    label = "copy floor" if place == 0 else None
    axes.plot([floor, floor], [place - 1.5 * BAR, place + 1.5 * BAR], color=FLOOR, lw=1.6, label=label)
