"""A line chart as inline SVG: one pale line of every reading, one smooth line over it, round ticks, no script.

It knows numbers and drawing; nothing of what they mean. Colours and text sizes are CSS classes that html_page.css
defines, so that a chart follows light and dark. Next: html_report.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 10, 30  # margins for ticks
POINTS = 600  # more readings than that are thinned by means, as no screen shows them
SMOOTHING = 30  # the running mean's window is one reading in so many; up to twice as many are shown as they are


def line_chart(
    x: Sequence[float], y: Sequence[float], label: str, logarithmic: bool = False, noisy: bool = True
) -> str:
    """An `<svg>` of y over x, with a title for screen readers; readings that are not finite leave a gap.

    Args:
        x: ascending.
        y: as many.
        label: what is shown, in words.
        logarithmic: draw the logarithm of y, with ticks at powers of ten, if it spans more than one; what is not
            positive is left out.
        noisy: draw a running mean over many readings, and these palely behind it.
    """
    decades = logarithmic and _spans_decades(y)
    points = [(float(a), _logarithm(b) if decades else float(b)) for a, b in zip(x, y, strict=True)]
    if not any(math.isfinite(b) for _, b in points):
        return f'<p class="none">No finite reading of {escape(label)}.</p>'
    thinned = _thin(points)
    many = noisy and len(thinned) > 2 * SMOOTHING
    smooth = _running_mean(thinned, len(thinned) // SMOOTHING) if many else thinned
    shown = [b for _, b in smooth if math.isfinite(b)]
    y_ticks = ticks(min(shown), max(shown), whole=True) if decades else ticks(*_range(shown))
    place = _Scale(points[0][0], max(points[-1][0], points[0][0] + 1), y_ticks[0], y_ticks[-1])
    rows = [(tick, number(10.0**tick) if decades else number(tick)) for tick in y_ticks]
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label, quote=True)}">',
        f"<title>{escape(label)}</title>",
        *_axes(place, rows),
    ]
    if many:  # readings beyond the range of the smooth line are cut off, not the range stretched for them
        area = f"{LEFT} {TOP} {WIDTH - LEFT - RIGHT} {HEIGHT - TOP - BOTTOM}"
        box = 'x="{}" y="{}" width="{}" height="{}"'.format(*area.split())
        parts.append(f'<svg {box} viewBox="{area}">{_path("raw", [place(*point) for point in thinned])}</svg>')
    parts.append(_path("smooth", [place(*point) for point in smooth]))
    if len(thinned) <= 2 * SMOOTHING:
        dots = (place(*point) for point in thinned if math.isfinite(point[1]))
        parts += [f'<circle class="dot" cx="{column:.1f}" cy="{row:.1f}" r="3"/>' for column, row in dots]
    return "".join([*parts, "</svg>"])


class _Scale(NamedTuple):
    """Where a reading lies in the drawing."""

    left: float
    right: float
    bottom: float
    top: float

    def __call__(self, a: float, b: float) -> tuple[float, float]:
        across = (a - self.left) / (self.right - self.left)
        up = (b - self.bottom) / (self.top - self.bottom)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def _axes(place: _Scale, rows: Sequence[tuple[float, str]]) -> list[str]:
    parts = []
    for tick, words in rows:
        _, row = place(place.left, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{row:.1f}" y2="{row:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{row + 4:.1f}" text-anchor="end">{words}</text>')
    for tick in ticks(place.left, place.right, 5, whole=True):
        if place.left <= tick <= place.right:
            column, _ = place(tick, place.bottom)
            parts.append(f'<text x="{column:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{number(tick)}</text>')
    return parts


def _spans_decades(y: Sequence[float]) -> bool:
    positive = [value for value in y if 0 < value < math.inf]
    return bool(positive) and max(positive) >= 10 * min(positive)


def _logarithm(value: float) -> float:
    return math.log10(value) if 0 < value < math.inf else math.nan


def _path(kind: str, points: Sequence[tuple[float, float]]) -> str:
    commands = []
    pen_up = True
    for column, row in points:
        if not math.isfinite(row):
            pen_up = True
            continue
        commands.append(f"{'M' if pen_up else 'L'}{column:.1f} {row:.1f}")
        pen_up = False
    return f'<path class="{kind}" d="{"".join(commands)}"/>'


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // POINTS)
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(group[-1][0], sum(b for _, b in group) / len(group)) for group in groups]


def _running_mean(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Of what is finite within the window, centred, narrower at both ends."""
    found = []
    for index, (a, _) in enumerate(points):
        reach = min(window // 2, index, len(points) - 1 - index)
        near = [b for _, b in points[index - reach : index + reach + 1] if math.isfinite(b)]
        found.append((a, sum(near) / len(near) if near else math.nan))
    return found


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From 0 where that wastes less than half of the height."""
    low, high = min(values), max(values)
    if 0 < low < 0.6 * high:
        low = 0.0
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    return low, high


def ticks(low: float, high: float, wanted: int = 4, whole: bool = False) -> list[float]:
    """Round numbers 1, 2 or 5 times a power of ten apart, from at most `low` to at least `high`."""
    span = max(high - low, 1e-12 * max(abs(low), abs(high), 1e-12))
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= wanted)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = 1 - math.floor(math.log10(step))
    return [round(step * index, digits) for index in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """A few digits: 12,000, 0.25, 5e-04."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.3g}"
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
