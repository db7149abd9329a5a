"""Losses from hidden states and heads: the logits of a whole batch are never in memory, of student or teacher.

The public functions: check the arguments, then one call of the op. Options and conventions are those of functional.py.
It knows neither chunks nor autograd. Next: linear_ops.py; chunks.py, the loop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distil_fast import backends, checks, reference, reference_topk
from distil_fast.linear_ops import chunked
from distil_fast.options import (
    check_teacher_rows,
    hard_term_alone,
    row_options,
    rows_of,
    soft_term_alone,
    without_teacher_logits,
)
from distil_fast.reference import Divergence, LossTerms, as_divergence
from distil_fast.teachers import Hidden, Teacher, TopK

PRECISIONS = EXACT, FAST = "exact", "fast"


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Teacher | None,
    teacher_weight: Tensor | None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
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
    precision: str = "exact",
    chunk_bytes: int | None = None,
    gather: bool = True,
    backend: str | None = None,
) -> LossTerms:
    """`distillation_loss` of logits that are never whole in memory: hidden states times heads, chunk by chunk.

        s = student_hidden student_weight^T + student_bias          t = teacher_hidden teacher_weight^T + teacher_bias

    Rows that no term uses are left out before the products: with 15 % of the tokens masked, and `soft_mask` equal to
    them, the heads do 15 % of the work. Gradients of the student's hidden states, weights and bias are made in the
    forward, summed in float32; what needs no gradient costs none. Backward hands them over.

    On a GPU leaving rows out costs one synchronisation, to learn how many are left. A call with a teacher and without
    `soft_mask`, where every row counts, has none: who knows the rows that count passes them alone, `hidden[rows]` of
    both models and `labels[rows]`, of which some may still be `ignore_index`. With `gather=False` there is none either:
    for rows nearly all of which count, but not surely all.

    Args:
        student_hidden: `[..., H]`, float32, float16, bfloat16 or float64. Under autocast it is cast as a linear layer
            would; the products are made in its dtype.
        student_weight: `[V, H]` of any floating dtype, which its gradient has too; cast to the hidden states'. A
            parameter may be tied to other uses: autograd adds up.
        teacher_hidden: `[..., H_t]`, the same leading shape, a width and a dtype of its own; without gradient. Or, with
            `teacher_weight` None, a teacher that brings its rows: logits `[..., V]`, `LogProbs`, `Probs` or `TopK`.
            None: no soft term.
        teacher_weight: `[V, H_t]`, a constant here, whether it requires grad or not.
        student_bias, teacher_bias: `[V]`, or None.
        precision: "exact": logits are float32, so that a half precision's rounding does not become the gradient as the
            models meet (rounded to bfloat16 it is wrong by 4 to 23 %). "fast": logits are kept in the hidden states'
            dtype (float16 on a CPU excepted).
        chunk_bytes: memory for both models' logits of a chunk. None: 32 MiB, and 128 rows at least, on a
            CPU; 1024 rows on a GPU.
        gather: leave out the rows that no term uses. False: they take part in the products with weight 0, and must be
            finite; nothing waits for a GPU.

        the others: those of `distillation_loss`; there is no `inplace`. With reduction "none" backward makes the
            chunks again.

    Returns:
        LossTerms(loss, soft, hard), as `distillation_loss`.

    Raises:
        ValueError, TypeError, NotImplementedError: as `distillation_loss`; shapes of a head that do not fit; a DTensor.
    """
    return _linear_loss(
        "linear_distillation_loss",
        (student_hidden, student_weight, student_bias),
        (teacher_hidden, teacher_weight, teacher_bias),
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
        precision,
        chunk_bytes,
        gather,
        backend,
    )


def linear_divergence_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | Teacher,
    teacher_weight: Tensor | None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
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
    precision: str = "exact",
    chunk_bytes: int | None = None,
    gather: bool = True,
    backend: str | None = None,
) -> Tensor:
    """`divergence_loss` of logits that are never whole in memory; arguments as in `linear_distillation_loss`.

    Returns:
        float32 (float64 for float64 hidden states), 0-d or `[...]` with reduction "none".

    Raises:
        ValueError, TypeError, NotImplementedError: as `linear_distillation_loss`.
    """
    checks.check_values("student_hidden", student_hidden)
    options = soft_term_alone(
        student_hidden,
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
    if teacher_hidden is None:
        raise TypeError("teacher_hidden: expected a tensor or another form of teacher, got None.")
    student, teacher = (student_hidden, student_weight, student_bias), (teacher_hidden, teacher_weight, teacher_bias)
    how = precision, chunk_bytes, gather, backend
    return _linear_loss("linear_divergence_loss", student, teacher, None, options, *how).loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    count: float | Tensor | None = None,
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
) -> Tensor:
    """`cross_entropy` of logits that are never whole in memory; arguments as in `linear_distillation_loss`.

    Returns:
        float32 (float64 for float64 hidden states), 0-d or `[...]` with reduction "none".

    Raises:
        ValueError, TypeError, NotImplementedError: as `linear_distillation_loss`.
    """
    checks.check_values("hidden", hidden)
    options = hard_term_alone(
        hidden,
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
    student, how = (hidden, weight, bias), (precision, chunk_bytes, gather, backend)
    return _linear_loss("linear_cross_entropy", student, (None, None, None), labels, options, *how).loss


def hidden_teacher_loss(
    student_logits: Tensor, teacher: Hidden, labels: Tensor | None, backend: str | None, options: dict[str, Any]
) -> LossTerms:
    """`distillation_loss` of logits, beside a teacher whose logits are made in chunks; the logits are checked."""
    checks.check_teacher_head(teacher.hidden, teacher.weight, teacher.bias, student_logits)
    checks.check_widths(student_logits.shape[-1], teacher.weight.shape[0], options["vocab_size"])
    chosen = backends.for_call(student_logits, "distillation_loss", backend)
    if chosen == "reference":
        logits = reference.head_logits(teacher.hidden, teacher.weight, teacher.bias)
        return reference.distillation_loss(student_logits, logits, labels, **options)
    head = teacher.weight, teacher.bias
    return _call(student_logits, (None, None), teacher, head, labels, options, True, 0, True, chosen)


# ------------------------------------------------------------------------------------------------ the call


def _linear_loss(
    name: str,
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor | Teacher | None, Tensor | None, Tensor | None],
    labels: Tensor | None,
    options: dict[str, Any],
    precision: str,
    chunk_bytes: int | None,
    gather: bool,
    backend: str | None,
) -> LossTerms:
    """Any of the losses above; `options` are distillation_loss's, every one of them."""
    hidden, weight, bias = student
    checks.check_head("hidden" if name == "linear_cross_entropy" else "student_hidden", hidden, weight, bias)
    given, teacher_weight, teacher_bias = teacher
    checks.check_some_term(given, labels, "teacher_hidden")
    if isinstance(given, Hidden):
        raise TypeError("teacher_hidden: expected a tensor beside teacher_weight, got Hidden. Pass its parts.")
    if isinstance(given, Tensor) and teacher_weight is not None:
        checks.check_teacher_head(given, teacher_weight, teacher_bias, hidden)
        checks.check_widths(weight.shape[0], teacher_weight.shape[0], options["vocab_size"])
    else:
        checks.check_no_head(given, teacher_weight, teacher_bias)
        logits = hidden.detach().new_empty(()).expand(*hidden.shape[:-1], weight.shape[0])  # nothing but their shape
        check_teacher_rows(given, logits, options["vocab_size"])
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}.")
    size = checks.check_chunk_bytes(chunk_bytes)
    if not isinstance(gather, bool):
        raise TypeError(f"gather: expected True or False, got {type(gather).__name__}.")
    hidden = in_autocast(hidden)
    chosen = backends.for_call(hidden, name, backend)
    if chosen == "reference":
        return _by_reference(hidden, weight, bias, teacher, labels, options)
    if isinstance(given, Tensor) and teacher_weight is not None:
        given = in_autocast(given)
    heads = (weight, bias), given, (teacher_weight, teacher_bias)
    return _call(hidden, *heads, labels, options, precision == EXACT, size, gather, chosen)


def _by_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: tuple[Tensor | Teacher | None, Tensor | None, Tensor | None],
    labels: Tensor | None,
    options: dict[str, Any],
) -> LossTerms:
    """The same in plain torch, with the whole logits."""
    logits = reference.head_logits(hidden, weight, bias)
    given, teacher_weight, teacher_bias = teacher
    if isinstance(given, TopK):
        options = without_teacher_logits(options)
        return reference_topk.topk_loss(logits, given.ids, given.log_probs, labels, tail=given.tail, **options)
    values, _, form = rows_of(given)
    if isinstance(given, Tensor) and teacher_weight is not None:
        values = reference.head_logits(given, teacher_weight, teacher_bias)
    return reference.distillation_loss(logits, values, labels, teacher_form=form, **options)


def in_autocast(hidden: Tensor) -> Tensor:
    """Hidden states as autocast would have them in a matrix product; heads follow their dtype."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return hidden.to(torch.get_autocast_dtype(kind))
    return hidden


def _flat(tensor: Any) -> Any:
    """Leading dimensions as one; scalars as they are."""
    return tensor.flatten() if isinstance(tensor, Tensor) and tensor.dim() else tensor


def _call(
    student: Tensor,
    head: tuple[Tensor | None, Tensor | None],
    teacher: Tensor | Teacher | None,
    teacher_head: tuple[Tensor | None, Tensor | None],
    labels: Tensor | None,
    options: dict[str, Any],
    wide: bool,
    chunk_bytes: int,
    gather: bool,
    backend: str,
) -> LossTerms:
    """A loss of checked tensors by a backend with kernels; `student` are logits where it has no head."""
    values, ids, form = rows_of(teacher)
    cols = student.shape[-1] if head[0] is None else head[0].shape[0]
    (temperature, *scalars), settings = row_options(student, cols, labels, teacher_form=form, **options)
    if v := settings.vocab_size:
        head, teacher_head = _first(v, *head), _first(v, *teacher_head)
        student = student if head[0] is not None else student[..., :v]
        values = values if teacher_head[0] is not None or ids is not None or values is None else values[..., :v]
    loss, soft, hard = chunked(
        student.reshape(-1, student.shape[-1]),
        *head,
        (_constant(values), _constant(teacher_head[0]), _constant(teacher_head[1]), _constant(ids)),
        (_flat(labels), _flat(options["soft_mask"]), options["class_weights"]),
        (_flat(temperature), *scalars),
        settings._replace(backend=backend, vocab_size=0),
        (
            teacher.tail if isinstance(teacher, TopK) else "",
            as_divergence(options["divergence"]).shift,
            wide,
            chunk_bytes,
            gather,
        ),
    )
    shape = student.shape[:-1] if settings.reduction == "none" else ()
    return LossTerms(loss.view(shape), soft.view(shape), hard.view(shape))


def _first(rows: int, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The head of the first so many columns of the logits."""
    return None if weight is None else weight[:rows], None if bias is None else bias[:rows]


def _constant(values: Tensor | None) -> Tensor | None:
    """Without gradient, and with leading dimensions as one."""
    if values is None or values.dim() < 3:
        return None if values is None else values.detach()
    return values.detach().reshape(-1, values.shape[-1])
