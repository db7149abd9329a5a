"""NVIDIA ModelOpt's distillation of logits over our kernels: a loss for its `kd_loss` mode, and for its `KDTrainer`.

`LogitsDistillationLoss` goes into `mtd.convert`'s criterion; `apply` replaces it in a model or trainer at hand. It
knows nothing of balancers and hooks. Next: replaced.py; docs/integrations.md for the host's denominators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from distil_fast import divergence_loss
from distil_fast.integrations.replaced import HostChangedError, Replaced, expect_parameters

REDUCTIONS = ("mean", "batchmean", "sum", "none", "token_mean")
IGNORE_INDEX = -100  # as in modelopt.torch.distill.plugins.huggingface


class LogitsDistillationLoss(_Loss):
    """T^2 KL(teacher || student) of logits at temperature T: ModelOpt's loss of the same name (Hinton et al. 2015).

    With KL_r that of row r, and T^2 in front of each:

        "none"        KL_r, of shape [...]             "sum"         sum_r KL_r
        "mean"        sum_r KL_r / (rows V)            ModelOpt's default, which divides by the vocabulary's size too
        "batchmean"   sum_r KL_r / B                   by the first dimension alone, also of logits [B, S, V]
        "token_mean"  sum_r KL_r / rows                ours: the mean over tokens

    Args:
        temperature: T > 0.
        reduction: one of these. With a mask, rows are those under it; B stays B.

    Raises:
        ValueError: another reduction; a temperature that is not above 0.
    """

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}.")
        if not temperature > 0.0:
            raise ValueError(f"temperature: expected a number > 0, got {temperature}.")
        self._temperature = temperature
        self._reduction = reduction

    def forward(self, out_s: Any, out_t: Any, mask: Tensor | None = None) -> Tensor:
        """The loss of two outputs.

        Args:
            out_s, out_t: logits `[..., V]`, or what a model of transformers returns, with `.logits`. The teacher's are
                detached.
            mask: `[...]`, bool or float weights: the tokens that count, through `compute_kd_loss(mask=...)`. ModelOpt
                has none: prompt and padding count there.

        Returns:
            float32 (float64 for float64 logits), 0-d or `[...]`; 0 without a row.

        Raises:
            ValueError, TypeError: as `distil_fast.divergence_loss`.
        """
        student, teacher = _logits(out_s), _logits(out_t).detach()
        count: float | Tensor | None = None
        if self._reduction == "mean":
            rows = student.shape[:-1].numel() if mask is None else mask.sum(dtype=torch.float64)
            count = rows * student.shape[-1]
        elif self._reduction == "batchmean":
            count = student.shape[0]
        return divergence_loss(
            student,
            teacher,
            temperature=self._temperature,
            t_squared=True,
            mask=mask,
            count=count,
            reduction=self._reduction if self._reduction in ("sum", "none") else "mean",
        )


def apply(host: Any) -> Replaced:
    """Replace ModelOpt's loss of logits in a converted model, or in a trainer of its Hugging Face plugin.

    Args:
        host: the `DistillationModel` that `mtd.convert(model, mode=[("kd_loss", ...)])` returns: each of its pairs of
            layers whose loss is ModelOpt's `LogitsDistillationLoss` gets ours. Or a `KDTrainer`: its step over shifted
            labels then reads the logits where they are, without the two float32 copies. (With `use_liger_kernel` a
            KDTrainer has no logits, and never comes here.)

    Returns:
        Replaced, whose `undo()` puts ModelOpt's code back.

    Raises:
        HostChangedError: there is no such loss, or ModelOpt has changed shape.
    """
    if hasattr(host, "_kd_criterion"):
        return _apply_to_trainer(host)
    pairs = getattr(host, "_layers_to_loss", None) or {}
    ours = {pair: _ours(loss) if _is_theirs(loss) else loss for pair, loss in pairs.items()}
    if ours == pairs:
        raise HostChangedError(
            f"ModelOpt: expected a DistillationModel with a LogitsDistillationLoss, or a KDTrainer, got "
            f"{type(host).__name__} with {[type(loss).__name__ for loss in pairs.values()]}. Is it ours already?"
        )
    return Replaced(host, _layers_to_loss=ours)


def _apply_to_trainer(trainer: Any) -> Replaced:
    if not _is_theirs(trainer._kd_criterion) or not hasattr(trainer, "_standard_kd_loss"):
        raise HostChangedError(
            f"ModelOpt: expected {type(trainer).__name__} to have a LogitsDistillationLoss and _standard_kd_loss. "
            "docs/integrations.md names the versions that were tested."
        )
    expect_parameters(trainer._standard_kd_loss, ("outputs", "labels"), "ModelOpt")
    criterion = LogitsDistillationLoss(trainer._kd_criterion._temperature, "token_mean")

    def standard_kd_loss(outputs: Any, labels: Tensor | None, **kwargs: Any) -> Tensor:
        """`KDTrainer._standard_kd_loss`: the mean over the tokens whose next label counts."""
        teacher, trainer._last_teacher_outputs = trainer._last_teacher_outputs, None
        mask = None if labels is None else labels[..., 1:] != IGNORE_INDEX
        return criterion(outputs.logits[..., :-1, :], teacher.logits[..., :-1, :], mask=mask)

    return Replaced(trainer, _standard_kd_loss=standard_kd_loss)


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _is_theirs(loss: Any) -> bool:
    from modelopt.torch.distill import losses  # type: ignore[import-not-found, unused-ignore]

    theirs = type(loss) is losses.LogitsDistillationLoss
    if theirs and not (hasattr(loss, "_temperature") and hasattr(loss, "_reduction")):
        raise HostChangedError(
            "ModelOpt: expected LogitsDistillationLoss to have _temperature and _reduction. "
            "docs/integrations.md names the versions that were tested."
        )
    return theirs


def _ours(loss: Any) -> LogitsDistillationLoss:
    return LogitsDistillationLoss(loss._temperature, loss._reduction)
