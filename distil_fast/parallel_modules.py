"""The vocabulary-parallel losses as nn.Modules: settings in the constructor, tensors in forward.

Class weights are a buffer. They know nothing that parallel does not, where arguments, formulae and errors stand. Next:
modules.py, the others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distil_fast import parallel
from distil_fast.modules import LabelLossModule, LossModule
from distil_fast.reference import LossTerms


class VocabParallelDistillationLoss(LabelLossModule):
    """`distil_fast.vocab_parallel_distillation_loss` as a module; its keyword arguments but masks and counts."""

    def __init__(self, *, class_weights: Tensor | None = None, **settings: Any) -> None:
        super().__init__(class_weights, **settings)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor | None = None,
        *,
        soft_mask: Tensor | None = None,
        soft_count: float | Tensor | None = None,
        hard_count: float | Tensor | None = None,
    ) -> LossTerms:
        counts: dict[str, Any] = {"soft_mask": soft_mask, "soft_count": soft_count, "hard_count": hard_count}
        return parallel.vocab_parallel_distillation_loss(
            student_logits, teacher_logits, labels, class_weights=self.class_weights, **counts, **self.settings
        )


class VocabParallelDivergenceLoss(LossModule):
    """`distil_fast.vocab_parallel_divergence_loss` as a module; its keyword arguments but mask and count."""

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Tensor | None = None,
        count: float | Tensor | None = None,
    ) -> Tensor:
        return parallel.vocab_parallel_divergence_loss(
            student_logits, teacher_logits, mask=mask, count=count, **self.settings
        )


class VocabParallelCrossEntropyLoss(LabelLossModule):
    """`distil_fast.vocab_parallel_cross_entropy` as a module; its keyword arguments but the count."""

    def __init__(self, *, class_weights: Tensor | None = None, **settings: Any) -> None:
        super().__init__(class_weights, **settings)

    def forward(self, logits: Tensor, labels: Tensor, *, count: float | Tensor | None = None) -> Tensor:
        return parallel.vocab_parallel_cross_entropy(
            logits, labels, count=count, class_weights=self.class_weights, **self.settings
        )


class VocabParallelLinearDistillationLoss(LabelLossModule):
    """`distil_fast.vocab_parallel_linear_distillation_loss` as a module; its keyword arguments but biases, masks and
    counts. It holds no weights: the heads' shards are arguments."""

    def __init__(self, *, class_weights: Tensor | None = None, **settings: Any) -> None:
        super().__init__(class_weights, **settings)

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        soft_mask: Tensor | None = None,
        soft_count: float | Tensor | None = None,
        hard_count: float | Tensor | None = None,
    ) -> LossTerms:
        per_call: dict[str, Any] = {
            "student_bias": student_bias,
            "teacher_bias": teacher_bias,
            "soft_mask": soft_mask,
            "soft_count": soft_count,
            "hard_count": hard_count,
        }
        return parallel.vocab_parallel_linear_distillation_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            class_weights=self.class_weights,
            **per_call,
            **self.settings,
        )
