"""Plots as inline SVG without a script: points and lines over two logarithmic axes, and bars from a logarithmic one.

Every mark has a title that a pointer shows. It knows numbers and classes of CSS, html_report.css's, so that a plot
follows light and dark; nothing of what they mean. Next: html_report.py, which draws with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from distil_fast.training.svg_chart import number

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 30, 48  # margins for ticks and titles of axes
SLOT, BAR = 23, 15  # heights of a bar with and without its margin
NAMES, VALUES = 128, 156  # widths kept for the names left of bars and for the words right of them
START = 0.3  # decades that the shortest bar is long
MANY_DECADES = 3  # of an axis, beyond which only powers of ten are marked


class Point(NamedTuple):
    """A measurement, and what a pointer is told about it."""

    x: float
    y: float
    words: str


@dataclass(frozen=True)
class Series:
    """Points of one class of CSS, joined by a line or not."""

    kind: str
    points: Sequence[Point]
    joined: bool = False


class Bar(NamedTuple):
    """A bar: its name, its length, the number at its end in words, and its class."""

    name: str
    value: float
    words: str
    kind: str


class _Axis(NamedTuple):
    """A logarithmic axis: the logarithms of its ends, and the pixels that they lie at."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (math.log10(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        factors = (1,) if self.high - self.low > MANY_DECADES else (1, 2, 5)
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        step = max(1, round((self.high - self.low) / 6)) if factors == (1,) else 1
        values = [factor * 10.0**decade for decade in decades if decade % step == 0 for factor in factors]
        return [v for v in values if self.low - 1e-9 <= math.log10(v) <= self.high + 1e-9]


def _axis(values: Sequence[float], start: float, end: float) -> _Axis:
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.06 * (high - low), 0.08)
    return _Axis(low - margin, high + margin, start, end)


def plot(
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    *,
    roofs: Sequence[tuple[float, str]] = (),
    x_ticks: Sequence[float] = (),
) -> str:
    """Points over two logarithmic axes; what is not positive and finite is left out, nothing if no point is left.

    Args:
        series: later ones lie over earlier ones.
        x_title, y_title: what the axes are, with units.
        roofs: heights of horizontal lines, each with its words.
        x_ticks: where the horizontal axis is marked, instead of at round numbers.
    """
    shown = [Series(s.kind, [p for p in s.points if _drawable(p.x) and _drawable(p.y)], s.joined) for s in series]
    points = [point for s in shown for point in s.points]
    if not points:
        return ""
    across = _axis([p.x for p in points], LEFT, WIDTH - RIGHT)
    up = _axis([*(p.y for p in points), *(y for y, _ in roofs)], HEIGHT - BOTTOM, TOP)
    parts = [_opening(HEIGHT, f"{y_title} over {x_title}"), *_frame(across, up, x_title, y_title, x_ticks)]
    for y, words in roofs:
        row = up(y)
        parts.append(f'<line class="roof" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{row:.1f}" y2="{row:.1f}"/>')
        parts.append(f'<text class="inside" x="{LEFT + 6}" y="{row - 5:.1f}">{escape(words)}</text>')
    for s in shown:
        if s.joined and len(s.points) > 1:
            line = "L".join(f"{across(p.x):.1f} {up(p.y):.1f}" for p in s.points)
            parts.append(f'<path class="line {s.kind}" d="M{line}"/>')
        parts += [
            f'<circle class="dot {s.kind}" cx="{across(p.x):.1f}" cy="{up(p.y):.1f}" r="4">'
            f"<title>{escape(p.words)}</title></circle>"
            for p in s.points
        ]
    return "".join([*parts, "</svg>"])


def bars(shown: Sequence[Bar], title: str, ends: tuple[float, float]) -> str:
    """Named bars, one below the other, over a logarithmic axis between two values that lie within `ends`; a dashed line
    at 1. What is not positive and finite has no bar, only its words."""
    across = _Axis(math.log10(min(ends[0], 1.0)) - START, max(math.log10(ends[1]), 1.0), NAMES, WIDTH - VALUES)
    height = SLOT * len(shown) + 2
    column = across(1.0)
    parts = [_bar(bar, across, 2 + SLOT * number) for number, bar in enumerate(shown)]
    one = f'<line class="roof" x1="{column:.1f}" x2="{column:.1f}" y1="0" y2="{height}"/>'
    return "".join([_opening(height, title), one, *parts, "</svg>"])


def _bar(bar: Bar, across: _Axis, y: float) -> str:
    name = f'<text x="{NAMES - 8}" y="{y + 12:.0f}" text-anchor="end">{escape(bar.name)}</text>'
    if not _drawable(bar.value):
        return f'{name}<text class="inside" x="{NAMES + 4}" y="{y + 12:.0f}">{escape(bar.words)}</text>'
    length = max(across(bar.value) - NAMES, 1.0)
    return (
        f'{name}<rect class="bar {bar.kind}" x="{NAMES}" y="{y:.0f}" width="{length:.1f}" height="{BAR}" rx="2"/>'
        f'<text class="value" x="{NAMES + length + 6:.1f}" y="{y + 12:.0f}">{escape(bar.words)}</text>'
    )


def _drawable(value: float) -> bool:
    return 0 < value < math.inf


def _opening(height: float, label: str) -> str:
    words = escape(label, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{words}">'


def _frame(across: _Axis, up: _Axis, x_title: str, y_title: str, x_ticks: Sequence[float]) -> list[str]:
    parts = []
    for tick in up.ticks():
        row = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{row:.1f}" y2="{row:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{row + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    last = -math.inf
    for tick in x_ticks or across.ticks():
        column = across(tick)
        parts.append(f'<line class="grid" x1="{column:.1f}" x2="{column:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        if column - last > 40:  # pixels that a number needs
            words = f"{tick / 1000:.0f}k" if x_ticks and tick >= 1000 else number(tick)
            parts.append(f'<text x="{column:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{words}</text>')
            last = column
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(x_title)}</text>')
    parts.append(f'<text x="{LEFT}" y="14">{escape(y_title)}</text>')
    return parts
