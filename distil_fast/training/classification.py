"""Task distillation: a fine-tuned sequence classifier teaches a smaller one. The module that the training loop trains.

It knows two classifiers of the Hugging Face kind and one batch; nothing of text, tasks or optimisers. Next:
classification_feed.py, which makes the batches; classifier_student.py, which makes the student.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distil_fast import distillation_loss, hidden_loss, logit_mse, mse_loss
from distil_fast.training.batch import IGNORED, Batch
from distil_fast.training.dense import by_the_fastest
from distil_fast.training.protocols import Objective
from distil_fast.training.settings import InputError, LossConfig

LAST = ((-1, -1),)  # pairs of layers


class ClassificationObjective(Objective):
    """Teacher, student and the three losses of task distillation in one forward.

    With class logits s of the student and t of the teacher, T the temperature, and h the last hidden states:

        ce     T^2 KL(softmax(t / T) || softmax(s / T))         a mean over sequences
        label  -log softmax(s)[label]                           a mean over sequences with a label
        cos    1 - cos(h_s, h_t)                                a mean over real tokens (and pairs of layers)
        loss = alpha_ce ce + alpha_mlm label + alpha_cos cos

    (Hinton et al. 2015, section 2; Sanh et al. 2019, section 3.) Of a regression, which has one output and no
    distribution, ce is the squared distance of the outputs, without temperature, and label the squared error.

    A term of weight 0 is not computed, and its value is 0; with ce and cos both left out the teacher is not run, which
    makes this plain fine-tuning. The teacher stays in evaluation mode and moves with the module, but is not among its
    submodules, parameters or state.

    Args:
        student: a `...ForSequenceClassification`.
        teacher: likewise, with as many outputs; None where only the labels are to be learnt.
        loss: weights, temperature and `layers`; what it says of positions and heads is for masked language models.

    Raises:
        InputError: numbers of outputs that differ, hidden states of different widths under a cosine, no teacher for a
            term that needs one, or no term at all.
    """

    terms: ClassVar[tuple[str, ...]] = ("ce", "label", "cos")
    teacher: PreTrainedModel | None

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, loss: LossConfig) -> None:
        super().__init__()
        _check(student, teacher, loss)
        self.student = student
        self.loss = loss
        self.regression = student.config.num_labels == 1
        if teacher is not None:
            teacher.train(False).requires_grad_(False)
        self.__dict__["teacher"] = teacher  # past nn.Module, which would register it

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassificationObjective:
        super()._apply(fn, recurse)
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return self

    def counts(self, batch: Batch) -> Tensor:
        """Sequences, sequences with a label, real tokens; float32 [3]."""
        sequences, device = batch.input_ids.shape[0], batch.input_ids.device
        labelled = self._labelled(batch).sum(dtype=torch.float32)
        known = (torch.full((), float(count), device=device) for count in (sequences, batch.tokens.numel()))
        sequences_count, tokens_count = known
        return torch.stack([sequences_count, labelled, tokens_count])

    def _labelled(self, batch: Batch) -> Tensor:
        if batch.labels is None:
            return torch.zeros(batch.input_ids.shape[0], dtype=torch.bool, device=batch.input_ids.device)
        return ~batch.labels.isnan() if self.regression else batch.labels != IGNORED

    def forward(self, batch: Batch, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its terms; a sequence without a label has -100, or nan in a regression."""
        loss = self.loss
        teacher = None
        with by_the_fastest(batch.input_ids.device):
            student = self.student(**classifier_inputs(self.student, batch), output_hidden_states=bool(loss.alpha_cos))
            if loss.alpha_ce or loss.alpha_cos:
                assert self.teacher is not None
                with torch.no_grad():
                    inputs = classifier_inputs(self.teacher, batch)
                    teacher = self.teacher(**inputs, output_hidden_states=bool(loss.alpha_cos))
        teacher_logits = teacher.logits if teacher is not None and loss.alpha_ce else None
        outputs = self._regression_terms if self.regression else self._class_terms
        total, ce, label = outputs(student.logits, teacher_logits, batch, counts)
        cos = torch.zeros_like(ce)
        if loss.alpha_cos and teacher is not None:
            cos = hidden_loss(
                student.hidden_states,
                teacher.hidden_states,
                batch.attention_mask.bool(),
                layer_map=[(s, t) for s, t in loss.layers or LAST],
                count=counts[2],
            )
            total = total + loss.alpha_cos * cos
        return total, torch.stack([ce, label, cos.detach()])

    def _class_terms(
        self, logits: Tensor, teacher_logits: Tensor | None, batch: Batch, counts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        labels = batch.labels if self.loss.alpha_mlm else None
        if teacher_logits is None and labels is None:
            zero = logits.float().sum() * 0.0  # with a graph, for the cosine alone
            return zero, zero.detach(), zero.detach()
        found = distillation_loss(
            logits,
            teacher_logits,
            labels,
            temperature=self.loss.temperature,
            soft_weight=self.loss.alpha_ce,
            hard_weight=self.loss.alpha_mlm if labels is not None else None,
            soft_count=counts[0] if teacher_logits is not None else None,
            hard_count=counts[1] if labels is not None else None,
            ignore_index=IGNORED,
        )
        return found.loss, found.soft, found.hard

    def _regression_terms(
        self, outputs: Tensor, teacher_outputs: Tensor | None, batch: Batch, counts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = outputs.float().sum() * 0.0
        ce = label = total.detach()
        if teacher_outputs is not None:
            distance = logit_mse(outputs, teacher_outputs, count=counts[0])
            total, ce = total + self.loss.alpha_ce * distance, distance.detach()
        if batch.labels is not None and self.loss.alpha_mlm:
            wanted = batch.labels.to(outputs.dtype).unsqueeze(1)
            error = mse_loss(outputs, wanted, self._labelled(batch), count=counts[1])
            total, label = total + self.loss.alpha_mlm * error, error.detach()
        return total, ce, label


def classifier_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """What the model takes of the batch: token types only where it embeds more than one."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if batch.token_type_ids is not None and getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = batch.token_type_ids
    return inputs


def _check(student: PreTrainedModel, teacher: PreTrainedModel | None, loss: LossConfig) -> None:
    if not (loss.alpha_ce or loss.alpha_mlm or loss.alpha_cos):
        raise InputError("loss: expected at least one of alpha_ce, alpha_mlm and alpha_cos above 0, got none.")
    if teacher is None:
        if loss.alpha_ce or loss.alpha_cos:
            raise InputError("teacher: expected one for alpha_ce or alpha_cos above 0, got none. Set both to 0.")
        return
    outputs = student.config.num_labels, teacher.config.num_labels
    if outputs[0] != outputs[1]:
        raise InputError(
            f"teacher: expected {outputs[0]} outputs as the student has, got {outputs[1]}. Fine-tune it on the task."
        )
    widths = student.config.hidden_size, teacher.config.hidden_size
    if loss.alpha_cos and widths[0] != widths[1]:
        raise InputError(
            f"loss.alpha_cos: expected hidden states of one width, got {widths[0]} of the student and {widths[1]} of "
            "the teacher. Set alpha_cos to 0."
        )
