"""Losses over a vocabulary that is sharded across the ranks of a process group, as tensor parallelism leaves it.

Each rank passes its own columns of the logits, or its own rows of the heads; no logits are gathered. Arguments,
formulae and conventions are those of functional.py; what differs is said here. Next: call.py; docs/math.md, "Sharded
vocabularies".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distil_fast.parallel import call, linear
from distil_fast.reference import Divergence, LossTerms

__all__ = [
    "vocab_parallel_cross_entropy",
    "vocab_parallel_distillation_loss",
    "vocab_parallel_divergence_loss",
    "vocab_parallel_linear_distillation_loss",
]

Group = dist.ProcessGroup | None


def _logits_loss(*args: Any, **options: Any) -> LossTerms:
    if torch.compiler.is_compiling():
        from distil_fast.parallel import untraced

        return untraced.logits_loss(*args, **options)
    return call.loss(*args, **options)


def _linear_loss(*args: Any, **options: Any) -> LossTerms:
    if torch.compiler.is_compiling():
        from distil_fast.parallel import untraced

        return untraced.linear_loss(*args, **options)
    return linear.loss(*args, **options)


def vocab_parallel_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None = None,
    *,
    group: Group = None,
    temperature: float | Tensor = 2.0,
    soft_weight: float | Tensor = 1.0,
    hard_weight: float | Tensor | None = None,
    soft_mask: Tensor | None = None,
    soft_count: float | Tensor | None = None,
    hard_count: float | Tensor | None = None,
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
    reduction: str = "mean",
    backend: str | None = None,
) -> LossTerms:
    """`distillation_loss` of logits whose columns lie on the ranks of a process group, in the order of the ranks.

    Every rank of the group calls it, with its own columns and the same of everything else; loss and terms are the same
    on every rank. The gradient is that of the loss, at the rank's own columns: there is no factor of the group's size,
    as in Megatron's vocab_parallel_cross_entropy (Shoeybi et al. 2019, section 3). Ranks of the group hold one replica
    together, so DistributedDataParallel must average over replicas, that is over another group; an all-reduced (summed)
    gradient of the hidden states is the affair of the sharded head's backward.

    Two all-reduces (a maximum, a sum) of a few doubles per row serve the cross-entropy and both KL divergences, a third
    the other divergences; backward communicates nothing, and reads the logits again. The host waits for the first one:
    ranks that were called differently, or with an error on one of them, then all raise, and none waits for another.

    Args:
        student_logits, teacher_logits: `[..., V_r]`, this rank's columns, V_r >= 1, of any width, the same of both
            models; dtypes are the same on every rank. teacher_logits None: no soft term.
        labels: `[...]`, ids in the whole vocabulary, 0 <= label < sum of V_r, or `ignore_index`.
        group: a torch.distributed process group; None: the default group.
        class_weights: `[sum of V_r]`, of the whole vocabulary.
        backend: "native" or "reference" (plain torch); None: native on a CPU. Elsewhere, and with a logit scale or a
            softcap, the shards' steps are plain torch in float64.
        the others: as in `distillation_loss`; a vocabulary padded on the last rank is cut before the call.

    Returns:
        LossTerms(loss, soft, hard) as `distillation_loss`.

    Raises:
        ValueError, TypeError: as `distillation_loss`, on the rank whose arguments they are.
        RuntimeError: no process group; another rank raised; arguments that differ between the ranks, named.

    torch.compile breaks its graph at the call, which runs as it is; with fullgraph=True that is torch's error.
    """
    return _logits_loss(
        group,
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        soft_mask=soft_mask,
        soft_count=soft_count,
        hard_count=hard_count,
        ignore_index=ignore_index,
        divergence=divergence,
        t_squared=t_squared,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        z_loss=z_loss,
        student_logit_scale=student_logit_scale,
        student_softcap=student_softcap,
        teacher_logit_scale=teacher_logit_scale,
        teacher_softcap=teacher_softcap,
        reduction=reduction,
        backend=backend,
    )


def vocab_parallel_divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    mask: Tensor | None = None,
    count: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    t_squared: bool = False,
    **options: Any,
) -> Tensor:
    """`divergence_loss` of sharded logits: the soft term of `vocab_parallel_distillation_loss` alone.

    Args:
        student_logits, teacher_logits: `[..., V_r]`, this rank's columns.
        mask, count: `soft_mask` and `soft_count`.
        temperature, t_squared: 1 and no T^2, those of a plain divergence.
        options: group, divergence, student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap,
            reduction, backend, as in `vocab_parallel_distillation_loss`.

    Returns, Raises:
        as `divergence_loss` and `vocab_parallel_distillation_loss`.
    """
    return vocab_parallel_distillation_loss(
        student_logits,
        teacher_logits,
        temperature=temperature,
        soft_mask=mask,
        soft_count=count,
        t_squared=t_squared,
        **options,
    ).loss


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    count: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """`cross_entropy` of sharded logits: the hard term of `vocab_parallel_distillation_loss` alone.

    Args:
        logits: `[..., V_r]`, this rank's columns.
        labels: `[...]`, ids in the whole vocabulary, or `ignore_index`.
        count: `hard_count`.
        logit_scale, softcap: `student_logit_scale` and `student_softcap`.
        options: group, ignore_index, label_smoothing, class_weights, z_loss, reduction, backend, as in
            `vocab_parallel_distillation_loss`.

    Returns, Raises:
        as `cross_entropy` and `vocab_parallel_distillation_loss`.
    """
    return vocab_parallel_distillation_loss(
        logits,
        None,
        labels,
        hard_weight=1.0,
        hard_count=count,
        student_logit_scale=logit_scale,
        student_softcap=softcap,
        **options,
    ).loss


def vocab_parallel_linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    group: Group = None,
    temperature: float | Tensor = 2.0,
    soft_weight: float | Tensor = 1.0,
    hard_weight: float | Tensor | None = None,
    soft_mask: Tensor | None = None,
    soft_count: float | Tensor | None = None,
    hard_count: float | Tensor | None = None,
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
    reduction: str = "mean",
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> LossTerms:
    """`vocab_parallel_distillation_loss` of logits = hidden weight^T + bias, whose heads are sharded along V.

    Every rank passes the same hidden states and its own rows of the heads. Rows go through in chunks: logits in
    float32 (float64 for float64), statistics summed over the ranks, the gradient in the place of the student's logits,
    the matmuls of its backward; no rank holds more logits than a chunk's. Rows that no term uses are left out. The
    gradient of the hidden states is summed over the ranks (one all-reduce at the end, of float32 [used rows, H]) and is
    the whole one on each; that of weight and bias is the rank's own. Weights in 16 bits are widened by tiles, never as
    a whole. Gradients are kept in float32 until backward applies grad_output, so that an fp16 loss scale comes first.

    Args:
        student_hidden: `[..., H]`; teacher_hidden: `[..., H_t]` of the same leading shape, without gradient, or None.
        student_weight: `[V_r, H]`, this rank's rows of the head, V_r >= 1; teacher_weight: `[V_r, H_t]` or None.
        student_bias, teacher_bias: `[V_r]`, or None.
        labels, group and the others: as in `vocab_parallel_distillation_loss`.
        chunk_bytes: for one chunk's logits of both models, on the rank with the most columns. None: 64 MiB on a CPU,
            1 GiB elsewhere. The fewer chunks, the fewer all-reduces (two or three each, and one beforehand).

    Returns:
        LossTerms as `distillation_loss`. With reduction "none" backward makes the logits anew, and all-reduces the
        gradient of the hidden states then: every rank must call backward.

    Raises:
        ValueError, TypeError, NotImplementedError: as `vocab_parallel_distillation_loss`; on every rank, also where one
            fails inside a chunk.
    """
    no_teacher = teacher_hidden is None and teacher_weight is None
    return _linear_loss(
        group,
        (student_hidden, student_weight, student_bias),
        None if no_teacher else (teacher_hidden, teacher_weight, teacher_bias),
        labels,
        temperature=temperature,
        soft_weight=soft_weight,
        hard_weight=hard_weight,
        soft_mask=soft_mask,
        soft_count=soft_count,
        hard_count=hard_count,
        ignore_index=ignore_index,
        divergence=divergence,
        t_squared=t_squared,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        z_loss=z_loss,
        student_logit_scale=student_logit_scale,
        student_softcap=student_softcap,
        teacher_logit_scale=teacher_logit_scale,
        teacher_softcap=teacher_softcap,
        reduction=reduction,
        chunk_bytes=chunk_bytes,
        backend=backend,
    )
