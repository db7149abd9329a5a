"""The fused linear losses as nn.Modules: settings in the constructor, tensors in forward, class weights a buffer.

They know nothing that linear.py does not, where arguments, formulae and errors stand. Next: modules.py, the others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distil_fast import linear
from distil_fast.modules import LabelLossModule, LossModule
from distil_fast.reference import Divergence, LossTerms
from distil_fast.teachers import Teacher


class LinearDistillationLoss(LabelLossModule):
    """`distil_fast.linear_distillation_loss` as a module."""

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        soft_weight: float = 1.0,
        hard_weight: float | None = None,
        ignore_index: int = -100,
        divergence: str | Divergence = "forward_kl",
        t_squared: bool = True,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        z_loss: float = 0.0,
        student_logit_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_softcap: float | None = None,
        vocab_size: int | None = None,
        reduction: str = "mean",
        precision: str = "exact",
        chunk_bytes: int | None = None,
        gather: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            class_weights,
            temperature=temperature,
            soft_weight=soft_weight,
            hard_weight=hard_weight,
            ignore_index=ignore_index,
            divergence=divergence,
            t_squared=t_squared,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            student_logit_scale=student_logit_scale,
            student_softcap=student_softcap,
            teacher_logit_scale=teacher_logit_scale,
            teacher_softcap=teacher_softcap,
            vocab_size=vocab_size,
            reduction=reduction,
            precision=precision,
            chunk_bytes=chunk_bytes,
            gather=gather,
            backend=backend,
        )

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | Teacher | None,
        teacher_weight: Tensor | None,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        soft_mask: Tensor | None = None,
        soft_count: float | Tensor | None = None,
        hard_count: float | Tensor | None = None,
    ) -> LossTerms:
        given: dict[str, Any] = {"soft_mask": soft_mask, "soft_count": soft_count, "hard_count": hard_count}
        given |= {"student_bias": student_bias, "teacher_bias": teacher_bias, "class_weights": self.class_weights}
        return linear.linear_distillation_loss(
            student_hidden, student_weight, teacher_hidden, teacher_weight, labels, **given, **self.settings
        )


class LinearDivergenceLoss(LossModule):
    """`distil_fast.linear_divergence_loss` as a module."""

    def __init__(
        self,
        *,
        divergence: str | Divergence = "forward_kl",
        temperature: float = 1.0,
        t_squared: bool = False,
        student_logit_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_softcap: float | None = None,
        vocab_size: int | None = None,
        reduction: str = "mean",
        precision: str = "exact",
        chunk_bytes: int | None = None,
        gather: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            divergence=divergence,
            temperature=temperature,
            t_squared=t_squared,
            student_logit_scale=student_logit_scale,
            student_softcap=student_softcap,
            teacher_logit_scale=teacher_logit_scale,
            teacher_softcap=teacher_softcap,
            vocab_size=vocab_size,
            reduction=reduction,
            precision=precision,
            chunk_bytes=chunk_bytes,
            gather=gather,
            backend=backend,
        )

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor | Teacher,
        teacher_weight: Tensor | None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        mask: Tensor | None = None,
        count: float | Tensor | None = None,
    ) -> Tensor:
        given: dict[str, Any] = {"student_bias": student_bias, "teacher_bias": teacher_bias, "mask": mask}
        given["count"] = count
        return linear.linear_divergence_loss(
            student_hidden, student_weight, teacher_hidden, teacher_weight, **given, **self.settings
        )


class LinearCrossEntropyLoss(LabelLossModule):
    """`distil_fast.linear_cross_entropy` as a module."""

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        z_loss: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        vocab_size: int | None = None,
        reduction: str = "mean",
        precision: str = "exact",
        chunk_bytes: int | None = None,
        gather: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            class_weights,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logit_scale=logit_scale,
            softcap=softcap,
            vocab_size=vocab_size,
            reduction=reduction,
            precision=precision,
            chunk_bytes=chunk_bytes,
            gather=gather,
            backend=backend,
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        count: float | Tensor | None = None,
    ) -> Tensor:
        given: dict[str, Any] = {"bias": bias, "count": count, "class_weights": self.class_weights}
        return linear.linear_cross_entropy(hidden, weight, labels, **given, **self.settings)
