"""The report at the end of a run: one HTML page that needs nothing else, not even a script.

Summary first, then the comparison, curves, configuration and environment. It knows results, not how they came about,
nor what the page is made of. Next: html_page.py, comparison.py, svg_chart.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from distil_fast.training.atomic import replacing
from distil_fast.training.comparison import MISSING, TITLES, column_titles, in_columns, measures, summary
from distil_fast.training.html_page import cards, definitions, document, figures, section, table
from distil_fast.training.progress import duration
from distil_fast.training.results import STEP, ModelResults, RunResults, plain
from distil_fast.training.svg_chart import line_chart, number

CHOSEN = {"learning_rate"}  # what is not measured has no noise
LOGARITHMIC = {"pseudo_perplexity"}  # curves that fall by orders of magnitude


def page(results: RunResults) -> str:
    """The whole page."""
    parts = [section("Comparison", _comparison(results.models)) if results.models else ""]
    parts.append(section("Training", _charts(results.history)))
    parts.append(section("Held-out text while training", _charts(results.evaluations)))
    parts.append(section("Speed, tokens a second", _speeds(results.speeds)))
    details: dict[str, Mapping[str, Any]] = {
        "Text": results.text,
        "Time": {name: duration(s) for name, s in results.seconds.items()},
    }
    for title, entries in details.items():
        parts.append(section(title, definitions(entries)))
    if results.configuration:
        text = yaml.safe_dump(plain(results.configuration), sort_keys=False, allow_unicode=True)
        parts.append(section("Configuration", f"<pre>{escape(text)}</pre>"))
    parts.append(section("Environment", definitions(results.environment)))
    return document(results.title, f"{cards(summary(results))}\n{''.join(parts)}")


def write(results: RunResults, path: Path) -> None:
    """Write the page; the file appears whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(page(results), "utf-8")


# ------------------------------------------------------------------------------------------------ parts of the page


def _comparison(models: Mapping[str, ModelResults]) -> str:
    ordered = in_columns(models)
    rows = [[measure.title, *measure.cells()] for measure in measures(ordered)]
    return table(["", *column_titles(ordered)], rows, "comparison")


def _speeds(speeds: Mapping[str, Mapping[str, float]]) -> str:
    if not speeds:
        return ""
    contenders = list(dict.fromkeys(name for found in speeds.values() for name in found))
    rows = []
    for what, found in speeds.items():
        rows.append([what, *(f"{found[name]:,.0f}" if name in found else MISSING for name in contenders)])
    return table(["", *contenders], rows)


def _charts(columns: Mapping[str, Sequence[float]]) -> str:
    steps = columns.get(STEP, ())
    if len(steps) < 2:  # one reading is no curve, and the comparison has it
        return ""
    names = sorted(
        (n for n in columns if n != STEP), key=lambda n: list(TITLES).index(n) if n in TITLES else len(TITLES)
    )
    drawn = []
    for name in names:
        title = TITLES.get(name, name.replace("_", " "))
        last = next((value for value in reversed(columns[name]) if math.isfinite(value)), math.nan)
        chart = line_chart(
            steps, columns[name], f"{title} over optimiser steps", name in LOGARITHMIC, name not in CHOSEN
        )
        drawn.append((f"{escape(title)} <b>{escape(number(last)) if math.isfinite(last) else MISSING}</b>", chart))
    return figures(drawn)
