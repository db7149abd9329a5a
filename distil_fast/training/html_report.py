"""The report at the end of a run: one HTML page that needs nothing else, not even a script.

Summary first, then the comparison, curves, configuration and environment; it follows the reader's screen and their
choice of light or dark. It knows results and HTML, not how they came about. Next: comparison.py, svg_chart.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from distil_fast.training.atomic import replacing
from distil_fast.training.comparison import MISSING, TITLES, column_titles, in_columns, measures, summary
from distil_fast.training.progress import duration
from distil_fast.training.results import STEP, ModelResults, RunResults, plain
from distil_fast.training.svg_chart import line_chart, number

CHOSEN = {"learning_rate"}  # what is not measured has no noise
LOGARITHMIC = {"pseudo_perplexity"}  # curves that fall by orders of magnitude


def page(results: RunResults) -> str:
    """The whole page."""
    parts = [_section("Comparison", _comparison(results.models)) if results.models else ""]
    parts.append(_section("Training", _charts(results.history)))
    parts.append(_section("Held-out text while training", _charts(results.evaluations)))
    parts.append(_section("Speed, tokens a second", _speeds(results.speeds)))
    details: dict[str, Mapping[str, Any]] = {
        "Text": results.text,
        "Time": {name: duration(s) for name, s in results.seconds.items()},
    }
    for title, entries in details.items():
        parts.append(_section(title, _definitions(entries)))
    if results.configuration:
        text = yaml.safe_dump(plain(results.configuration), sort_keys=False, allow_unicode=True)
        parts.append(_section("Configuration", f"<pre>{escape(text)}</pre>"))
    parts.append(_section("Environment", _definitions(results.environment)))
    style = resources.files(__package__).joinpath("html_report.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(results.title)}</title>\n<style>\n{style}</style></head>\n<body><main>\n"
        f"<h1>{escape(results.title)}</h1>\n{_cards(summary(results))}\n{''.join(parts)}"
        "</main></body></html>\n"
    )


def write(results: RunResults, path: Path) -> None:
    """Write the page; the file appears whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(page(results), "utf-8")


# ------------------------------------------------------------------------------------------------ parts of the page


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n" if content else ""


def _cards(numbers: Sequence[tuple[str, str, str]]) -> str:
    cards = (
        f"<div><b>{escape(value)}</b><span>{escape(what)}</span><small>{escape(words)}</small></div>"
        for value, what, words in numbers
    )
    return f'<div class="cards">{"".join(cards)}</div>'


def _comparison(models: Mapping[str, ModelResults]) -> str:
    ordered = in_columns(models)
    rows = [[measure.title, *measure.cells()] for measure in measures(ordered)]
    return _table(["", *column_titles(ordered)], rows, "comparison")


def _speeds(speeds: Mapping[str, Mapping[str, float]]) -> str:
    if not speeds:
        return ""
    contenders = list(dict.fromkeys(name for found in speeds.values() for name in found))
    rows = []
    for what, found in speeds.items():
        rows.append([what, *(f"{found[name]:,.0f}" if name in found else MISSING for name in contenders)])
    return _table(["", *contenders], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "speeds") -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _charts(columns: Mapping[str, Sequence[float]]) -> str:
    steps = columns.get(STEP, ())
    if len(steps) < 2:  # one reading is no curve, and the comparison has it
        return ""
    names = sorted(
        (n for n in columns if n != STEP), key=lambda n: list(TITLES).index(n) if n in TITLES else len(TITLES)
    )
    figures = []
    for name in names:
        title = TITLES.get(name, name.replace("_", " "))
        last = next((value for value in reversed(columns[name]) if math.isfinite(value)), math.nan)
        chart = line_chart(
            steps, columns[name], f"{title} over optimiser steps", name in LOGARITHMIC, name not in CHOSEN
        )
        figures.append(
            f"<figure><figcaption>{escape(title)} <b>{escape(number(last)) if math.isfinite(last) else MISSING}</b>"
            f"</figcaption>{chart}</figure>"
        )
    return f'<div class="charts">{"".join(figures)}</div>'


def _definitions(entries: Mapping[str, Any]) -> str:
    if not entries:
        return ""
    rows = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{_value(entry)}</dd>" for name, entry in entries.items()
    )
    return f"<dl>{rows}</dl>"


def _value(entry: Any) -> str:
    """Plain data in words; what is nested, one line for each entry."""
    if isinstance(entry, Mapping):
        return "<br>".join(f"{escape(str(name))}: {_value(part)}" for name, part in entry.items())
    if isinstance(entry, (list, tuple)):
        return "<br>".join(_value(part) for part in entry) or "none"
    if isinstance(entry, int) and not isinstance(entry, bool):
        return f"{entry:,}"
    return escape("unknown" if entry is None else str(entry))
