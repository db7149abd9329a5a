"""The public functions: check the arguments, then call one op. Shapes, conventions and errors are documented here.

It knows nothing of kernels or autograd. Next: ops.py; docs/math.md for the formulae and the home of each convention.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distil_fast import backends, checks, ops, pairs, reference, reference_topk
from distil_fast.backends.settings import RowSettings
from distil_fast.linear import hidden_teacher_loss
from distil_fast.options import (
    check_teacher_rows,
    hard_term_alone,
    row_options,
    rows_of,
    soft_term_alone,
    without_teacher_logits,
)
from distil_fast.reference import Divergence, LossTerms, TripleTerms, as_divergence
from distil_fast.teachers import Hidden, Teacher, TopK


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Teacher | None,
    labels: Tensor | None = None,
    *,
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
    vocab_size: int | None = None,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
) -> LossTerms:
    """Distillation loss; of its terms only `loss` has a gradient, balance them with `soft_weight` and `hard_weight`.

    With teacher p = softmax(t / T) and student q = softmax(s / T) of each row (Hinton et al. 2015, section 2):

        soft = sum_r mask_r T_r^2 D(p_r, q_r) / sum_r mask_r          D: the divergence, KL(p || q) by default
        hard = sum_r -log softmax(s_r)[label_r] / (number of labels)   over rows whose label is not ignore_index
        loss = soft_weight * soft + hard_weight * hard

    Both terms and the gradient come from one pass that reads each logit once. For next-token models shift the labels
    and the mask, never the logits: `labels = F.pad(labels[:, 1:], (0, 1), value=-100)`.

    Args:
        student_logits: `[..., V]`, float32, float16, bfloat16 or float64. Rows are contiguous; up to two leading
            dimensions have free strides, so that `logits[:, :-1]`, chunks and padded rows are taken without a copy.
        teacher_logits: `[..., V]`, likewise, of a dtype of its own (float64 only beside float64); without gradient. Or
            another form of teacher: `LogProbs`, `Probs`, `TopK` or `Hidden`. None: no soft term.
        labels: `[...]` integers in [0, V), or `ignore_index`. None: no hard term.
        temperature: T > 0 (1e-15 to 1e15), a number or one per row `[...]`. The hard term is at T = 1.
        soft_weight, hard_weight: a number or a 0-d tensor. `hard_weight` None: 1 with labels, 0 without. A term of
            weight 0 is not computed and reads nothing. Under torch.compile a number is a constant of the graph: what
            changes from step to step, a temperature or a count too, is better a tensor.
        soft_mask: `[...]`, bool, or non-negative float token weights. None: every row counts 1.
        soft_count, hard_count: replace the denominators, a number or a 0-d tensor, with reduction "mean" only. For
            gradient accumulation: the count of the whole step. Under DistributedDataParallel, which averages the ranks'
            gradients: the global count divided by the world size.
        ignore_index: the label of rows without one.
        divergence: "forward_kl" KL(p || q), "reverse_kl" KL(q || p), "jsd", "total_variation", "skewed_kl",
            "skewed_reverse_kl", "alpha_beta", "hellinger", "soft_cross_entropy", or an object with parameters such as
            `JSD(beta=0.1)`.
        t_squared: multiply the soft term by T^2, which keeps its gradient's scale as T changes.
        label_smoothing: in [0, 1]; mixes the hard target with the uniform distribution.
        class_weights: `[V]` >= 0; a row's hard term, and its part in the denominator, is weighed by its label's, as in
            `torch.nn.functional.cross_entropy`. Not together with label smoothing.
        z_loss: adds z_loss logsumexp(s_r)^2 to each row of the hard term (Chowdhery et al. 2022, section 5).
        student_logit_scale, teacher_logit_scale, student_softcap, teacher_softcap: logits are scaled, x -> scale x, and
            capped, x -> cap tanh(x / cap) (Gemma Team 2024, section 2), before T and in both terms; the gradient is
            that of `student_logits` as given. -inf stays -inf.
        vocab_size: only the first so many columns take part, of both models, whose widths may then differ; both are
            normalised over them, and the gradient of the rest is 0. For vocabularies padded to different widths.
        reduction: "mean"; "sum"; or "none", the per-row loss of the leading shape.
        inplace: write the gradient over `student_logits`, which DESTROYS the logits; saves the gradient's memory. A
            no-op where no gradient is needed, and under torch.compile; an error with reduction "none". A leaf's `.grad`
            then shares its memory.
        backend: "native", "cuda", "triton" or "reference" (plain torch); None: the one that
            `distil_fast.backends.serving` names.

    Returns:
        LossTerms(loss, soft, hard), float32 (float64 for float64 logits), 0-d or `[...]`. A term without a valid row,
        or with a count of 0, is 0 with zero gradient. Rows that no term uses are never read, whatever they hold.

    Raises:
        ValueError: shapes, devices, layouts or values that are not as above; a teacher, mask, weight, count or
            temperature that requires grad.
        TypeError: dtypes or types that are not as above.
        NotImplementedError: inside a torch.func transform.
    """
    return _row_loss(
        "distillation_loss",
        student_logits,
        teacher_logits,
        labels,
        {
            "temperature": temperature,
            "soft_weight": soft_weight,
            "hard_weight": hard_weight,
            "soft_mask": soft_mask,
            "soft_count": soft_count,
            "hard_count": hard_count,
            "ignore_index": ignore_index,
            "divergence": divergence,
            "t_squared": t_squared,
            "label_smoothing": label_smoothing,
            "class_weights": class_weights,
            "z_loss": z_loss,
            "student_logit_scale": student_logit_scale,
            "student_softcap": student_softcap,
            "teacher_logit_scale": teacher_logit_scale,
            "teacher_softcap": teacher_softcap,
            "vocab_size": vocab_size,
            "reduction": reduction,
        },
        inplace,
        backend,
    )


def _row_loss(
    name: str,
    student_logits: Tensor,
    teacher_logits: Tensor | Teacher | None,
    labels: Tensor | None,
    options: dict[str, Any],
    inplace: bool,
    backend: str | None,
) -> LossTerms:
    """Any loss over rows of logits; `options` are distillation_loss's, every one of them."""
    checks.check_values("logits" if name == "cross_entropy" else "student_logits", student_logits)
    checks.check_some_term(teacher_logits, labels, "teacher_logits")
    if isinstance(teacher_logits, Hidden):
        if inplace:
            raise ValueError("inplace: expected a teacher that brings its rows, got Hidden. Use inplace=False.")
        return hidden_teacher_loss(student_logits, teacher_logits, labels, backend, options)
    check_teacher_rows(teacher_logits, student_logits, options["vocab_size"])
    teacher, ids, form = rows_of(teacher_logits)
    chosen = backends.for_call(student_logits, name, backend, "" if ids is None else "reference_topk.topk_loss")
    cols = student_logits.shape[-1]
    scalars, settings = row_options(student_logits, cols, labels, teacher_form=form, backend=chosen, **options)
    if inplace and settings.reduction == "none":
        raise ValueError("inplace: expected reduction 'mean' or 'sum', got 'none', whose backward needs the logits.")
    vectors = labels, options["soft_mask"], options["class_weights"]
    if isinstance(teacher_logits, TopK):
        return _topk_loss(student_logits, teacher_logits, vectors, scalars, settings, inplace, options)
    if chosen == "reference":
        return reference.distillation_loss(student_logits, teacher, labels, teacher_form=form, **options)
    return LossTerms(*ops.row_loss(student_logits, teacher, *vectors, scalars, settings, inplace))


def _topk_loss(
    student_logits: Tensor,
    teacher: TopK,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None],
    scalars: tuple[float | Tensor, ...],
    settings: RowSettings,
    inplace: bool,
    options: dict[str, Any],
) -> LossTerms:
    """`_row_loss` with a teacher of k columns a row; everything is checked."""
    ids, log_probs, tail = teacher.ids, teacher.log_probs, teacher.tail
    if settings.backend == "reference":
        options = without_teacher_logits(options)
        return reference_topk.topk_loss(student_logits, ids, log_probs, vectors[0], tail=tail, **options)
    shift = as_divergence(options["divergence"]).shift
    return LossTerms(*ops.topk_loss(student_logits, ids, log_probs, *vectors, scalars, settings, shift, tail, inplace))


def divergence_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Teacher,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    count: float | Tensor | None = None,
    t_squared: bool = False,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The soft term of `distillation_loss` alone: sum_r mask_r D(p_r, q_r) / sum_r mask_r.

    The arguments are those of `distillation_loss`, with `mask` and `count` for `soft_mask` and `soft_count`; note the
    defaults T = 1 and no T^2, those of a plain divergence.

    Returns:
        float32 (float64 for float64 logits), 0-d or `[...]` with reduction "none".

    Raises:
        ValueError, TypeError, NotImplementedError: as `distillation_loss`.
    """
    checks.check_values("student_logits", student_logits)
    options = soft_term_alone(
        student_logits,
        mask,
        count,
        reduction,
        divergence=divergence,
        temperature=temperature,
        t_squared=t_squared,
        student_logit_scale=student_logit_scale,
        student_softcap=student_softcap,
        teacher_logit_scale=teacher_logit_scale,
        teacher_softcap=teacher_softcap,
        vocab_size=vocab_size,
    )
    if teacher_logits is None:
        raise TypeError("teacher_logits: expected a tensor or another form of teacher, got None.")
    return _row_loss("divergence_loss", student_logits, teacher_logits, None, options, False, backend).loss


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    count: float | Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The hard term of `distillation_loss` alone: sum_r -log softmax(logits_r)[label_r] / (number of labels).

    Equals `torch.nn.functional.cross_entropy` of `[rows, V]` logits, but for a batch without any label, where this is 0
    and not nan. The arguments are those of `distillation_loss`, with `count` for `hard_count`.

    Returns:
        float32 (float64 for float64 logits), 0-d or `[...]` with reduction "none".

    Raises:
        ValueError, TypeError, NotImplementedError: as `distillation_loss`.
    """
    checks.check_values("logits", logits)
    options = hard_term_alone(
        logits,
        labels,
        count,
        reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        z_loss=z_loss,
        student_logit_scale=logit_scale,
        student_softcap=softcap,
        vocab_size=vocab_size,
    )
    return _row_loss("cross_entropy", logits, None, labels, options, False, backend).loss


def softmax(logits: Tensor, temperature: float | Tensor = 1.0, *, backend: str | None = None) -> Tensor:
    """softmax(logits / temperature) over the last dimension, in the logits' dtype, summed in float32.

    Args:
        logits: `[..., V]`, as in `distillation_loss`.
        temperature: T > 0, a number or one per row `[...]`; without gradient.
        backend: as in `distillation_loss`.

    Raises:
        ValueError, TypeError, NotImplementedError: as `distillation_loss`.
    """
    return _softmax("softmax", logits, temperature, backend)


def log_softmax(logits: Tensor, temperature: float | Tensor = 1.0, *, backend: str | None = None) -> Tensor:
    """log softmax(logits / temperature) over the last dimension; the arguments and errors of `softmax`."""
    return _softmax("log_softmax", logits, temperature, backend)


def _softmax(name: str, logits: Tensor, temperature: float | Tensor, backend: str | None) -> Tensor:
    checks.check_values("logits", logits)
    temperature = checks.check_temperature(temperature, logits)
    chosen = backends.for_call(logits, name, backend)
    if chosen == "reference":
        return getattr(reference, name)(logits, temperature)
    return ops.softmax(logits, temperature, name == "log_softmax", chosen)


def cosine_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    mask: Tensor | None = None,
    count: float | Tensor | None = None,
    reduction: str = "mean",
    *,
    backend: str | None = None,
) -> Tensor:
    """1 - cos(student, teacher) of hidden states, averaged over the masked tokens (Sanh et al. 2019, section 3).

        loss = sum_r mask_r (1 - s.t / sqrt((s.s + 1e-12) (t.t + 1e-12))) / sum_r mask_r

    The value is `torch.nn.CosineEmbeddingLoss`'s at target 1; forward and gradient are one pass. Computed as half the
    squared distance of the unit vectors, so that nothing is lost as they meet.

    Args:
        student_hidden, teacher_hidden: `[..., H]`, layouts and dtypes as the logits of `distillation_loss`.
        mask: `[...]`, bool, or non-negative float token weights. None: every row counts 1.
        count: replaces the denominator, with reduction "mean" only.
        reduction: "mean", "sum" or "none".
        backend: as in `distillation_loss`.

    Returns:
        float32 (float64 for float64 input), 0-d or `[...]`. Without a valid row: 0, with zero gradient.

    Raises:
        ValueError, TypeError, NotImplementedError: as `distillation_loss`.
    """
    return pairs.compare(
        "cosine_loss", "cosine", "hidden", student_hidden, teacher_hidden, mask, count, reduction, backend
    )[0]


def triple_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    attention_mask: Tensor,
    *,
    temperature: float | Tensor = 2.0,
    alpha_ce: float | Tensor = 5.0,
    alpha_mlm: float | Tensor = 2.0,
    alpha_cos: float | Tensor = 1.0,
    ce_count: float | Tensor | None = None,
    mlm_count: float | Tensor | None = None,
    cos_count: float | Tensor | None = None,
    restrict_ce_to_mask: bool = False,
    backend: str | None = None,
) -> TripleTerms:
    """DistilBERT's loss; of its terms only `loss` has a gradient, balance them with the alphas.

    With A the tokens under the attention mask and M those with a label (Sanh et al. 2019, section 3, as the authors'
    training code computes it):

        ce   = T^2 / |A| sum_A KL(softmax(t / T) || softmax(s / T))    (over M with `restrict_ce_to_mask`)
        mlm  = 1 / |M| sum_M -log softmax(s)[label]
        cos  = 1 / |A| sum_A (1 - cos(student_hidden, teacher_hidden))
        loss = alpha_ce ce + alpha_mlm mlm + alpha_cos cos

    Args:
        student_logits, teacher_logits: `[..., V]`, as in `distillation_loss`.
        labels: `[...]`, -100 where a token is not masked.
        student_hidden, teacher_hidden: `[..., H]`, the last hidden states.
        attention_mask: `[...]`, bool or integers, 0 for padding.
        temperature: T > 0, a number or one per row; 2.0.
        alpha_ce, alpha_mlm, alpha_cos: the terms' weights, numbers or 0-d tensors; 5, 2 and 1.
        ce_count, mlm_count, cos_count: replace |A| (or |M|), |M| and |A|; see `soft_count` of `distillation_loss`.
        restrict_ce_to_mask: ce over the masked tokens only.
        backend: as in `distillation_loss`.

    Returns:
        TripleTerms(loss, ce, mlm, cos), float32 (float64 for float64 input), 0-d.

    Raises:
        ValueError, TypeError, NotImplementedError: as `distillation_loss`.
    """
    checks.check_values("student_logits", student_logits)
    checks.check_labels(labels, student_logits)
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor, got {type(attention_mask).__name__}.")
    attention = attention_mask.bool()
    pair = student_hidden, teacher_hidden, attention, cos_count
    cos_loss, cos = pairs.compare("cosine_loss", "cosine", "hidden", *pair, "mean", backend, weight=alpha_cos)
    terms = distillation_loss(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        soft_weight=alpha_ce,
        hard_weight=alpha_mlm,
        soft_mask=labels != -100 if restrict_ce_to_mask else attention,
        soft_count=ce_count,
        hard_count=mlm_count,
        backend=backend,
    )
    return TripleTerms(terms.loss + cos_loss, terms.soft, terms.hard, cos)
