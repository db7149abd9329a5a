"""A modern step's module in plain torch: teacher, student, and losses of the rows that need them.

It does what distil_fast's objective does, heads on the gathered rows only and no question to the device, but with
torch's own losses, eager or compiled. It knows nothing of optimisers or time. Next: train_steps.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from distil_fast.training.batch import MaskedBatch
from distil_fast.training.masked_lm import MaskedLM, apply_head, encode
from distil_fast.training.protocols import Objective
from distil_fast.training.settings import LossConfig

PlainLosses: TypeAlias = Callable[..., "tuple[Tensor, Tensor]"]


class States(NamedTuple):
    """Hidden states of a micro-batch's real tokens, `[n, H]`, and of the rows whose logits are needed, `[r, H]`."""

    student: Tensor
    teacher: Tensor
    student_rows: Tensor
    teacher_rows: Tensor
    labels: Tensor  # [r]
    predicted: Tensor | None  # [m] which of the rows have a label; None: all


class PlainObjective(Objective):
    """Plain torch, as one writes it with care: whole logits, of the gathered rows only; labels where there are some.

    Args:
        student, teacher: masked language models with one vocabulary and one hidden size, on one device.
        config: temperature, alphas and `positions`.
        loss_function: `plain_losses` of the same configuration, or torch.compile of it.
    """

    terms = ("ce", "mlm", "cos")

    def __init__(self, student: MaskedLM, teacher: MaskedLM, config: LossConfig, loss_function: PlainLosses) -> None:
        super().__init__()
        self.student = student
        self._unregistered = (teacher.eval(),)
        self.config = config
        self.loss_function = loss_function

    @property
    def teacher(self) -> MaskedLM:
        return self._unregistered[0]

    def counts(self, batch: MaskedBatch) -> Tensor:
        assert batch.masked is not None, "batches of the benchmark know their masked positions"
        rows = batch.masked if self.config.positions == "masked" else batch.tokens
        numbers = rows.numel(), batch.masked.numel(), batch.tokens.numel()
        # filled by the device: a copy of the host's numbers would wait for it
        return torch.stack([batch.input_ids.new_full((), number, dtype=torch.float32) for number in numbers])

    def forward(self, batch: MaskedBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        states = gathered(self.student, self.teacher, batch, self.config.positions)
        with torch.no_grad():
            teacher_logits = apply_head(self.teacher, states.teacher_rows)
        student_logits = apply_head(self.student, states.student_rows)
        hidden = states.student, states.teacher
        return self.loss_function(student_logits, teacher_logits, states.labels, states.predicted, *hidden, counts)


def gathered(student: MaskedLM, teacher: MaskedLM, batch: MaskedBatch, positions: str) -> States:
    """Both encoders' output where a loss needs it, with KL at `positions`, "all" or "masked"."""
    assert batch.masked is not None
    attention_mask = None if batch.tokens.numel() == batch.input_ids.numel() else batch.attention_mask
    with torch.no_grad():
        teacher_hidden = encode(teacher, batch.input_ids, attention_mask).flatten(0, 1)
    student_hidden = encode(student, batch.input_ids, attention_mask).flatten(0, 1)
    of_tokens = student_hidden, teacher_hidden
    if attention_mask is not None:
        of_tokens = student_hidden.index_select(0, batch.tokens), teacher_hidden.index_select(0, batch.tokens)
    if positions == "masked":
        rows, predicted = batch.masked, None
        of_rows = student_hidden.index_select(0, rows), teacher_hidden.index_select(0, rows)
    else:
        rows, predicted = batch.tokens, torch.searchsorted(batch.tokens, batch.masked)
        of_rows = of_tokens
    return States(*of_tokens, *of_rows, batch.labels.flatten().index_select(0, rows), predicted)


def plain_losses(config: LossConfig) -> PlainLosses:
    """The triple loss of gathered rows in torch.nn.functional; under autocast its softmaxes run in float32."""
    t = config.temperature

    def losses(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        predicted: Tensor | None,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        counts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        soft = F.log_softmax(student_logits / t, -1), F.softmax(teacher_logits / t, -1)
        ce = F.kl_div(*soft, reduction="sum") * (t**2 / counts[0])
        if predicted is not None:
            student_logits, labels = student_logits.index_select(0, predicted), labels.index_select(0, predicted)
        mlm = F.cross_entropy(student_logits, labels, reduction="sum") / counts[1]
        ones = student_hidden.new_ones(student_hidden.shape[0])
        cos = F.cosine_embedding_loss(student_hidden, teacher_hidden, ones, reduction="sum") / counts[2]
        loss = config.alpha_ce * ce + config.alpha_mlm * mlm + config.alpha_cos * cos
        return loss, torch.stack([ce, mlm, cos]).detach()

    return losses
