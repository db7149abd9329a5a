"""What holds for all shapes and values, searched by hypothesis: bounds, symmetries, rows that know nothing of others.

Knows no example. Next: test_row_loss_values.py for the values that are special.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import distil_fast
from distil_fast import _C, reference
from tests import calls, oracle

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRESENT = [name for name in oracle.INSTRUCTION_SETS if _C.use_instruction_set(name)]
_C.use_instruction_set(PRESENT[0])
searched = settings(max_examples=60, deadline=None, derandomize=True)

temperatures = st.sampled_from([1.0, 2.0]) | st.floats(0.5, 20.0)
weights = st.floats(0.02, 0.98)
divergences = (
    st.sampled_from(["forward_kl", "reverse_kl", "total_variation", "hellinger", "soft_cross_entropy"])
    | st.one_of(*(weights.map(kind) for kind in (reference.JSD, reference.SkewedKL, reference.SkewedReverseKL)))
    | st.builds(reference.AlphaBeta, st.floats(0.1, 2.0), st.floats(0.1, 2.0))
)
caps = st.sampled_from([None, 3.0, 30.0])
shapes = st.tuples(st.integers(1, 5), st.integers(1, 70) | st.sampled_from([2047, 2048, 2049, 4111]))


@st.composite
def logits(draw: st.DrawFn) -> tuple[Tensor, Tensor, torch.Generator]:
    """Student and teacher: of some spread, apart or close, with a few values of their own, shifted by a constant."""
    rows, cols = draw(shapes)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    student, teacher = (
        draw(st.sampled_from([0.0, 0.1, 1.0, 3.0])) * torch.randn(rows, cols, generator=g) for _ in "st"
    )
    if draw(st.booleans()):
        student = teacher + draw(st.sampled_from([1e-1, 1e-2, 1e-3])) * torch.randn(rows, cols, generator=g)
    for x in (student, teacher):
        for _ in range(draw(st.integers(0, 3))):
            x[draw(st.integers(0, rows - 1)), draw(st.integers(0, cols - 1))] += draw(st.floats(-60.0, 8.0, width=32))
    return student + draw(st.sampled_from([0.0, 7.0, -64.0])), teacher, g


@st.composite
def arguments(draw: st.DrawFn, rows: int, cols: int) -> tuple[Tensor | None, dict[str, Any]]:
    """Labels, and everything else that distillation_loss takes but the reduction."""
    label = st.integers(0, cols - 1) | st.just(-100)
    labels = draw(st.none() | st.lists(label, min_size=rows, max_size=rows).map(torch.tensor))
    weight = st.sampled_from([0.0, 0.25, 1.0, 3.0])
    mask = draw(st.none() | st.lists(weight, min_size=rows, max_size=rows).map(torch.tensor))
    given: dict[str, Any] = {"temperature": draw(temperatures), "divergence": draw(divergences)}
    if draw(st.booleans()):
        given["temperature"] = torch.tensor(draw(st.lists(temperatures, min_size=rows, max_size=rows)))
    if mask is not None:
        given["soft_mask"] = mask if draw(st.booleans()) else mask > 0.5
    given |= {"student_softcap": draw(caps), "teacher_softcap": draw(caps)}
    given["student_logit_scale"] = draw(st.sampled_from([1.0, 0.3, 1.7]))
    given["soft_weight"], given["t_squared"] = draw(st.floats(0.1, 5.0)), draw(st.booleans())
    if labels is not None:
        given["hard_weight"], given["label_smoothing"] = (
            draw(st.floats(0.1, 5.0)),
            draw(st.sampled_from([0.0, 0.1, 1.0])),
        )
        given["z_loss"] = draw(st.sampled_from([0.0, 1e-3, 0.3]))
        if not given["label_smoothing"] and draw(st.booleans()):
            given["class_weights"] = torch.linspace(0.0, 2.0, cols)
    return labels, given


@searched
@given(st.data())
def test_every_call_is_within_its_bounds(data: st.DataObject) -> None:
    student, teacher, _ = data.draw(logits())
    labels, given_arguments = data.draw(arguments(*student.shape))
    s_dtype, t_dtype = (data.draw(st.sampled_from(DTYPES)) for _ in "st")
    reduction = data.draw(st.sampled_from(["mean", "sum"]))
    name = data.draw(st.sampled_from(PRESENT))
    _C.use_instruction_set(name)
    try:
        calls.check(student.to(s_dtype), teacher.to(t_dtype), labels, name, reduction=reduction, **given_arguments)
    finally:
        _C.use_instruction_set(PRESENT[0])


@searched
@given(st.data())
def test_rows_know_nothing_of_each_other(data: st.DataObject) -> None:
    """Permuted rows give permuted results, to the bit; so does a batch cut in two."""
    student, teacher, g = data.draw(logits())
    labels, given_arguments = data.draw(arguments(*student.shape))
    given_arguments |= {"reduction": "none", "upstream": torch.rand(student.shape[0], generator=g) + 0.5}
    whole = calls.by_autograd(student, teacher, labels, **given_arguments)
    order = torch.randperm(student.shape[0], generator=g)
    part = order[: data.draw(st.integers(1, len(order)))]
    picked = {
        name: value[part] if isinstance(value, Tensor) and name != "class_weights" else value
        for name, value in given_arguments.items()
    }
    result = calls.by_autograd(student[part], teacher[part], None if labels is None else labels[part], **picked)
    assert torch.equal(result.grad, whole.grad[part])
    assert all(torch.equal(result.values[name], whole.values[name][part]) for name in whole.values)


@searched
@given(logits(), temperatures, st.floats(0.02, 0.98))
def test_jsd_is_symmetric_and_bounded(pair: tuple[Tensor, Tensor, Any], temperature: float, beta: float) -> None:
    student, teacher, _ = pair
    one, other = (
        distil_fast.divergence_loss(a, b, divergence=reference.JSD(x), temperature=temperature, reduction="none")
        for a, b, x in ((student, teacher, beta), (teacher, student, 1 - beta))
    )
    assert ((one - other).abs() <= 4e-6 * (one + 0.1)).all()
    entropy = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
    assert (one >= 0).all()
    assert (one <= entropy * (1 + 2e-6)).all()


@searched
@given(logits(), temperatures)
def test_the_kls_are_each_other_turned_round(pair: tuple[Tensor, Tensor, Any], temperature: float) -> None:
    student, teacher, _ = pair
    forward, reverse = (
        distil_fast.divergence_loss(a, b, divergence=name, temperature=temperature, reduction="none")
        for a, b, name in ((student, teacher, "forward_kl"), (teacher, student, "reverse_kl"))
    )
    assert (forward >= 0).all()
    assert ((forward - reverse).abs() <= 4e-6 * (forward + 0.1)).all()


@searched
@given(logits(), temperatures)
def test_softmax_is_a_distribution(pair: tuple[Tensor, Tensor, Any], temperature: float) -> None:
    student, _, _ = pair
    probabilities, logarithms = (f(student, temperature) for f in (distil_fast.softmax, distil_fast.log_softmax))
    assert ((probabilities.double().sum(-1) - 1).abs() < 3e-6).all()
    exact = student.double().div(temperature).log_softmax(-1)
    assert ((logarithms.double() - exact).abs() <= 1e-6 * (exact.abs() + 1)).all()
    assert torch.equal(probabilities.argmax(-1), student.argmax(-1)) or not student.std() > 0.5


@searched
@given(st.data())
def test_weights_are_linear(data: st.DataObject) -> None:
    """Twice the weight is twice the gradient to the bit; the terms do not know their weights."""
    student, teacher, _ = data.draw(logits())
    labels = torch.zeros(student.shape[0], dtype=torch.int64)
    weight = data.draw(st.floats(0.1, 5.0))
    one, two = (
        calls.by_autograd(student, teacher, labels, soft_weight=f * weight, hard_weight=f * weight) for f in (1, 2)
    )
    assert torch.equal(two.grad, 2 * one.grad)
    assert two.values["loss"] == 2 * one.values["loss"]
    assert two.values["soft"] == one.values["soft"]
    assert two.values["hard"] == one.values["hard"]
