"""A run's results on disk, on the screen and as a page: nothing lost, nothing from elsewhere, nothing unescaped."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from distil_fast.training import html_report, svg_chart
from distil_fast.training.comparison import in_columns, measures, summary
from distil_fast.training.metrics import Progress
from distil_fast.training.progress import Display, duration, in_words
from distil_fast.training.report import comparison_table
from distil_fast.training.results import ModelResults, RunResults, load, plain, retention, save
from distil_fast.training.settings import InputError


def model(parameters: int, seconds: float, accuracy: float, tasks: dict[str, float]) -> ModelResults:
    return ModelResults(
        parameters,
        4 * parameters,
        latency={"1": seconds, "32": 20 * seconds},
        tokens_per_second={"1": 128 / seconds},
        quality={"accuracy": accuracy, "pseudo_perplexity": 1 / accuracy, "agreement": accuracy, "kl": 1 - accuracy},
        cosines=[0.9, 0.8],
        tasks=tasks,
    )


@pytest.fixture
def results() -> RunResults:
    steps = [float(10 * i) for i in range(1, 201)]
    return RunResults(
        title="A <student> & its teacher",
        configuration={"output": "runs/a", "loss": {"alpha_ce": 5.0}, "text": ["<b>.txt"]},
        environment={"versions": {"torch": "2.13"}, "devices": [{"name": "cpu"}], "threads": 2},
        history={"step": steps, "loss": [5.0 + 40.0 / s for s in steps], "learning_rate": [1e-4] * 200},
        evaluations={"step": [0.0, 1000.0, 2000.0], "pseudo_perplexity": [5000.0, 40.0, math.nan]},
        models={
            "distilled": model(60_000_000, 0.04, 0.5, {"sst2": 0.9, "rte": 0.5}),
            "teacher": model(100_000_000, 0.08, 0.6, {"sst2": 0.95, "rte": 0.65}),
            "untrained": model(60_000_000, 0.04, 0.01, {}),
        },
        text={"training_tokens": 1_234_567},
        seconds={"distillation": 3700.0, "total": 4000.0},
        speeds={"step": {"distil_fast": 5000.0, "pytorch": 1500.0}},
    )


# ------------------------------------------------------------------------------------------------ results.json


def test_results_come_back_from_disk(results: RunResults, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save(results, path)
    found = load(path)
    assert math.isnan(found.evaluations["pseudo_perplexity"].pop())
    results.evaluations["pseudo_perplexity"].pop()
    assert vars(found) == vars(results)
    assert json.loads(path.read_text())["evaluations"]["pseudo_perplexity"][-1] is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 2, "models": {}}', '{"format": 1, "models": {}, "titel": "x"}', "\x00"]
)
def test_a_foreign_file_is_an_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"expected the results\.json of a run"):
        load(path)


def test_columns_have_one_length() -> None:
    with pytest.raises(ValueError, match="columns of one length"):
        RunResults("x", history={"step": [1.0, 2.0], "loss": [1.0]})
    with pytest.raises(ValueError, match="'step' among them"):
        RunResults("x", evaluations={"accuracy": [1.0]})


def test_plain_data() -> None:
    assert plain({"a": (Path("b"), 1, True, None, math.inf, {2: 0.5})}) == {"a": ["b", 1, True, None, None, {"2": 0.5}]}


def test_retention_is_the_ratio_of_means(results: RunResults) -> None:
    teacher = results.models["teacher"]
    assert retention(results.models["distilled"], teacher) == pytest.approx(1.4 / 1.6)
    assert retention(results.models["untrained"], teacher) is None


# ------------------------------------------------------------------------------------------------ comparison


def test_the_comparison_in_numbers(results: RunResults) -> None:
    ordered = in_columns(results.models)
    assert list(ordered) == ["teacher", "untrained", "distilled"]
    rows = {measure.title: measure.cells() for measure in measures(ordered)}
    assert rows["Parameters"] == ["100.00 M", "60.00 M", "60.00 M"]
    assert rows["Latency, batch 32"] == ["1,600.0 ms", "800.0 ms", "800.0 ms"]
    assert rows["MLM top-1 accuracy"] == ["60.0%", "1.0%", "50.0%"]
    assert rows["GLUE rte"] == ["65.0%", "-", "50.0%"]
    assert rows["Retention, mean over tasks"] == ["100.0%", "-", "87.5%"]
    screen = io.StringIO()
    Console(file=screen, width=120).print(comparison_table(results.models))
    for title, cells in rows.items():
        line = next(line for line in screen.getvalue().splitlines() if title in line)
        assert all(cell in line for cell in cells)


def test_the_numbers_at_the_top(results: RunResults) -> None:
    assert [number for number, _, _ in summary(results)] == ["40%", "2.00x", "87.5%", "50.0%", "50.0%", "1 h 06 min"]
    assert summary(RunResults("nothing yet")) == []


# ------------------------------------------------------------------------------------------------ the page


class Page(HTMLParser):
    """Tags that are closed in order, the text, and every address."""

    VOID = ("meta", "br", "link", "img", "line", "circle", "path")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_needs_nothing_from_elsewhere(results: RunResults, tmp_path: Path) -> None:
    html_report.write(results, tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text("utf-8")
    found = Page(source)
    assert found.addresses == []
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert not re.search(r"https?://|url\(|@import|<b>\.txt|<student>", source)
    assert 'name="viewport"' in source
    assert "prefers-color-scheme: dark" in source


def test_the_page_says_what_the_results_do(results: RunResults) -> None:
    found = Page(html_report.page(results))
    text = "".join(found.words)
    for words in ("A <student> & its teacher", "87.5%", "1,234,567", "1 h 06 min", "torch: 2.13", "5,000"):
        assert words in text
    assert text.index("fewer parameters") < text.index("Comparison") < text.index("Configuration")
    configuration = next(words for words in found.words if "alpha_ce" in words)
    assert yaml.safe_load(configuration) == results.configuration
    assert found.tags.count("figure") == 3
    assert Page(html_report.page(RunResults("nothing yet"))).tags.count("section") == 0


# ------------------------------------------------------------------------------------------------ charts


def coordinates(chart: str, kind: str) -> list[list[tuple[float, float]]]:
    """The runs of points of a path, one for each time the pen was down."""
    path = re.search(rf'<path class="{kind}" d="([^"]*)"', chart)
    assert path is not None
    runs = path[1].split("M")[1:]
    return [[(float(x), float(y)) for x, y in (point.split() for point in run.split("L"))] for run in runs]


def test_a_line_is_where_its_values_are() -> None:
    chart = svg_chart.line_chart([0, 5, 10], [0.0, 10.0, 5.0], "x")
    (points,) = coordinates(chart, "smooth")
    left, right = svg_chart.LEFT, svg_chart.WIDTH - svg_chart.RIGHT
    bottom, top = svg_chart.HEIGHT - svg_chart.BOTTOM, svg_chart.TOP
    assert points == [(left, bottom), ((left + right) / 2, top), (right, (top + bottom) / 2)]
    assert chart.count("<circle") == 3


def test_readings_that_are_not_finite_are_gaps() -> None:
    chart = svg_chart.line_chart([1, 2, 3, 4, 5], [1.0, 2.0, math.nan, math.inf, 2.0], "x")
    assert [len(run) for run in coordinates(chart, "smooth")] == [2, 1]
    assert "nan" not in chart
    assert "inf" not in chart
    assert "No finite reading" in svg_chart.line_chart([1], [math.nan], "x")


def test_long_histories_are_thinned_and_smoothed_and_outliers_do_not_stretch_them() -> None:
    x = list(range(1, 10_001))
    y = [float(i % 2) for i in x]
    y[5000] = 1e6
    chart = svg_chart.line_chart(x, [1.0] * 5000 + y[5000:5001] + [1.0] * 4999, "x")
    assert len(chart) < 40_000
    alternating = svg_chart.line_chart(list(range(100)), [float(i % 2) for i in range(100)], "x")
    heights = [row for _, row in coordinates(alternating, "smooth")[0][5:-5]]
    raw = [row for _, row in coordinates(alternating, "raw")[0]]
    assert max(heights) - min(heights) < 0.5 * (max(raw) - min(raw))


def test_a_logarithmic_chart_has_powers_of_ten() -> None:
    chart = svg_chart.line_chart([0, 1, 2], [1000.0, 100.0, 10.0], "x", logarithmic=True)
    (points,) = coordinates(chart, "smooth")
    assert points[0][1] - points[1][1] == pytest.approx(points[1][1] - points[2][1])
    assert {"1,000", "100", "10"} <= set(re.findall(r">([\d,.]+)</text>", chart))
    assert svg_chart.line_chart([0, 1], [2.0, 3.0], "x", True) == svg_chart.line_chart([0, 1], [2.0, 3.0], "x")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 5, 10]), (0, 0.0005, [0, 2e-4, 4e-4, 6e-4]), (3, 3, None), (-1, 1, [-1, -0.5, 0, 0.5, 1])],
)
def test_ticks_are_round_and_cover(low: float, high: float, expected: list[float] | None) -> None:
    found = svg_chart.ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert len(found) >= 2
    assert expected is None or found == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ while it runs

PROGRESS = Progress(50, 200, {"loss": 12.345, "ce": 1.5}, 2.5, 3e-4, 10**6, 5123.4, 3725.0, 0)


def test_progress_without_a_screen_is_a_line_each() -> None:
    screen = io.StringIO()
    with Display(Console(file=screen, width=60), "Distilling") as display:
        display(PROGRESS)
        display(replace(PROGRESS, step=200, skipped=3))
    first, second = screen.getvalue().splitlines()
    assert first == f"Distilling: {in_words(PROGRESS)}"
    for words in ("50 of 200", "loss 12.3", "tokens/s 5,123", "lr 3.00e-04", "grad norm 2.5", "1 h 02 min left"):
        assert words in first
    assert "skipped" not in first
    assert "skipped 3" in second


def test_progress_on_a_screen_is_one_block_in_place() -> None:
    screen = io.StringIO()
    with Display(Console(file=screen, width=100, force_terminal=True), "Distilling") as display:
        for step in (50, 100, 200):
            display(replace(PROGRESS, step=step))
    shown = screen.getvalue()
    for words in ("Distilling", "tokens/s", "5,123", "25%", "done"):
        assert words in shown
    assert "\x1b[" in shown


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3599, 7385, math.inf, math.nan)] == [
        "0 s",
        "1 min 00 s",
        "1 min 01 s",
        "59 min 59 s",
        "2 h 03 min",
        "?",
        "?",
    ]
