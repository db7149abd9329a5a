"""Places in Markdown pages that are filled by a command: between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.

It knows no tables. Next: tables.py and ablation_report.py, which fill them.
"""

from __future__ import annotations

import re

PLACE = re.compile(r"(<!-- (?P<name>[\w-]+):begin -->\n)(?P<text>.*?)(<!-- (?P=name):end -->)", re.DOTALL)


def names(page: str) -> list[str]:
    """The places of a page, in their order."""
    return [place["name"] for place in PLACE.finditer(page)]


def filled(page: str, name: str, text: str) -> str:
    """The page with another text at a place; lines of both marks stay.

    Raises:
        ValueError: there is no such place.
    """
    if name not in names(page):
        raise ValueError(
            f"expected the marks <!-- {name}:begin --> and <!-- {name}:end -->, which are not there. Add them."
        )
    body = text.strip("\n") + "\n"
    return PLACE.sub(lambda place: f"{place[1]}{body}{place[4]}" if place["name"] == name else place[0], page)
