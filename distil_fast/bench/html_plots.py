"""What of a run is drawn: speed by case, time and memory over the sizes, rates under the copy's roof, error over time.

It measures nothing and knows no page. Sizes and dtypes are read from the names of cases, which are all that a stored
run has. Next: svg_plot.py, which draws; html_report.py, which arranges.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import NamedTuple

from distil_fast.bench.cases import DTYPE_NAMES, PRODUCTS
from distil_fast.bench.results import Results, Row
from distil_fast.bench.svg_plot import Bar, Point, Series, bars, plot
from distil_fast.bench.tables import MIB, number

LEGEND = {  # class of CSS: who is drawn so
    "eager": "PyTorch, eager",
    "compiled": "torch.compile",
    "liger": "Liger",
    "other": "others",
    "products": "matrix products alone, copy of memory",
    "ours": "distil_fast",
}
SIZES = re.compile(r"^(?P<before>.*?)(?P<rows>\d+)x(?P<cols>\d+)(?P<after>.*)$")
Drawing = tuple[str, str]  # caption in HTML, SVG
Value = Callable[[Row], "float | None"]


def kind(contender: str) -> str:
    """The class of CSS of a contender."""
    words = contender.replace(",", "").split()
    if words[0] == "ours" or contender == "DistilBERT":
        return "ours"
    return next((word for word in ("eager", "compiled", "liger", PRODUCTS) if word in words), "other")


def legend(results: Results) -> str:
    """Who is drawn how, of those in the run."""
    present = {kind(row.contender) for row in results.rows}
    items = (f'<li class="{name}">{escape(words)}</li>' for name, words in LEGEND.items() if name in present)
    return f'<ul class="legend">{"".join(items)}</ul>'


def yardstick(rows: Sequence[Row]) -> Row | None:
    """The timed contender that the others of its case are compared with: the first that solves the case."""
    return next((row for row in rows if row.timing and row.contender != PRODUCTS), None)


# ------------------------------------------------------------------------------------------------ speed by case


def speed(results: Results) -> list[Drawing]:
    """A drawing of each case: how many times as fast as its yardstick everyone is, on one scale for all cases."""
    cases = {case: rows for case, rows in results.by_case() if yardstick(rows)}
    ratios = {case: [_ratio(row, rows) for row in rows if row.timing] for case, rows in cases.items()}
    every = [ratio for found in ratios.values() for ratio in found]
    return [
        (
            f"{escape(case)} <span>times as fast as {escape(_first(rows).contender)}</span>",
            bars([_bar(row, rows) for row in rows], f"Speed of {case}", (min(every), max(every))),
        )
        for case, rows in cases.items()
    ]


def _first(rows: Sequence[Row]) -> Row:
    found = yardstick(rows)
    assert found is not None
    return found


def _ratio(row: Row, rows: Sequence[Row]) -> float:
    first = _first(rows)
    assert first.timing is not None
    assert row.timing is not None
    return first.timing.p50 / row.timing.p50


def _bar(row: Row, rows: Sequence[Row]) -> Bar:
    if row.timing is None:
        reason = (row.refused or "not timed").partition(":")[0]
        return Bar(row.contender, 0.0, reason, kind(row.contender))
    ratio = _ratio(row, rows)
    words = f"{number(row.timing.p50)} ms, {number(ratio)} x"
    if row.floor_bytes:
        words += f", {100 * row.floor_ms / row.timing.p50:.0f} %"
    return Bar(row.contender, ratio, words, kind(row.contender))


# ------------------------------------------------------------------------------------------------ over the sizes


class Sweep(NamedTuple):
    """Cases that differ in one of their sizes alone."""

    name: str
    axis: str
    rows: list[tuple[int, Row]]  # the size, and a contender's row


def sweeps(results: Results) -> list[Sweep]:
    """Those over the vocabulary, then those over the rows."""
    return [*_sweeps(results, "cols", "rows", "V"), *_sweeps(results, "rows", "cols", "N")]


def _sweeps(results: Results, moving: str, fixed: str, letter: str) -> Iterator[Sweep]:
    found: dict[tuple[str, ...], list[tuple[int, Row]]] = {}
    for row in results.rows:
        sizes = SIZES.match(row.case)
        if sizes and row.timing and (row.floor_bytes or row.contender == PRODUCTS or " H=" in row.case):
            same = (sizes["before"], sizes[fixed], sizes["after"])
            found.setdefault(same, []).append((int(sizes[moving]), row))
    for (before, size, after), rows in found.items():
        if len({number for number, _ in rows}) > 1:
            other = "N" if letter == "V" else "V"
            yield Sweep(f"{before}{other}={size}{after}", letter, sorted(rows, key=lambda pair: pair[0]))


def over_sizes(results: Results) -> list[Drawing]:
    """Time and peak memory of each sweep."""
    drawn = []
    for sweep in sweeps(results):
        axis = "vocabulary" if sweep.axis == "V" else "rows"
        for y_title, value in (("milliseconds", _ms), ("MiB at the peak", _peak_mib)):
            drawing = plot(_lines(sweep.rows, value), axis, y_title, x_ticks=sorted({size for size, _ in sweep.rows}))
            drawn.append((f"{escape(sweep.name)} <span>{y_title} over the {axis}</span>", drawing))
    return [(caption, drawing) for caption, drawing in drawn if drawing]


def _lines(rows: Sequence[tuple[int, Row]], value: Value) -> list[Series]:
    points: dict[str, list[Point]] = {}
    for size, row in rows:
        if y := value(row):
            words = f"{row.contender}, {size}: {number(y)}"
            points.setdefault(row.contender, []).append(Point(size, y, words))
    return [Series(kind(name), found, joined=True) for name, found in points.items()]


def _ms(row: Row) -> float | None:
    return row.timing.p50 if row.timing else None


def _peak_mib(row: Row) -> float | None:
    return row.peak_extra_bytes / MIB if row.peak_extra_bytes else None


# ------------------------------------------------------------------------------------------------ scatter plots


def roofline(results: Results) -> list[Drawing]:
    """The rate that each contender's least traffic went at, under that of a copy in the same run."""
    rows = [row for row in results.rows if row.timing and row.floor_bytes]
    if not rows:
        return []
    slowest, fastest = min(row.copy_gb_per_s for row in rows), max(row.copy_gb_per_s for row in rows)
    roofs = [(fastest, f"copy, fastest {fastest:.0f} GB/s")]
    if slowest < 0.97 * fastest:
        roofs.append((slowest, f"copy, slowest {slowest:.0f} GB/s"))
    drawing = plot(
        _scatter(rows, lambda row: row.floor_bytes / 1e6, _rate), "least traffic of a call, MB", "GB/s", roofs=roofs
    )
    return [("Roofline <span>least traffic over time, against bytes; one point a case and contender</span>", drawing)]


def _rate(row: Row) -> float | None:
    return row.floor_bytes / row.timing.p50 / 1e6 if row.timing else None


def error_over_time(results: Results) -> list[Drawing]:
    """Error of the gradient against time for each dtype, where the models differ and where they nearly agree."""
    drawn = []
    for dtype in DTYPE_NAMES.values():
        rows = [row for row in results.rows if row.timing and row.errors and dtype in row.case.split()]
        for where, value in (("models differ", _error), ("models nearly agree", _near)):
            drawing = plot(_scatter(rows, _ms, value), "milliseconds", "relative error")
            caption = (
                f"{dtype}: error of the gradient over time <span>where the {where}; down and left is better</span>"
            )
            drawn.append((caption, drawing))
    return [(caption, drawing) for caption, drawing in drawn if drawing]


def _error(row: Row) -> float | None:
    return row.errors.array if row.errors else None


def _near(row: Row) -> float | None:
    return row.errors.near if row.errors else None


def _scatter(rows: Sequence[Row], x: Value, y: Value) -> list[Series]:
    """A series of each kind, ours last, on top."""
    points: dict[str, list[Point]] = {name: [] for name in LEGEND}
    for row in rows:
        across, up = x(row), y(row)
        if across is not None and up is not None:
            words = f"{row.contender}: {row.case}; {number(across)}, {up:.3g}"
            points[kind(row.contender)].append(Point(across, up, words))
    return [Series(name, found) for name, found in points.items() if found]
