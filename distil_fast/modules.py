"""The public functions as nn.Modules: settings in the constructor, tensors in forward.

There is no state but HiddenLoss' layers and class weights, a buffer as in `torch.nn.CrossEntropyLoss`.

They know nothing that functional.py, hidden.py and linear.py do not, where arguments, formulae and errors stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from distil_fast import functional, hidden, linear, parallel
from distil_fast.reference import Divergence, LossTerms, TripleTerms
from distil_fast.teachers import Teacher


class _Loss(nn.Module):
    """A function with its settings bound."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class _LabelLoss(_Loss):
    """A loss with labels, whose classes may have weights; they move and are saved with the module."""

    class_weights: Tensor | None

    def __init__(self, class_weights: Tensor | None, **settings: Any) -> None:
        super().__init__(**settings)
        self.register_buffer("class_weights", class_weights)

    def extra_repr(self) -> str:
        shape = None if self.class_weights is None else tuple(self.class_weights.shape)
        return f"{super().extra_repr()}, class_weights={shape}"


class DistillationLoss(_LabelLoss):
    """`distil_fast.distillation_loss` as a module."""

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
        inplace: bool = False,
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
            inplace=inplace,
            backend=backend,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Teacher | None,
        labels: Tensor | None = None,
        *,
        soft_mask: Tensor | None = None,
        soft_count: float | Tensor | None = None,
        hard_count: float | Tensor | None = None,
    ) -> LossTerms:
        given: dict[str, Any] = {"soft_mask": soft_mask, "soft_count": soft_count, "hard_count": hard_count}
        given["class_weights"] = self.class_weights
        return functional.distillation_loss(student_logits, teacher_logits, labels, **given, **self.settings)


class DivergenceLoss(_Loss):
    """`distil_fast.divergence_loss` as a module."""

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
            backend=backend,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Teacher,
        *,
        mask: Tensor | None = None,
        count: float | Tensor | None = None,
    ) -> Tensor:
        return functional.divergence_loss(student_logits, teacher_logits, mask=mask, count=count, **self.settings)


class CrossEntropyLoss(_LabelLoss):
    """`distil_fast.cross_entropy` as a module."""

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
            backend=backend,
        )

    def forward(self, logits: Tensor, labels: Tensor, *, count: float | Tensor | None = None) -> Tensor:
        return functional.cross_entropy(logits, labels, count=count, class_weights=self.class_weights, **self.settings)


class CosineLoss(_Loss):
    """`distil_fast.cosine_loss` as a module."""

    def __init__(self, *, reduction: str = "mean", backend: str | None = None) -> None:
        super().__init__(reduction=reduction, backend=backend)

    def forward(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        mask: Tensor | None = None,
        count: float | Tensor | None = None,
    ) -> Tensor:
        return functional.cosine_loss(student_hidden, teacher_hidden, mask, count, **self.settings)


class HiddenMSELoss(_Loss):
    """`distil_fast.mse_loss` as a module."""

    def __init__(self, *, reduction: str = "mean", backend: str | None = None) -> None:
        super().__init__(reduction=reduction, backend=backend)

    def forward(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        mask: Tensor | None = None,
        count: float | Tensor | None = None,
    ) -> Tensor:
        return hidden.mse_loss(student_hidden, teacher_hidden, mask, count, **self.settings)


class LogitMSELoss(_Loss):
    """`distil_fast.logit_mse` as a module."""

    def __init__(self, *, reduction: str = "mean", backend: str | None = None) -> None:
        super().__init__(reduction=reduction, backend=backend)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        mask: Tensor | None = None,
        count: float | Tensor | None = None,
    ) -> Tensor:
        return hidden.logit_mse(student_logits, teacher_logits, mask, count, **self.settings)


class HiddenLoss(_Loss):
    """`distil_fast.hidden_loss` as a module, which owns the projections where the widths differ.

    Args:
        student_width, teacher_width: with both, each pair of layers has an `nn.Linear(student_width, teacher_width)` in
            `projections`, to be trained with the student; needs a layer map, which says how many. None: no projections.
        layer_map, kind, layer_weights, backend: as in `distil_fast.hidden_loss`.

    Raises:
        ValueError: one width without the other, or widths without a layer map.
    """

    def __init__(
        self,
        *,
        layer_map: Sequence[tuple[int, int]] | None = None,
        kind: str = "cosine",
        layer_weights: Sequence[float | Tensor] | None = None,
        student_width: int | None = None,
        teacher_width: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(layer_map=layer_map, kind=kind, layer_weights=layer_weights, backend=backend)
        self.projections: nn.ModuleList | None = None
        if student_width is None and teacher_width is None:
            return
        if student_width is None or teacher_width is None or layer_map is None:
            raise ValueError(
                "student_width, teacher_width and layer_map: expected all three, or no widths, got "
                f"{student_width}, {teacher_width} and {layer_map}: each pair of layers has a projection of its own."
            )
        self.projections = nn.ModuleList(nn.Linear(student_width, teacher_width) for _ in layer_map)

    def forward(
        self,
        student_states: Sequence[Tensor],
        teacher_states: Sequence[Tensor],
        mask: Tensor | None = None,
        *,
        count: float | Tensor | None = None,
    ) -> Tensor:
        return hidden.hidden_loss(
            student_states, teacher_states, mask, projections=self.projections, count=count, **self.settings
        )


class AttentionLoss(_Loss):
    """`distil_fast.attention_loss` as a module."""

    def __init__(
        self,
        *,
        layer_map: Sequence[tuple[int, int]] | None = None,
        kind: str = "mse",
        backend: str | None = None,
    ) -> None:
        super().__init__(layer_map=layer_map, kind=kind, backend=backend)

    def forward(
        self,
        student_attentions: Sequence[Tensor],
        teacher_attentions: Sequence[Tensor],
        attention_mask: Tensor | None = None,
        *,
        count: float | Tensor | None = None,
    ) -> Tensor:
        return hidden.attention_loss(
            student_attentions, teacher_attentions, attention_mask, count=count, **self.settings
        )


class TripleLoss(_Loss):
    """`distil_fast.triple_loss` as a module."""

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        alpha_ce: float = 5.0,
        alpha_mlm: float = 2.0,
        alpha_cos: float = 1.0,
        restrict_ce_to_mask: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            alpha_ce=alpha_ce,
            alpha_mlm=alpha_mlm,
            alpha_cos=alpha_cos,
            restrict_ce_to_mask=restrict_ce_to_mask,
            backend=backend,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        attention_mask: Tensor,
        *,
        ce_count: float | Tensor | None = None,
        mlm_count: float | Tensor | None = None,
        cos_count: float | Tensor | None = None,
    ) -> TripleTerms:
        counts: dict[str, Any] = {"ce_count": ce_count, "mlm_count": mlm_count, "cos_count": cos_count}
        return functional.triple_loss(
            student_logits,
            teacher_logits,
            labels,
            student_hidden,
            teacher_hidden,
            attention_mask,
            **counts,
            **self.settings,
        )


class LinearDistillationLoss(_LabelLoss):
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


class LinearDivergenceLoss(_Loss):
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


class LinearCrossEntropyLoss(_LabelLoss):
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


class VocabParallelDistillationLoss(_LabelLoss):
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


class VocabParallelDivergenceLoss(_Loss):
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


class VocabParallelCrossEntropyLoss(_LabelLoss):
    """`distil_fast.vocab_parallel_cross_entropy` as a module; its keyword arguments but the count."""

    def __init__(self, *, class_weights: Tensor | None = None, **settings: Any) -> None:
        super().__init__(class_weights, **settings)

    def forward(self, logits: Tensor, labels: Tensor, *, count: float | Tensor | None = None) -> Tensor:
        return parallel.vocab_parallel_cross_entropy(
            logits, labels, count=count, class_weights=self.class_weights, **self.settings
        )


class VocabParallelLinearDistillationLoss(_LabelLoss):
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
