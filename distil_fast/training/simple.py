"""The demo's step and loop until it uses trainer.py: DistilBERT's triple loss, accumulated exactly, without host syncs.

It knows models, masked batches and the optimiser; nothing of text, tokenizers, files or the screen.
Next: distil_fast.triple_loss for the loss, demo.py for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from distil_fast import TripleTerms, triple_loss
from distil_fast.training.config import TrainingConfig
from distil_fast.training.masked_lm import MaskedLM, apply_head, autocast, encode
from distil_fast.training.masking import IGNORED, MaskedBatch

LossFunction: TypeAlias = Callable[..., TripleTerms]
Report: TypeAlias = Callable[[int, str], None]  # steps done, and the losses in words

TERMS = ("loss", "ce", "mlm", "cos")


def accumulate_gradients(
    student: MaskedLM,
    teacher: MaskedLM,
    micro_batches: Sequence[MaskedBatch],
    config: TrainingConfig,
    precision: str = "fp32",
    loss_function: LossFunction = triple_loss,
) -> Tensor:
    """Add the gradient of one optimiser step to the student's parameters.

    Each term of the loss is divided by its own count over all micro-batches, so values and gradients are those of
    one big batch, however ragged the parts: KL and cosine by the real tokens, MLM by the tokens to predict.

    Returns:
        The four `TERMS` of the step on the device, detached: the loss, and KL, MLM and cosine before their weights.
    """
    tokens = torch.stack([batch.attention_mask.sum() for batch in micro_batches]).sum()
    predictions = torch.stack([(batch.labels != IGNORED).sum() for batch in micro_batches]).sum()
    shares = []
    for input_ids, attention_mask, _, labels, _ in micro_batches:
        with autocast(student, precision):
            with torch.no_grad():
                teacher_hidden = encode(teacher, input_ids, attention_mask)
                teacher_logits = apply_head(teacher, teacher_hidden)
            student_hidden = encode(student, input_ids, attention_mask)
            student_logits = apply_head(student, student_hidden)
        terms = loss_function(
            student_logits,
            teacher_logits,
            labels,
            student_hidden,
            teacher_hidden,
            attention_mask,
            temperature=config.temperature,
            alpha_ce=config.alpha_ce,
            alpha_mlm=config.alpha_mlm,
            alpha_cos=config.alpha_cos,
            ce_count=tokens,
            mlm_count=predictions,
            cos_count=tokens,
        )
        terms.loss.backward()
        shares.append(torch.stack([term.detach() for term in terms]))
    return torch.stack(shares).sum(0)


def _in_words(terms: Tensor) -> str:
    return " ".join(f"{name} {value:.2f}" for name, value in zip(TERMS, terms.tolist(), strict=True))


class Trainer:
    """Distils `teacher` into `student`, in place.

    AdamW without decay, linear warm-up and decay of the learning rate, gradient norm clipped. The student is left in
    evaluation mode; the teacher is only read.

    Args:
        student, teacher: masked language models with one vocabulary and one hidden size, on one device.
        config: all numbers.
        precision: "fp32" or "bf16" (autocast; weights and optimiser stay fp32).
        loss_function: with the signature of `distil_fast.triple_loss`.
    """

    def __init__(
        self,
        student: MaskedLM,
        teacher: MaskedLM,
        config: TrainingConfig,
        precision: str = "fp32",
        loss_function: LossFunction = triple_loss,
    ) -> None:
        self.student = student
        self.teacher = teacher.train(False)
        self.config = config
        self.precision = precision
        self.loss_function = loss_function
        self.parameters = list(student.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.learning_rate, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True
        )
        self.schedule = get_linear_schedule_with_warmup(
            self.optimizer, round(config.warmup * config.steps), config.steps
        )

    def step(self, micro_batches: Sequence[MaskedBatch]) -> Tensor:
        """One optimiser step on all of `micro_batches`; returns its four `TERMS`, on the device."""
        self.optimizer.zero_grad()
        terms = accumulate_gradients(
            self.student, self.teacher, micro_batches, self.config, self.precision, self.loss_function
        )
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        return terms

    def fit(self, batches: Iterator[MaskedBatch], report: Report) -> Tensor:
        """Run the configured steps, `accumulation_steps` of `batches` each.

        Returns:
            The four `TERMS` of every step, float32 [steps, 4], on the CPU.

        Raises:
            FloatingPointError: a loss was inf or nan; seen when the losses are read, every `log_interval` steps. The
                student is then of no use, and what was saved before is untouched.
        """
        config = self.config
        history = torch.zeros(config.steps, len(TERMS), device=self.student.device)
        self.student.train(config.dropout)
        for step in range(config.steps):
            history[step] = self.step([next(batches) for _ in range(config.accumulation_steps)])
            done = step + 1
            if done % config.log_interval == 0 or done == config.steps:
                recent = history[(step // config.log_interval) * config.log_interval : done].cpu()
                self._check(recent, done)
                report(done, _in_words(recent.mean(0)))
        self.student.train(False)
        return history.cpu()

    def _check(self, recent: Tensor, done: int) -> None:
        bad = (~recent.isfinite()).any(1).nonzero()
        if len(bad):
            step = done - len(recent) + int(bad[0])
            values = _in_words(recent[bad[0, 0]])
            raise FloatingPointError(
                f"The loss of optimiser step {step} is not finite ({values}); training stopped, and what was saved "
                f"before is untouched. Lower the learning rate ({self.config.learning_rate:g}) or use fp32."
            )
