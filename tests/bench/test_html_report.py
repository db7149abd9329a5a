"""The benchmark's page: nothing from elsewhere, nothing unescaped, every number and reason on it; the plots' axes."""

from __future__ import annotations

import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from distil_fast.bench import html_plots, html_report, results, svg_plot
from distil_fast.bench.correctness import Errors
from distil_fast.bench.measure import Timing
from distil_fast.bench.results import Results, Row

RUNS = Path(__file__).parents[2] / "benchmarks" / "results"
MACHINE = {"cpu": "a <cpu>", "threads": 2, "instruction_set": "avx2", "memory_gib": 8, "python": "3", "torch": "2"}
CASE = "KL+CE fp32 {rows}x{cols} in place T=2"


def row(case: str, contender: str, ms: float, refused: str | None = None) -> Row:
    timing = None if refused else Timing(ms, ms, ms, 30)
    return Row(case, contender, 60_000_000, 50.0, Errors(1e-7, 2e-7, 3e-5), refused, timing, int(ms * 2**20))


@pytest.fixture
def run() -> Results:
    """Two vocabularies; the fastest contender at a tenth of the copy's rate; one that is absent."""
    rows = [
        row(case, name, ms * factor)
        for case, factor in ((CASE.format(rows=512, cols=30522), 1), (CASE.format(rows=512, cols=128256), 4))
        for name, ms in (("eager", 240.0), ("compiled", 60.0), ("ours", 12.0))
    ]
    rows.append(row(rows[0].case, "liger", 1.0, "not available: <liger> is not installed"))
    return Results(rows, "torch copy_", command="bench <loss>", date="2026-11-23", machine={**MACHINE, "commit": "ab"})


class Page(HTMLParser):
    """Tags that are closed in order, and every address."""

    VOID = ("meta", "br")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_says_everything(run: Results, tmp_path: Path) -> None:
    html_report.write([run, run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert not page.addresses
    assert "url(" not in text
    assert text.count("<section>") == 2
    for words in (
        "a &lt;cpu&gt;",
        "bench &lt;loss&gt;",
        "not available: &lt;liger&gt; is not installed",
        "20 x",
        "240",
    ):
        assert words in text
    assert "a <cpu>" not in text
    assert "prefers-color-scheme: dark" in text


def test_every_committed_run_makes_a_page() -> None:
    runs = [results.load(path) for path in sorted(RUNS.glob("*.json"))]
    assert len(runs) > 3
    text = html_report.page(runs)
    Page(text)
    for found in runs:
        assert escape(found.command) in text
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", text.lower())


def test_sizes_are_swept_where_nothing_else_differs(run: Results) -> None:
    (sweep,) = html_plots.sweeps(run)
    assert sweep.axis == "V"
    assert "N=512" in sweep.name
    assert [size for size, found in sweep.rows if found.contender == "ours"] == [30522, 128256]
    assert len(html_plots.over_sizes(run)) == 2  # time and memory
    assert not html_plots.sweeps(Results(run.rows[:3], ""))


def test_the_roof_is_above_the_points(run: Results) -> None:
    ((_, drawing),) = html_plots.roofline(run)
    roof = float(re.findall(r'class="roof"[^>]*y1="([\d.]+)"', drawing)[0])
    heights = [float(y) for y in re.findall(r'<circle[^>]*cy="([\d.]+)"', drawing)]
    assert len(heights) == 6
    assert min(heights) > roof  # pixels run downwards


def test_bars_are_as_long_as_the_logarithm() -> None:
    shown = [svg_plot.Bar("a", value, "", "ours") for value in (1.0, 10.0, 100.0, 0.0)]
    drawing = svg_plot.bars(shown, "t", (1.0, 100.0))
    widths = [float(width) for width in re.findall(r'width="([\d.]+)" height="15"', drawing)]
    assert len(widths) == 3  # what was not timed has none
    assert widths[2] - widths[1] == pytest.approx(widths[1] - widths[0], abs=0.2)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_what_has_no_logarithm_is_left_out(value: float) -> None:
    def of(*values: float) -> str:
        points = [svg_plot.Point(x + 1.0, y, "") for x, y in enumerate(values)]
        return svg_plot.plot([svg_plot.Series("ours", points)], "x", "y")

    assert of(value) == ""
    assert of(1.0, value, 100.0).count("<circle") == 2


@pytest.mark.parametrize(
    ("contender", "kind"),
    [
        ("ours compiled", "ours"),
        ("ours, first call", "ours"),
        ("modern compiled masked", "compiled"),
        ("eager float32", "eager"),
        ("products", "products"),
        ("original", "other"),
    ],
)
def test_the_colour_of_a_contender(contender: str, kind: str) -> None:
    assert html_plots.kind(contender) == kind
