"""The options that every row loss shares, checked and put in the form that ops take: five scalars, and the settings.

It knows neither logits nor hidden states: `values` is whichever tensor has one row for each label and mask entry. Next:
functional.py and linear.py, which call it; backends/settings.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from distil_fast import checks
from distil_fast.backends.settings import LOG_PROBS, LOGITS, PROBS, TAILS, RowSettings
from distil_fast.reference import Divergence, as_divergence
from distil_fast.teachers import Hidden, LogProbs, Probs, Teacher, TopK

Scalar = float | Tensor


class RowOptions(NamedTuple):
    """temperature, soft_weight, hard_weight, soft_count and hard_count (-1: counted); and the rest."""

    scalars: tuple[Scalar, Scalar, Scalar, Scalar, Scalar]
    settings: RowSettings


def _transform(model: str, scale: float, softcap: float | None) -> tuple[float, float]:
    cap = 0.0 if softcap is None else checks.check_positive(f"{model}_softcap", softcap)
    return checks.check_positive(f"{model}_logit_scale", scale), cap


def row_options(
    values: Tensor,
    cols: int,
    labels: Tensor | None,
    *,
    temperature: Scalar,
    soft_weight: Scalar,
    hard_weight: Scalar | None,
    soft_mask: Tensor | None,
    soft_count: Scalar | None,
    hard_count: Scalar | None,
    ignore_index: int,
    divergence: str | Divergence,
    t_squared: bool,
    label_smoothing: float,
    class_weights: Tensor | None,
    z_loss: float,
    student_logit_scale: float,
    student_softcap: float | None,
    teacher_logit_scale: float,
    teacher_softcap: float | None,
    vocab_size: int | None,
    reduction: str,
    teacher_form: str = LOGITS,
    backend: str = "",
) -> RowOptions:
    """Options of rows with `cols` columns, checked; `backend` is the one chosen, if it is known.

    Raises:
        ValueError, TypeError: expected, got, remedy.
    """
    checks.check_reduction(reduction, soft_count=soft_count, hard_count=hard_count)
    if labels is not None:
        checks.check_labels(labels, values)
    elif hard_weight is not None or hard_count is not None or class_weights is not None or z_loss:
        raise ValueError(
            "hard_weight, hard_count, class_weights and z_loss belong to the hard term, got one of them without "
            "labels. Pass labels."
        )
    checks.check_mask("soft_mask", soft_mask, values)
    label_smoothing = checks.check_label_smoothing(label_smoothing)
    checks.check_class_weights(class_weights, values, vocab_size or cols, label_smoothing)
    if hard_weight is None:
        hard_weight = 0.0 if labels is None else 1.0
    else:
        hard_weight = checks.check_quantity("hard_weight", hard_weight, values)
    divergence = as_divergence(divergence)
    student = teacher = (1.0, 0.0)
    if student_softcap is not None or student_logit_scale != 1.0:
        student = _transform("student", student_logit_scale, student_softcap)
    if teacher_softcap is not None or teacher_logit_scale != 1.0:
        teacher = _transform("teacher", teacher_logit_scale, teacher_softcap)
        if teacher_form != LOGITS:
            raise ValueError(
                f"teacher_logit_scale and teacher_softcap: expected a teacher given by its logits, got {teacher_form}. "
                "Leave them out: probabilities come after them."
            )
    scalars = (
        checks.check_temperature(temperature, values),
        checks.check_quantity("soft_weight", soft_weight, values),
        hard_weight,
        -1.0 if soft_count is None else checks.check_quantity("soft_count", soft_count, values),
        -1.0 if hard_count is None else checks.check_quantity("hard_count", hard_count, values),
    )
    settings = RowSettings(
        checks.check_ignore_index(ignore_index),
        divergence.name,
        divergence.parameters,
        t_squared,
        label_smoothing,
        checks.check_z_loss(z_loss),
        teacher_form,
        (*student, *teacher),
        checks.check_vocab_size(vocab_size, cols),
        reduction,
        backend,
    )
    return RowOptions(scalars, settings)


def rows_of(teacher: Tensor | Teacher | None) -> tuple[Tensor | None, Tensor | None, str]:
    """What a teacher brings for each row: values, the ids of a top-k one, and the form of the values."""
    if isinstance(teacher, LogProbs):
        return teacher.log_probs, None, LOG_PROBS
    if isinstance(teacher, Probs):
        return teacher.probs, None, PROBS
    if isinstance(teacher, TopK):
        return teacher.log_probs, teacher.ids, LOG_PROBS
    if isinstance(teacher, Hidden):
        return teacher.hidden, None, LOGITS
    return teacher, None, LOGITS


def check_teacher_rows(teacher: Tensor | Teacher | None, student_logits: Tensor, vocab_size: int | None) -> None:
    """A teacher that brings a tensor for each row of logits, or none.

    Raises:
        ValueError, TypeError: expected, got, remedy.
    """
    if isinstance(teacher, TopK):
        checks.check_topk(teacher.ids, teacher.log_probs, teacher.tail, TAILS, student_logits)
    elif teacher is not None:
        checks.check_pair("logits", student_logits, rows_of(teacher)[0], vocab_size)


def soft_term_alone(
    values: Tensor, mask: Tensor | None, count: Scalar | None, reduction: str, **options: Any
) -> dict[str, Any]:
    """The options of a loss that is the soft term alone, and calls its mask and count so.

    Raises:
        ValueError, TypeError: expected, got, remedy.
    """
    _check_alone(values, count, reduction)
    checks.check_mask("mask", mask, values)
    return {
        "soft_weight": 1.0,
        "soft_mask": mask,
        "soft_count": count,
        "reduction": reduction,
        **options,
        "hard_weight": None,
        "hard_count": None,
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "class_weights": None,
        "z_loss": 0.0,
    }


def hard_term_alone(
    values: Tensor, labels: Tensor, count: Scalar | None, reduction: str, **options: Any
) -> dict[str, Any]:
    """The options of a loss that is the hard term alone, and calls its count so.

    Raises:
        ValueError, TypeError: expected, got, remedy.
    """
    checks.check_labels(labels, values)
    _check_alone(values, count, reduction)
    return {
        "hard_weight": 1.0,
        "hard_count": count,
        "reduction": reduction,
        **options,
        "temperature": 1.0,
        "soft_weight": 0.0,
        "soft_mask": None,
        "soft_count": None,
        "divergence": "forward_kl",
        "t_squared": True,
        "teacher_logit_scale": 1.0,
        "teacher_softcap": None,
    }


def _check_alone(values: Tensor, count: Scalar | None, reduction: str) -> None:
    checks.check_reduction(reduction, count=count)
    if count is not None:
        checks.check_quantity("count", count, values)


def without_teacher_logits(options: dict[str, Any]) -> dict[str, Any]:
    """The options that a teacher without logits leaves."""
    return {name: value for name, value in options.items() if not name.startswith("teacher_")}
