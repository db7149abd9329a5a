"""What is known of every step: summed up on the device, read by the host once a log interval, kept for the report.

It knows numbers and their names; nothing of models, ranks or the screen. Next: trainer.py, which fills it in;
health.py, which says what a fault is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distil_fast.training.health import Verdict

# of a step, behind its losses: what the device knows ...
DEVICE = ("gradient_norm", "tokens", "skipped", "fault")
# ... and the host: the time of a step is its share of the time between two readings
HOST = ("learning_rate", "seconds")


@dataclass(frozen=True)
class Progress:
    """What a reader sees once a log interval; means are over the updates of the interval that were made."""

    step: int  # done
    steps: int  # of the run
    terms: dict[str, float]  # the loss and its terms before their weights, means
    gradient_norm: float  # the largest of the interval, before clipping
    learning_rate: float  # of the last step
    tokens: int  # real ones, of all ranks, since the run began
    tokens_per_second: float  # in the interval
    seconds_left: float  # estimated
    skipped: int  # updates left out since the run began


@dataclass
class History:
    """Everything that was read, step by step, from the first step of the run, resumed or not.

    Attributes:
        columns: names of the columns of `rows`: "loss", the terms, then those of `DEVICE` and `HOST`.
        rows: float32 [steps done, columns], on the CPU. "skipped" is 1 where the update was left out.
        evaluations: steps done, and what the evaluation said then.
    """

    columns: tuple[str, ...]
    rows: Tensor
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @classmethod
    def of(cls, terms: Sequence[str]) -> History:
        columns = ("loss", *terms, *DEVICE, *HOST)
        return cls(columns, torch.empty(0, len(columns)))

    def __getitem__(self, column: str) -> Tensor:
        """One column, [steps done]."""
        return self.rows[:, self.columns.index(column)]

    def progress(self, since: int, steps: int) -> Progress:
        """Of the steps after the first `since`."""
        recent = History(self.columns, self.rows[since:])
        made = recent.rows[recent["skipped"] == 0]
        means = (made if len(made) else recent.rows).mean(0)
        done, seconds = len(self.rows), recent["seconds"].sum().item()
        return Progress(
            step=done,
            steps=steps,
            terms=dict(zip(self.columns[: -len(DEVICE + HOST)], means.tolist(), strict=False)),
            gradient_norm=recent["gradient_norm"].max().item(),
            learning_rate=recent["learning_rate"][-1].item(),
            tokens=int(self["tokens"].double().sum().item()),
            tokens_per_second=recent["tokens"].double().sum().item() / max(seconds, 1e-9),
            seconds_left=seconds / len(recent.rows) * (steps - done),
            skipped=int(self["skipped"].sum().item()),
        )


class Meter:
    """The rows of a log interval on the device.

    Args:
        width: the loss and its terms.
        capacity: steps between two readings, at most.
        device: of the losses.
    """

    def __init__(self, width: int, capacity: int, device: torch.device) -> None:
        self.record = torch.zeros(capacity, width + len(DEVICE), device=device)
        self.filled = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """What was done since the last reading, such as an evaluation, is no time of a step."""
        self.clock = time.perf_counter()

    def add(self, losses: Tensor, gradient_norm: Tensor, tokens: Tensor, verdict: Verdict) -> None:
        """A step: its losses [width], the others 0-d, all on the device."""
        row = torch.cat([losses, torch.stack([gradient_norm, tokens, *verdict])])
        self.record[self.filled].copy_(row)
        self.filled += 1

    def read(self, first: int, learning_rate: Callable[[int], float]) -> Tensor:
        """The rows of the steps from number `first` on, with the `HOST` columns; waits for the device, and empties."""
        rows = self.record[: self.filled].cpu()
        now = time.perf_counter()
        rates = [learning_rate(first + i) for i in range(self.filled)]
        seconds = (now - self.clock) / max(self.filled, 1)
        self.filled, self.clock = 0, now
        return torch.cat([rows, torch.tensor(rates).unsqueeze(1), torch.full((len(rates), 1), seconds)], 1)
