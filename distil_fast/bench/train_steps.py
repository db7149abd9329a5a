"""Whole optimiser steps, by name: the original's, and a modern one around any objective, on the same weights and masks.

The denominators of a modern step are those of all its micro-batches. It knows no time. Next: train.py, whose contenders
these are; train_objectives.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from distil_fast.bench.contenders import compiled
from distil_fast.bench.original import Original
from distil_fast.bench.train_cases import COMPILED, EAGER, MASKED, ORIGINAL, OURS, TrainCase
from distil_fast.bench.train_objectives import PlainObjective, plain_losses
from distil_fast.training.batch import MaskedBatch
from distil_fast.training.masked_lm import MaskedLM
from distil_fast.training.objective import MaskedLMObjective
from distil_fast.training.settings import LossConfig, OptimiserConfig

STEPS = 1_000_000  # of the schedule: no run of the benchmark comes to its end

Modern: TypeAlias = "PlainObjective | MaskedLMObjective"


class ModernStep:
    """One optimiser step of an objective: counts first, then forward and backward of each micro-batch."""

    def __init__(self, objective: Modern, optimiser: OptimiserConfig, precision: str) -> None:
        self.objective, self.precision, self.max_grad_norm = objective, precision, optimiser.max_grad_norm
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, optimiser.learning_rate, optimiser.betas, optimiser.eps, optimiser.weight_decay, fused=True
        )
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, round(STEPS * optimiser.warmup), STEPS)

    @property
    def student(self) -> MaskedLM:
        return self.objective.student

    @property
    def teacher(self) -> MaskedLM:
        return self.objective.teacher

    def gradients(self, batches: Sequence[MaskedBatch]) -> Tensor:
        """Adds to the student's gradients; returns the loss and its terms, `[4]`."""
        counts = torch.stack([self.objective.counts(batch) for batch in batches]).sum(0)
        shares = []
        for batch in batches:
            with torch.autocast(counts.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                loss, terms = self.objective(batch, counts)
            loss.backward()
            shares.append(torch.cat([loss.detach().view(1), terms]))
        return torch.stack(shares).sum(0)

    def step(self, batches: Sequence[MaskedBatch]) -> Tensor:
        """One optimiser step; what `gradients` returns."""
        losses = self.gradients(batches)
        nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return losses


class OriginalStep(Original):
    """The original, with the two faces that contenders have."""

    def gradients(self, batches: Sequence[MaskedBatch]) -> Tensor:
        """Adds one micro-batch to the student's gradients; returns the loss and its terms, `[4]`."""
        (batch,) = batches
        losses = self.losses(*self.outputs(batch), batch)
        losses.loss.backward()
        return torch.stack([value.detach() for value in losses if value is not None])


Step: TypeAlias = "ModernStep | OriginalStep"

OBJECTIVES: dict[str, Callable[[MaskedLM, MaskedLM, LossConfig], Modern]] = {
    EAGER: lambda student, teacher, loss: PlainObjective(student, teacher, loss, plain_losses(loss)),
    COMPILED: lambda student, teacher, loss: PlainObjective(student, teacher, loss, compiled(plain_losses(loss))),
    OURS: MaskedLMObjective,
}


def build(name: str, case: TrainCase, student: MaskedLM, teacher: MaskedLM) -> Step:
    """The contender of this name, with a copy of the student.

    Raises:
        KeyError: there is no such contender.
    """
    loss = LossConfig(positions="masked" if name.endswith(MASKED) else "all")
    optimiser, student = OptimiserConfig(), copy.deepcopy(student)
    kind = name.removesuffix(MASKED)
    if kind == ORIGINAL:
        return OriginalStep(student, teacher, loss, optimiser, steps=STEPS, precision=case.precision)
    return ModernStep(OBJECTIVES[kind](student, teacher, loss), optimiser, case.precision)
