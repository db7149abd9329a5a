"""How a table of the benchmark and its numbers look. It knows no measurements. Next: report.py and train_report.py."""

from __future__ import annotations

from rich.table import Table

MIB = 1 << 20


def number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def empty(first: str, *others: str) -> Table:
    """A table of these columns, the first for names and the others for numbers."""
    table = Table(pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
