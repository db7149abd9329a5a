"""Everything that a run found out, as one plain dataclass: what results.json holds and the report shows.

It knows the shape of the results; neither how they came about nor how they look. Next: html_report.py, report.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distil_fast.training.atomic import replacing
from distil_fast.training.settings import InputError

STEP = "step"  # the name of the steps among the columns of a history
FORMAT = 1


@dataclass(frozen=True)
class ModelResults:
    """One model's column of the comparison; what was not measured is empty or None.

    Args:
        parameters: shared ones counted once.
        weight_bytes: of the weights on disk.
        latency: seconds of one forward of the encoder, by batch size as a string.
        tokens_per_second: of the encoder, by batch size as a string.
        quality: by name: "accuracy" (top-1 under fixed masks), "pseudo_perplexity", "agreement" (top-1, with the
            teacher), "kl" (to the teacher, nats), or other names.
        cosines: of hidden states with the teacher's, for each layer.
        tasks: score on each GLUE task, as a share of 1.
    """

    parameters: int
    weight_bytes: int
    latency: dict[str, float] = field(default_factory=dict)
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)
    cosines: list[float] = field(default_factory=list)
    tasks: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResults:
    """A run, from its configuration to its outcome.

    Args:
        title: such as "DistilBERT from bert-base-uncased".
        configuration: plain data, as YAML holds it.
        environment: likewise: versions, devices.
        history: columns of equal length read while training: "step", "loss", its terms by name, "learning_rate",
            "gradient_norm", "tokens_per_second".
        evaluations: columns of equal length: "step", and measures on held-out text by name.
        models: by role, "teacher" first; a student before ("untrained") and after ("distilled").
        text: counts of documents, sequences and tokens, by name.
        seconds: by phase; "total" of all.
        speeds: tokens a second by what was timed, then by contender.
    """

    title: str
    configuration: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    history: dict[str, list[float]] = field(default_factory=dict)
    evaluations: dict[str, list[float]] = field(default_factory=dict)
    models: dict[str, ModelResults] = field(default_factory=dict)
    text: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    speeds: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, columns in (("history", self.history), ("evaluations", self.evaluations)):
            lengths = {column: len(values) for column, values in columns.items()}
            if columns and (STEP not in columns or len(set(lengths.values())) > 1):
                raise ValueError(f"{name}: expected columns of one length, {STEP!r} among them, got {lengths}.")


def retention(model: ModelResults, teacher: ModelResults) -> float | None:
    """The mean score on the tasks that both have, as a share of the teacher's; None without any."""
    shared = [name for name in model.tasks if name in teacher.tasks]
    under = sum(teacher.tasks[name] for name in shared)
    return sum(model.tasks[name] for name in shared) / under if under > 0.0 else None


def save(results: RunResults, path: Path) -> None:
    """Write the results as JSON; the file appears whole or not at all. nan and inf become null."""
    with replacing(path) as scratch:
        content = {"format": FORMAT} | asdict(results)
        scratch.write_text(json.dumps(plain(content), indent=2, allow_nan=False) + "\n", "utf-8")


def load(path: Path) -> RunResults:
    """Read what `save` wrote; null in a column of numbers is nan again.

    Raises:
        InputError: not such a file.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError("another version's")
        models = {name: ModelResults(**_known(ModelResults, model)) for name, model in content["models"].items()}
        content |= {"models": models}
        for name in ("history", "evaluations"):
            content[name] = {k: [math.nan if v is None else v for v in values] for k, values in content[name].items()}
        return RunResults(**_known(RunResults, content))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: expected the results.json of a run, but: {error!r}.") from error


def _known(kind: type, content: Mapping[str, Any]) -> dict[str, Any]:
    names = {one.name for one in dataclasses.fields(kind)}
    if unknown := set(content) - names:
        raise ValueError(f"unknown entries {', '.join(sorted(unknown))}")
    return dict(content)


def plain(value: Any) -> Any:
    """JSON data: paths and the like as strings, tuples as lists, nan and inf as None.

    Raises:
        TypeError: never; what is unknown becomes its string.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (Sequence, set, frozenset)):
        return [plain(entry) for entry in value]
    return str(value)
