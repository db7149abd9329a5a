"""A modern step's module: teacher, student and losses of the rows that need them, by plain torch or by distil_fast.

Heads run on the gathered rows only, in one piece or fused; nothing here asks the device for a value. It knows nothing
of optimisers or time. Next: train_steps.py; original.py for what it is compared with.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import BertForMaskedLM, DistilBertForMaskedLM

from distil_fast import cosine_loss, linear_distillation_loss
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


class GatheredObjective(Objective):
    """Both encoders, and the rows gathered for the losses by positions that the host knows.

    Args:
        student, teacher: masked language models with one vocabulary and one hidden size, on one device.
        config: temperature, alphas and `positions`.
    """

    terms = ("ce", "mlm", "cos")
    student: MaskedLM

    def __init__(self, student: MaskedLM, teacher: MaskedLM, config: LossConfig) -> None:
        super().__init__()
        self.student = student
        self._unregistered = (teacher.eval(),)
        self.config = config

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
        return self.losses(self.states(batch), counts)

    def states(self, batch: MaskedBatch) -> States:
        """Both encoders' output where it is needed."""
        assert batch.masked is not None
        with torch.no_grad():
            teacher = encode(self.teacher, batch.input_ids, batch.attention_mask).flatten(0, 1)
        student = encode(self.student, batch.input_ids, batch.attention_mask).flatten(0, 1)
        of_tokens = student.index_select(0, batch.tokens), teacher.index_select(0, batch.tokens)
        if self.config.positions == "masked":
            rows, predicted = batch.masked, None
            of_rows = student.index_select(0, rows), teacher.index_select(0, rows)
        else:
            rows, predicted = batch.tokens, torch.searchsorted(batch.tokens, batch.masked)
            of_rows = of_tokens
        return States(*of_tokens, *of_rows, batch.labels.flatten().index_select(0, rows), predicted)

    @abstractmethod
    def losses(self, states: States, counts: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` returns."""


class PlainObjective(GatheredObjective):
    """Plain torch, as one writes it with care: whole logits, of the gathered rows only; labels where there are some.

    Args:
        loss_function: `plain_losses` of the same configuration, or torch.compile of it.
    """

    def __init__(self, student: MaskedLM, teacher: MaskedLM, config: LossConfig, loss_function: PlainLosses) -> None:
        super().__init__(student, teacher, config)
        self.loss_function = loss_function

    def losses(self, states: States, counts: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher_logits = apply_head(self.teacher, states.teacher_rows)
        student_logits = apply_head(self.student, states.student_rows)
        hidden = states.student, states.teacher
        return self.loss_function(student_logits, teacher_logits, states.labels, states.predicted, *hidden, counts)


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


class OurObjective(GatheredObjective):
    """distil_fast's: one pass from hidden states to both logit terms and their gradients, and one for the cosine."""

    def losses(self, states: States, counts: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        with torch.no_grad():
            teacher_features = _transform(self.teacher, states.teacher_rows)
        decoder, teacher_decoder = _decoder(self.student), _decoder(self.teacher)
        logit_terms = linear_distillation_loss(
            _transform(self.student, states.student_rows),
            decoder.weight,
            teacher_features,
            teacher_decoder.weight,
            states.labels,
            student_bias=decoder.bias,
            teacher_bias=teacher_decoder.bias,
            temperature=config.temperature,
            soft_weight=config.alpha_ce,
            hard_weight=config.alpha_mlm,
            soft_count=counts[0],
            hard_count=counts[1],
            precision=config.head_precision,
        )
        cos = cosine_loss(states.student, states.teacher, count=counts[2])
        terms = torch.stack([logit_terms.soft.detach(), logit_terms.hard.detach(), cos.detach()])
        return logit_terms.loss + config.alpha_cos * cos, terms


def _transform(model: MaskedLM, hidden: Tensor) -> Tensor:
    """The head up to its decoder."""
    if isinstance(model, BertForMaskedLM):
        return model.cls.predictions.transform(hidden)
    assert isinstance(model, DistilBertForMaskedLM)
    return model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))


def _decoder(model: MaskedLM) -> nn.Linear:
    decoder = model.get_output_embeddings()
    assert isinstance(decoder, nn.Linear)
    return decoder
