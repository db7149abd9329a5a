"""Where the time of a training step goes: encoders, heads and loss, optimiser; and the loss alone, from given logits.

The step runs as it is, with hooks on the models and on their gradients that read the clock; on a GPU each waits for the
device first. It knows no losses of its own. Next: train.py, which asks; train_report.py, which shows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from distil_fast import cosine_loss, distillation_loss
from distil_fast.bench.original import Output
from distil_fast.bench.train_cases import (
    BACKWARD,
    FORWARD,
    HEADS_AND_LOSS,
    LOSS_ALONE,
    OPTIMISER,
    PARTS,
    TEACHER,
    TrainCase,
)
from distil_fast.bench.train_models import MASK_ID
from distil_fast.bench.train_objectives import PlainObjective, gathered
from distil_fast.bench.train_steps import OriginalStep, Step
from distil_fast.training.batch import Batch, MaskedBatch
from distil_fast.training.masked_lm import apply_head
from distil_fast.training.masking import DynamicMasking
from distil_fast.training.settings import MaskingConfig


def parts(step: Step, batch: MaskedBatch, repeats: int) -> dict[str, float]:
    """Median milliseconds of each of `PARTS`, and of the loss alone with its gradient.

    Heads and loss are what is neither encoder nor optimiser, forward and backward.
    """
    watch = _Watch(step)
    try:
        runs = [watch.run([batch]) for _ in range(repeats + 1)][1:]  # the first warms up
    finally:
        watch.remove()
    found = {part: statistics.median(run[part] for run in runs) for part in PARTS}
    return found | {LOSS_ALONE: _loss_alone(step, batch, repeats)}


class _Watch:
    """Reads the clock where a step passes from one part to the next."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.device = next(step.student.parameters()).device.type
        self.at: dict[str, float] = {}
        teacher, student = (model.base_model for model in (step.teacher, step.student))
        assert isinstance(teacher, nn.Module)
        assert isinstance(student, nn.Module)
        parameters = [p for p in step.student.parameters() if p.requires_grad]
        self.handles: list[Any] = [
            teacher.register_forward_pre_hook(lambda *_: self.mark("teacher begins")),
            teacher.register_forward_hook(lambda *_: self.mark("teacher ends")),
            student.register_forward_pre_hook(lambda *_: self.mark("student begins")),
            student.register_forward_hook(self._student_ends),
            register_multi_grad_hook(parameters, lambda _: self.mark("backward ends")),
        ]

    def mark(self, event: str) -> None:
        self.at[event] = _now(self.device)

    def _student_ends(self, model: nn.Module, inputs: Any, output: Any) -> None:
        output.last_hidden_state.register_hook(lambda _: self.mark("gradient arrives"))
        self.mark("student ends")

    def run(self, batches: Sequence[MaskedBatch]) -> dict[str, float]:
        """Milliseconds of each part of one step."""
        self.mark("begin")
        self.step.step(batches)
        self.mark("end")

        def between(first: str, last: str) -> float:
            return 1e3 * (self.at[last] - self.at[first])

        known = {
            TEACHER: between("teacher begins", "teacher ends"),
            FORWARD: between("student begins", "student ends"),
            BACKWARD: between("gradient arrives", "backward ends"),
            OPTIMISER: between("backward ends", "end"),
        }
        return known | {HEADS_AND_LOSS: between("begin", "end") - sum(known.values())}

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------ outside of the step


def masking(case: TrainCase, batch: MaskedBatch, repeats: int) -> float:
    """Median milliseconds of masking a micro-batch of these lengths."""
    counts = torch.ones(case.vocabulary, dtype=torch.int64, device=case.device)
    mask = DynamicMasking(counts, [0], MASK_ID, MaskingConfig(), seed=0)
    given = Batch(batch.input_ids, batch.attention_mask, batch.tokens)
    return _median_ms(lambda: mask(given), case.device, repeats)


def _median_ms(function: Callable[[], object], device: str, repeats: int) -> float:
    """Of calls after a first one."""
    seconds = []
    for _ in range(repeats + 1):
        start = _now(device)
        function()
        seconds.append(_now(device) - start)
    return 1e3 * statistics.median(seconds[1:])


def _now(device: str) -> float:
    """Seconds, once the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _loss_alone(step: Step, batch: MaskedBatch, repeats: int) -> float:
    """Median milliseconds of the loss and its gradient, from logits that are whole in memory."""
    device = batch.input_ids.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=step.precision == "bf16"):
        loss, leaves = _loss_of_leaves(step, batch)
        return _median_ms(lambda: torch.autograd.grad(loss(), leaves), device, repeats)


def _loss_of_leaves(step: Step, batch: MaskedBatch) -> tuple[Callable[[], Tensor], tuple[Tensor, Tensor]]:
    """The loss as a function of nothing, and the student's logits and hidden states that it depends on."""
    if isinstance(step, OriginalStep):
        with torch.no_grad():
            student, teacher = step.outputs(batch)
        logits, hidden = student.logits.requires_grad_(), student.hidden_states[-1].requires_grad_()
        given = Output(logits, (hidden,))
        return lambda: step.losses(given, teacher, batch).loss, (logits, hidden)
    objective = step.objective
    config = objective.config if isinstance(objective, PlainObjective) else objective.loss
    models = objective.student, objective.teacher
    with torch.no_grad():
        states, counts = gathered(*models, batch, config.positions), objective.counts(batch)
        logits, teacher_logits = (
            apply_head(model, rows)
            for model, rows in zip(models, (states.student_rows, states.teacher_rows), strict=True)
        )
    logits, hidden = logits.requires_grad_(), states.student.requires_grad_()
    both = hidden, states.teacher
    if isinstance(objective, PlainObjective):
        labels = states.labels, states.predicted
        return lambda: objective.loss_function(logits, teacher_logits, *labels, *both, counts)[0], (logits, hidden)

    def ours() -> Tensor:
        terms = distillation_loss(
            logits,
            teacher_logits,
            states.labels,
            temperature=config.temperature,
            soft_weight=config.alpha_ce,
            hard_weight=config.alpha_mlm,
            soft_count=counts[0],
            hard_count=counts[1],
        )
        return terms.loss + config.alpha_cos * cosine_loss(*both, count=counts[2])

    return ours, (logits, hidden)
