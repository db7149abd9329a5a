"""Whether an update is made, decided on the device: finite loss and gradient, and the loss scale of fp16.

The verdict is a tensor that the fused optimiser reads; the host learns of it when it reads the losses anyway. It knows
numbers only; metrics.py keeps the verdicts. Next: trainer.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FIRST_SCALE, LARGEST_SCALE, GOOD_STEPS = 2.0**16, 2.0**24, 2000  # as torch.amp.GradScaler starts and grows


class NonFiniteLoss(FloatingPointError):  # noqa: N818
    """A loss or gradient was inf or nan, and training stopped; no update since was made, that step's included.

    Attributes:
        step: optimiser steps completed before it.
        terms: the step's loss and terms, and the norm of its gradient.
        feed: the feed's state on this rank before that step, which gives its batches again.
        checkpoint: the newest checkpoint; None where there is none yet.
    """

    def __init__(self, step: int, terms: dict[str, float], feed: dict[str, Any], checkpoint: Path | None) -> None:
        self.step, self.terms, self.feed, self.checkpoint = step, terms, feed, checkpoint
        values = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        place = ", ".join(f"{name} {value}" for name, value in feed.items() if isinstance(value, int | float | str))
        kept = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(
            f"The loss or gradient of optimiser step {step + 1} is not finite ({values}). Its batches come after "
            f"{place} of the feed. The weights are those before that step; {kept}. Lower the learning rate, use fp32, "
            "or leave such updates out with non_finite='skip'."
        )


class Verdict(NamedTuple):
    """Of one step, float32 and 0-d on the device: 1 for yes, as the fused optimiser wants it."""

    masked: Tensor  # the update is not made
    fault: Tensor  # something is wrong, as opposed to a loss scale that was too large


class Health:
    """The verdict on every step, without asking the device.

    Args:
        device: of the losses.
        stop: after a fault, mask all updates to come, too.
        scaled: find a loss scale, which fp16 needs: gradients below 6e-8 would vanish. It is halved where a gradient
            overflows, which is no fault while the scale is above 1, and doubled after 2000 steps without. This is
            `torch.amp.GradScaler`, which cannot be used: its step would overwrite the optimiser's flag with its own,
            and it reads all gradients once more for what their norm says already.
    """

    def __init__(self, device: torch.device, stop: bool, scaled: bool) -> None:
        self.stop, self.scaled = stop, scaled
        self.stopped = torch.zeros((), dtype=torch.bool, device=device)
        self.scale = torch.full((), FIRST_SCALE if scaled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)

    def judge(self, losses: Tensor, norm: Tensor) -> Verdict:
        """From a step's losses `[n]` and the norm of its (scaled) gradient; equal on all ranks if these are."""
        losses_finite = losses.isfinite().all()
        finite = losses_finite & norm.isfinite()
        fault = ~finite
        if self.scaled:
            fault = fault & ~(losses_finite & (self.scale > 1))
            self._adjust(finite)
        masked = ~finite | self.stopped
        if self.stop:
            self.stopped = self.stopped | fault
        return Verdict(masked.float(), fault.float())

    def _adjust(self, finite: Tensor) -> None:
        good_steps = torch.where(finite, self.good_steps + 1, 0.0)
        grown = good_steps >= GOOD_STEPS
        scale = torch.where(finite, torch.where(grown, self.scale * 2, self.scale), self.scale / 2)
        self.scale = scale.clamp(1.0, LARGEST_SCALE)
        self.good_steps = torch.where(grown, 0.0, good_steps)

    def state_dict(self) -> dict[str, float]:
        """The loss scale as numbers, which waits for the device."""
        return {"scale": self.scale.item(), "good_steps": self.good_steps.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale.fill_(state["scale"])
        self.good_steps.fill_(state["good_steps"])
