"""The step of the original DistilBERT trainer, written anew in its own order of operations: the baseline of `train`.

After the authors' training code (Sanh et al. 2019; distillation/ of huggingface/transformers-research-projects).
Where torch and transformers have become faster by themselves it has the gain: their attention, their fused AdamW,
autocast. It knows nothing of distil_fast's losses. Next: train_objectives.py for the others, train.py for the clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from distil_fast.training.batch import IGNORED, MaskedBatch
from distil_fast.training.settings import LossConfig, OptimiserConfig

NO_DECAY = ("bias", "LayerNorm.weight")


class Output(NamedTuple):
    """A model's logits at all positions, padding included, and the hidden states of all its layers."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...]


class Losses(NamedTuple):
    """The weighted sum, with a gradient, and its terms before their weights; a term of weight 0 is None."""

    loss: Tensor
    ce: Tensor
    mlm: Tensor | None
    cos: Tensor | None


class Original:
    """Distils `teacher` into `student` in place, one micro-batch at a time.

    Each term is the mean over its own positions of a micro-batch, and the sum is divided by `accumulation_steps`: of
    ragged ones that is not the loss of one large batch. After every micro-batch the host reads five numbers, and
    whether the loss is nan.

    Args:
        student, teacher: masked language models with one vocabulary and one hidden size, on one device.
        loss: temperature, the alphas, and `positions` ("masked" is its restrict_ce_to_mask).
        optimiser: AdamW, the warm-up and the largest gradient norm.
        steps: optimiser steps of the run, for the learning rate.
        accumulation_steps: micro-batches of an optimiser step.
        precision: "fp32", or "bf16" by autocast.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        loss: LossConfig,
        optimiser: OptimiserConfig,
        *,
        steps: int,
        accumulation_steps: int = 1,
        precision: str = "fp32",
    ) -> None:
        self.student, self.teacher, self.config = student, teacher.eval(), loss
        self.accumulation_steps, self.precision = accumulation_steps, precision
        self.max_grad_norm = optimiser.max_grad_norm
        self.ce_loss = nn.KLDivLoss(reduction="batchmean")
        self.mlm_loss = nn.CrossEntropyLoss(ignore_index=IGNORED)
        self.cos_loss = nn.CosineEmbeddingLoss(reduction="mean")
        named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if not _spared(name)], "weight_decay": optimiser.weight_decay},
            {"params": [p for name, p in named if _spared(name)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=optimiser.learning_rate, eps=optimiser.eps, betas=optimiser.betas, fused=True
        )
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, math.ceil(steps * optimiser.warmup), steps)
        self.micro_batches = 0
        self.total_loss = 0.0
        self.last: dict[str, float] = {}

    def step(self, batches: Sequence[MaskedBatch]) -> None:
        """One optimiser step, if there are `accumulation_steps` batches.

        Raises:
            FloatingPointError: the loss is nan, where the original leaves the process.
        """
        for batch in batches:
            losses = self.losses(*self.outputs(batch), batch)
            self._read(losses)
            self._optimise(losses.loss)

    def outputs(self, batch: MaskedBatch) -> tuple[Output, Output]:
        """The student's and the teacher's."""
        with self._autocast():
            student = self._output(self.student, batch)
            with torch.no_grad():
                return student, self._output(self.teacher, batch)

    @staticmethod
    def _output(model: PreTrainedModel, batch: MaskedBatch) -> Output:
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        output = model(**given, output_hidden_states=True)
        return Output(output.logits, output.hidden_states)

    def losses(self, student: Output, teacher: Output, batch: MaskedBatch) -> Losses:
        """The losses of a micro-batch."""
        config = self.config
        real = batch.attention_mask.bool()
        with self._autocast():
            s, t = student.logits, teacher.logits
            chosen = (batch.labels > -1 if config.positions == "masked" else real).unsqueeze(-1).expand_as(s)
            s_chosen = torch.masked_select(s, chosen).view(-1, s.size(-1))
            t_chosen = torch.masked_select(t, chosen).view(-1, s.size(-1))
            soft = F.log_softmax(s_chosen / config.temperature, -1), F.softmax(t_chosen / config.temperature, -1)
            ce = self.ce_loss(*soft) * config.temperature**2
            loss, mlm, cos = config.alpha_ce * ce, None, None
            if config.alpha_mlm > 0.0:
                mlm = self.mlm_loss(s.view(-1, s.size(-1)), batch.labels.view(-1))
                loss = loss + config.alpha_mlm * mlm
            if config.alpha_cos > 0.0:
                cos = self._cosine(student.hidden_states[-1], teacher.hidden_states[-1], real)
                loss = loss + config.alpha_cos * cos
        return Losses(loss, ce, mlm, cos)

    def _cosine(self, student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
        chosen = real.unsqueeze(-1).expand_as(student)
        s = torch.masked_select(student, chosen).view(-1, student.size(-1))
        t = torch.masked_select(teacher, chosen).view(-1, student.size(-1))
        return self.cos_loss(s, t, s.new_ones(s.size(0)))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.student.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def _read(self, losses: Losses) -> None:
        """The numbers of its progress bar, of every micro-batch."""
        self.total_loss += losses.loss.item()
        self.last = {name: value.item() for name, value in losses._asdict().items() if value is not None}

    def _optimise(self, loss: Tensor) -> None:
        if (loss != loss).any():
            raise FloatingPointError(f"The loss of micro-batch {self.micro_batches} is nan. Lower the learning rate.")
        if self.accumulation_steps > 1:
            loss = loss / self.accumulation_steps
        loss.backward()
        self.micro_batches += 1
        if self.micro_batches % self.accumulation_steps == 0:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()


def _spared(name: str) -> bool:
    """Whether a parameter has no weight decay. (Two of DistilBERT's LayerNorms have names that it does not know.)"""
    return any(part in name for part in NO_DECAY)
