"""torchtune's six KD losses over our kernels: the same names, constructors and calls, for a YAML or a recipe object.

In a config `_component_: distil_fast.integrations.torchtune.ForwardKLLoss`; for a recipe after setup `apply(recipe)`.
It knows nothing of models, nor of what the recipe does with the loss. Next: replaced.py; docs/integrations.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distil_fast import divergence_loss
from distil_fast.integrations.replaced import HostChangedError, Replaced, expect_parameters

Terms = Sequence[tuple[str, float]]  # divergences and their weights


def apply(recipe: Any) -> Replaced:
    """Replace the KD loss of a recipe that has been set up, by ours of the same name and arguments.

    Args:
        recipe: an object whose `_kd_loss_fn` is one of torchtune's six KD losses, compiled or not, as
            `KDRecipeSingleDevice` and `KDRecipeDistributed` have it after `setup`.

    Returns:
        Replaced, whose `undo()` puts torchtune's loss back.

    Raises:
        HostChangedError: the recipe has no such loss, or it is no longer called or configured as in torchtune 0.6.
    """
    found: Any = getattr(recipe, "_kd_loss_fn", None)
    theirs: Any = getattr(found, "_orig_mod", found)  # of torch.compile
    ours = _CLASSES.get(type(theirs).__name__)
    if ours is None or type(theirs).__module__.partition(".")[0] != "torchtune":
        raise HostChangedError(
            f"torchtune: expected {type(recipe).__name__}._kd_loss_fn to be one of {', '.join(_CLASSES)}, of "
            f"torchtune.modules.loss, got {type(theirs).__name__}. Call apply after the recipe's setup."
        )
    expect_parameters(theirs.forward, ("student_logits", "teacher_logits", "labels"), "torchtune")
    options = list(inspect.signature(ours).parameters)
    missing = [option for option in options if not hasattr(theirs, option)]
    if missing:
        raise HostChangedError(
            f"torchtune: expected {type(theirs).__name__} to have {', '.join(missing)}, which this version does not. "
            "docs/integrations.md names the versions that were tested."
        )
    return Replaced(recipe, _kd_loss_fn=ours(**{option: getattr(theirs, option) for option in options}))


def _term(
    divergence: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    reduction: str,
    count: Tensor | None,
) -> Tensor:
    """One divergence over the labelled rows, with torchtune's reading of infinite logits."""
    mask = labels != ignore_index
    loss = divergence_loss(
        student_logits, teacher_logits, divergence=divergence, mask=mask, count=count, reduction=reduction
    )
    if not torch.isinf(loss):
        return loss
    rows = _finite_columns(divergence, student_logits, teacher_logits)
    total = torch.where(mask, rows, 0.0).sum()
    return total if reduction == "sum" else total / (mask.sum() if count is None else count)


def _finite_columns(divergence: str, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Each row's sum without the columns of infinite logits, in plain torch, for the rare call that needs it.

    Where one model alone excludes a column by -inf, the divergence is infinite. torchtune leaves the column out of its
    sum: of the student's infinities in the forward loss, of both models' in the reverse one.
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_q, log_p = student_logits.log_softmax(-1, dtype=dtype), teacher_logits.log_softmax(-1, dtype=dtype)
    p, q = log_p.exp(), student_logits.softmax(-1, dtype=dtype)
    left_out = torch.isinf(student_logits)
    if divergence == "soft_cross_entropy":
        return -(p * log_q.masked_fill(left_out, 0.0)).sum(-1)
    left_out = left_out | torch.isinf(teacher_logits)
    return (q * (log_q.masked_fill(left_out, 0.0) - log_p.masked_fill(left_out, 0.0))).sum(-1)


class _KDLoss(nn.Module):
    """What the six have in common: divergences over rows whose label is not `ignore_index`."""

    terms: Terms

    def __init__(self, ignore_index: int) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def apply_compile_strategy(self, *args: Any, **kwargs: Any) -> nn.Module:
        """What newer versions of torchtune call for `compile: True`: a fused op has nothing left to compile."""
        return self

    def _rows(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, reduction: str, count: Tensor | None
    ) -> Tensor:
        terms = [term for term in self.terms if term[1] != 0.0]
        if len(terms) > 1:  # their gradients are added before they are rounded to 16 bits, not after
            student_logits = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
        losses = [
            weight * _term(divergence, student_logits, teacher_logits, labels, self.ignore_index, reduction, count)
            for divergence, weight in terms
        ]
        return sum(losses[1:], losses[0])


class _WholeLoss(_KDLoss):
    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
        """The loss of `[..., V]` logits.

        Args:
            student_logits, teacher_logits: `[rows, V]` or `[B, S, V]`, of any floating dtype.
            labels: as many as there are rows, already shifted; only whether they are `ignore_index` matters.
            normalize: the mean over the labelled rows; False: their sum.

        Returns:
            float32 (float64 for float64 logits), 0-d; 0, with zero gradient, without a labelled row.

        Raises:
            ValueError, TypeError: labels that are not as many as the rows; else as `distil_fast.divergence_loss`.
        """
        rows = student_logits.shape[:-1]
        if labels.numel() != rows.numel():
            raise ValueError(
                f"labels: expected one for each row of student_logits {tuple(student_logits.shape)}, got shape "
                f"{tuple(labels.shape)}."
            )
        reduction = "mean" if normalize else "sum"
        return self._rows(student_logits, teacher_logits, labels.reshape(rows), reduction, None)


class _ChunkedLoss(_KDLoss):
    def __init__(self, num_output_chunks: int, ignore_index: int) -> None:
        super().__init__(ignore_index)
        self.num_output_chunks = num_output_chunks  # the recipe compares it with its cross-entropy's

    def forward(self, student_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        """The loss of logits in chunks along the sequence, by whatever rule they were cut.

        Args:
            student_logits, teacher_logits: as many chunks `[B, S_i, V]`, of equal lengths S_i.
            labels: `[B, S]`, S the sum of S_i, already shifted; only whether they are `ignore_index` matters.

        Returns:
            float32 (float64 for float64 logits), 0-d: the mean over the labelled tokens of all chunks; 0, with zero
            gradient, without one.

        Raises:
            ValueError, TypeError: chunks and labels that do not fit together; else as `distil_fast.divergence_loss`.
        """
        lengths = [chunk.shape[1] for chunk in student_logits]
        theirs = [chunk.shape[1] for chunk in teacher_logits]
        if lengths != theirs or labels.dim() != 2 or sum(lengths) != labels.shape[1]:
            raise ValueError(
                f"labels: expected [B, S] labels and chunks of both models whose lengths come to S, got labels "
                f"{tuple(labels.shape)}, lengths {lengths} of the student's and {theirs} of the teacher's chunks."
            )
        count = (labels != self.ignore_index).sum()
        chunks = zip(student_logits, teacher_logits, labels.split(lengths, dim=1), strict=True)
        losses = [self._rows(student, teacher, chunk, "mean", count) for student, teacher, chunk in chunks]
        return sum(losses[1:], losses[0])


def _symmetric(ratio: float) -> Terms:
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"sym_kd_ratio must be in the range [0, 1], got {ratio}.")
    return ("soft_cross_entropy", ratio), ("reverse_kl", 1.0 - ratio)


class ForwardKLLoss(_WholeLoss):
    """torchtune's forward KL, which is a cross-entropy: KL(teacher || student) and the teacher's entropy.

        loss = sum_r sum_j -p_rj log q_rj / (labelled rows),   p, q the softmaxes of teacher and student

    The entropy has no gradient: gradients are those of the KL. Arguments of `forward`: see there.
    """

    terms: Terms = (("soft_cross_entropy", 1.0),)

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(ignore_index)


class ReverseKLLoss(_WholeLoss):
    """torchtune's reverse KL: sum_r KL(student || teacher) / (labelled rows)."""

    terms: Terms = (("reverse_kl", 1.0),)

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(ignore_index)


class SymmetricKLLoss(_WholeLoss):
    """torchtune's mixture: sym_kd_ratio ForwardKLLoss + (1 - sym_kd_ratio) ReverseKLLoss, a cross-entropy and a KL.

    Raises:
        ValueError: sym_kd_ratio is not in [0, 1].
    """

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(ignore_index)
        self.terms = _symmetric(sym_kd_ratio)
        self.sym_kd_ratio = sym_kd_ratio


class ForwardKLWithChunkedOutputLoss(_ChunkedLoss):
    """`ForwardKLLoss` of chunks of logits, one after the other."""

    terms = ForwardKLLoss.terms

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, ignore_index)


class ReverseKLWithChunkedOutputLoss(_ChunkedLoss):
    """`ReverseKLLoss` of chunks of logits, one after the other."""

    terms = ReverseKLLoss.terms

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, ignore_index)


class SymmetricKLWithChunkedOutputLoss(_ChunkedLoss):
    """`SymmetricKLLoss` of chunks of logits, one after the other.

    Raises:
        ValueError: sym_kd_ratio is not in [0, 1].
    """

    def __init__(self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(num_output_chunks, ignore_index)
        self.terms = _symmetric(sym_kd_ratio)
        self.sym_kd_ratio = sym_kd_ratio


_CLASSES: dict[str, type[_KDLoss]] = {
    loss.__name__: loss
    for loss in (
        ForwardKLLoss,
        ReverseKLLoss,
        SymmetricKLLoss,
        ForwardKLWithChunkedOutputLoss,
        ReverseKLWithChunkedOutputLoss,
        SymmetricKLWithChunkedOutputLoss,
    )
}
