"""Ctrl-C and SIGTERM while training: remembered, agreed upon by all ranks, and answered after the step.

It knows signals and ranks; nothing of training. Next: trainer.py, which writes a checkpoint then.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

PASSED_ON = 1.0  # seconds within which a second signal is the first one, passed on by a launcher


class Interrupted(Exception):  # noqa: N818
    """Training was asked to stop, and did after a checkpoint.

    Attributes:
        signal: SIGINT or SIGTERM; 0 where only another rank got it.
        step: optimiser steps done.
        checkpoint: where training goes on from.
    """

    def __init__(self, number: int, step: int, checkpoint: Path) -> None:
        self.signal, self.step, self.checkpoint = number, step, checkpoint
        super().__init__(f"Interrupted after optimiser step {step}; the same command goes on from {checkpoint}.")


class Interrupt:
    """Takes the place of Python's handlers in its context; a second signal has their effect.

    Ranks get a signal in different steps, or only one does. They agree by one number a step, over a process group of
    the hosts, whose result is looked at a step later: so no host waits for another, and none for its device.

    Args:
        ranks: of the run.
    """

    def __init__(self, ranks: int) -> None:
        self.received = 0
        self.when = 0.0
        self.group = dist.new_group(backend="gloo") if ranks > 1 else None
        self.pending: tuple[torch.Tensor, Any] | None = None
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self.handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self.when = number, now
        elif now - self.when > PASSED_ON:
            signal.signal(number, self.handlers[number])
            signal.raise_signal(number)

    def requested(self) -> bool:
        """Whether to stop after this step; equal on all ranks if all ask once a step."""
        if self.group is None:
            return self.received != 0
        previous, flag = self.pending, torch.tensor(float(self.received != 0))
        self.pending = flag, dist.all_reduce(flag, group=self.group, async_op=True)
        if previous is None:
            return False
        previous[1].wait()
        return previous[0].item() > 0
