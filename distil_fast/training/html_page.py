"""An HTML page that needs nothing else, not even a script: its frame and style, sections, numbers on cards, tables.

It follows the reader's screen and their choice of light or dark. It knows HTML, and no results. Next: html_report.py,
the report of a training run; distil_fast/bench/html_report.py, that of the benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

_HEADING = ' class="heading"'


def document(title: str, body: str, style: str = "") -> str:
    """A whole page; `style` is CSS after the common one."""
    common = resources.files(__package__).joinpath("html_page.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title>\n<style>\n{common}{style}</style></head>\n<body><main>\n"
        f"<h1>{escape(title)}</h1>\n{body}"
        "</main></body></html>\n"
    )


def section(title: str, content: str) -> str:
    """A headed part of the page; nothing without content."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n" if content else ""


def cards(numbers: Sequence[tuple[str, str, str]]) -> str:
    """What a reader should take away: number, what it is, and a few words more."""
    shown = (
        f"<div><b>{escape(value)}</b><span>{escape(what)}</span><small>{escape(words)}</small></div>"
        for value, what, words in numbers
    )
    return f'<div class="cards">{"".join(shown)}</div>'


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "", headings: frozenset[int] = frozenset()
) -> str:
    """A table that scrolls by itself where it is too wide. `headings`: numbers of the rows that head those below."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f"<tr{_HEADING if number in headings else ''}>"
        f'<th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for number, row in enumerate(rows)
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def figures(drawn: Sequence[tuple[str, str]]) -> str:
    """Drawings side by side, each under its caption, which is HTML; nothing if there are none."""
    shown = (f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>" for caption, drawing in drawn)
    return f'<div class="charts">{"".join(shown)}</div>' if drawn else ""


def definitions(entries: Mapping[str, Any]) -> str:
    """Plain data by name."""
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
