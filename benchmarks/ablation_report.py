"""The ablation as a table and a picture, and both in docs/results.md between its marks.

It trains nothing. Next: ablation.py, whose results these are.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import marks
from distil_fast.training.settings import InputError

FULL = "full"
MEASURES = {  # name: title, and how a value is written
    "accuracy": ("MLM top-1", "{:.1%}"),
    "pseudo_perplexity": ("pseudo-perplexity", "{:,.1f}"),
    "agreement": ("agreement with the teacher", "{:.1%}"),
}
DOTS, MEAN = "#7d8694", "#0b6e69"


def write(results: dict[str, Any], output: Path, docs: Path | None = None) -> None:
    """Writes table.md and, with more than one arm, ablation.png; and puts both into `docs`.

    Raises:
        InputError: `docs` has no marks.
    """
    several = len(_by_arm(results)) > 1
    text = table(results)
    (output / "table.md").write_text(text, "utf-8")
    if several:
        picture(results, output / "ablation.png")
    if docs is not None:
        link = os.path.relpath(output / "ablation.png", docs.parent)
        shown = f"{text}\n![held-out quality of each arm and seed]({link})\n" if several else text
        _insert(docs, "ablation" if several else "quality", shown)


def table(results: dict[str, Any]) -> str:
    """Markdown: the mean over seeds of each arm, and its distance from the full recipe's of the same seeds."""
    arms = _by_arm(results)
    titles = [title for title, _ in MEASURES.values()]
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for name, runs in arms.items():
        cells = [_cell(measure, runs, arms.get(FULL), name == FULL) for measure in MEASURES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, title in (("untrained", "student, untrained"), ("teacher", "teacher")):
        cells = [form.format(results[name][measure]) for measure, (_, form) in MEASURES.items()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _conditions(results, len(arms) > 1), ""])


def _conditions(results: dict[str, Any], several: bool) -> str:
    """What the runs had in common, in words."""
    plan, text, machine = results["plan"], results["text"], results["machine"]
    seeds = len({run["seed"] for run in results["arms"]})
    minutes = statistics.median(run["seconds"] for run in results["arms"]) / 60
    batch = plan["base"]["micro_batch_size"] * plan["base"]["accumulation_steps"]
    compared = (
        " In parentheses the difference from the full recipe with the same seeds, shares in percentage points, and its "
        "smallest and largest value."
    )
    return (
        f"{plan['steps']} steps of {batch} sequences of at most {plan['length']} tokens, {minutes:.1f} minutes a run; "
        f"{text['training_tokens']:,} tokens of text, {text['held_out_tokens']:,} held out. Means over {seeds} "
        f"seed{'s' * (seeds > 1)}.{compared if several else ''} {machine['cpu']}, threads: {machine['threads']}, torch "
        f"{machine['torch']}, commit {machine['commit']}."
    )


def _by_arm(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    arms: dict[str, list[dict[str, Any]]] = {}
    for run in results["arms"]:
        arms.setdefault(run["arm"], []).append(run)
    return arms


def _cell(measure: str, runs: Sequence[dict[str, Any]], full: Sequence[dict[str, Any]] | None, is_full: bool) -> str:
    form = MEASURES[measure][1]
    mean = form.format(statistics.mean(run[measure] for run in runs))
    if full is None or is_full:
        return mean
    of_seed = {run["seed"]: run[measure] for run in full}
    differences = [run[measure] - of_seed[run["seed"]] for run in runs if run["seed"] in of_seed]
    if not differences:
        return mean
    signed = form.replace("{:", "{:+")
    average, least, most = statistics.mean(differences), min(differences), max(differences)
    spread = f", {signed.format(least)} to {signed.format(most)}" if len(differences) > 1 else ""
    return f"{mean} ({signed.format(average)}{spread})"


def picture(results: dict[str, Any], path: Path) -> None:
    """A panel for each measure: a dot for every seed, a line for the mean; the teacher dashed."""
    arms = _by_arm(results)
    figure = Figure(figsize=(10, 1.3 + 0.42 * len(arms)), dpi=160, layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, (measure, (title, _)) in zip(panels, MEASURES.items(), strict=True):
        _panel(axes, arms, measure)
        if measure != "agreement":
            axes.axvline(results["teacher"][measure], color="#d1495b", ls="--", lw=1, label="teacher")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x", color="#eee")
    panels[0].set_yticks(range(len(arms)), list(arms))
    panels[0].invert_yaxis()
    panels[0].legend(frameon=False, fontsize=8)
    panels[1].set_xscale("log")
    figure.savefig(path)


def _panel(axes: Axes, arms: dict[str, list[dict[str, Any]]], measure: str) -> None:
    for place, runs in enumerate(arms.values()):
        values = [run[measure] for run in runs]
        axes.plot(values, [place] * len(values), "o", color=DOTS, ms=5, alpha=0.8)
        mean = statistics.mean(values)
        axes.plot([mean, mean], [place - 0.3, place + 0.3], color=MEAN, lw=2)
    axes.set_axisbelow(True)


def _insert(docs: Path, section: str, text: str) -> None:
    try:
        page = marks.filled(docs.read_text("utf-8"), section, text)
    except ValueError as error:
        raise InputError(f"--docs {docs}: {error}") from None
    docs.write_text(page, "utf-8")
