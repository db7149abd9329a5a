"""Calls of the kernels under test, in two ways: as a user does, and by a backend, where the fp16 unit is visible.

Knows arguments and defaults, and where the kernels run: with DISTIL_FAST_TEST_DEVICE=cuda the same tests measure a GPU,
tensors moved there as they lie in memory. What is right is oracle.py's affair. Next: oracle.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import distil_fast
from distil_fast import LossTerms, backends, reference
from distil_fast.backends.settings import RowSettings
from tests import oracle

# What a user passes for a tensor of each form.
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "logits": lambda teacher: teacher,
    "log_probs": distil_fast.LogProbs,
    "probs": distil_fast.Probs,
}
DEVICE = torch.device(os.environ.get("DISTIL_FAST_TEST_DEVICE", "cpu"))


def there(value: Any) -> Any:
    """A tensor on the device of the kernels, with its strides and its place in its storage; anything else as it is."""
    if not isinstance(value, Tensor) or DEVICE.type == "cpu":
        return value
    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())  # type: ignore[call-overload]
    return whole.to(DEVICE).as_strided(value.shape, value.stride(), value.storage_offset())


@dataclass(frozen=True)
class Result:
    """Loss and terms, and the student's gradient in units of `unit`."""

    values: dict[str, Tensor]
    grad: Tensor
    unit: float = 1.0

    def check(self, truth: oracle.Truth, where: str) -> None:
        oracle.check_values(self.values, truth, where)
        oracle.check_gradient(self.grad, truth, where, self.unit)


def _skip_float64(student: Tensor) -> None:
    if DEVICE.type != "cpu" and student.dtype == torch.float64:
        pytest.skip("on a GPU the reference serves float64, and it is the oracle")


def by_autograd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    upstream: Tensor | None = None,
    **settings: Any,
) -> Result:
    """distillation_loss and its backward; the gradient is final. `teacher_form` among the settings: see FORMS."""
    _skip_float64(student)
    student = there(student.detach()).requires_grad_()
    settings = {name: there(value) for name, value in settings.items()}
    given = FORMS[settings.pop("teacher_form", "logits")](there(teacher))
    terms = distil_fast.distillation_loss(student, given, there(labels), **settings)
    (grad,) = torch.autograd.grad(terms.loss, student, there(upstream))
    return Result(_values(terms), grad.cpu())


def after_labels(labels: Tensor | None, settings: dict[str, Any]) -> tuple[Any, ...]:
    """A backend's arguments behind the labels, from distillation_loss's names and defaults."""
    divergence = reference.as_divergence(settings.get("divergence", "forward_kl"))
    hard_weight = settings.get("hard_weight")
    scale = [settings.get(f"{model}_logit_scale", 1.0) for model in ("student", "teacher")]
    cap = [settings.get(f"{model}_softcap") or 0.0 for model in ("student", "teacher")]
    return (
        settings.get("soft_mask"),
        settings.get("class_weights"),
        settings.get("temperature", 2.0),
        settings.get("soft_weight", 1.0),
        (0.0 if labels is None else 1.0) if hard_weight is None else hard_weight,
        -1.0 if settings.get("soft_count") is None else settings["soft_count"],
        -1.0 if settings.get("hard_count") is None else settings["hard_count"],
        RowSettings(
            settings.get("ignore_index", -100),
            divergence.name,
            divergence.parameters,
            settings.get("t_squared", True),
            settings.get("label_smoothing", 0.0),
            settings.get("z_loss", 0.0),
            settings.get("teacher_form", "logits"),
            (scale[0], cap[0], scale[1], cap[1]),
            settings.get("vocab_size") or 0,
            settings.get("reduction", "mean"),
        ),
    )


def by_backend(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None = None,
    *,
    gradient: str = "fresh",
    upstream: Tensor | None = None,
    backend: ModuleType | None = None,
    **settings: Any,
) -> Result:
    """The same call of a backend (by default the one that serves), with the gradient as the kernel stores it."""
    _skip_float64(student)
    if backend is None:
        backend = backends.module(backends.serving(DEVICE, student.dtype).name)
    settings = {name: there(value) for name, value in settings.items()}
    loss, soft, hard, grad, unit = backend.row_loss(
        there(student),
        there(teacher),
        there(labels),
        *after_labels(labels, settings),
        gradient=gradient,
        upstream=there(upstream),
    )
    return Result(_values(LossTerms(loss, soft, hard)), grad.cpu(), float(unit))


def _values(terms: LossTerms) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in terms._asdict().items()}


def check(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    where: str = "",
    upstream: Tensor | None = None,
    **settings: Any,
) -> Result:
    """The call as a user makes it, against the fp64 truth. A reduced fp16 gradient is compared where it is stored."""
    truth = oracle.exact(student, teacher, labels, upstream, **settings)
    result = by_autograd(student, teacher, labels, upstream, **settings)
    where = f"{where} {student.dtype} {tuple(student.shape)} {settings}"
    oracle.check_values(result.values, truth, where)
    if student.dtype == torch.float16 and upstream is None:
        by_backend(student, teacher, labels, **settings).check(truth, where)
    else:
        oracle.check_gradient(result.grad, truth, where)
    return result
