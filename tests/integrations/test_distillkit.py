"""Ours in the place of DistillKit's KL, JSD and TVD, of dense and of sparse signals, in a trainer's list of losses.

DistillKit is not on PyPI: its formulae are written anew here, in float64, and its objects stand in with what is used of
them. It knows nothing of kernels.
"""

from __future__ import annotations

import enum
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from distil_fast.integrations import HostChangedError
from distil_fast.integrations import distillkit as ours

B, S, V, K = 2, 9, 61, 12
LOSSES = [ours.KLDLoss, ours.JSDLoss, ours.TVDLoss]
FORMS = ["dense", "zero", "zero of logits", "symmetric_uniform"]


class Missing(enum.Enum):
    ZERO = "zero"
    SYMMETRIC_UNIFORM = "symmetric_uniform"


def logits(scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher [B, S, V] in float64, and DistillKit's mask [B, S, 1]: padded, and some tokens ignored."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(B, S, V, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(B, S, 1, generator=g) < 0.8
    mask[0, 6:] = False
    return student, teacher, mask


def signal_of(form: str, teacher: Tensor, made_at: float = 1.0, k: int = K) -> Any:
    """A dense signal, or the k largest log-probabilities (or logits) at the temperature at which they were made."""
    if form == "dense":
        return types.SimpleNamespace(logits=teacher, generation_temperature=1.0)
    values = teacher / made_at
    log_values = form != "zero of logits"
    values, ids = (values.log_softmax(-1) if log_values else values).topk(k, -1)
    return types.SimpleNamespace(
        sparse_ids=ids, sparse_values=values, log_values=log_values, generation_temperature=made_at
    )


def evaluate(loss: Any, student: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    value = loss(types.SimpleNamespace(logits=leaf), *arguments, **options)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# ------------------------------------------------------------------------------------------------ the oracle


def outcomes(form: str, student: Tensor, signal: Any, temperature: float) -> tuple[Tensor, Tensor]:
    """p and q of all that can happen: of V columns, or of k and the rest."""
    q = (student.double() / temperature).softmax(-1)
    if form == "dense":
        return (signal.logits.double() / temperature).softmax(-1), q
    power = signal.generation_temperature / temperature
    powers = (power * signal.sparse_values.double()).exp()
    if form.startswith("zero"):  # nothing outside the k, where the student keeps what it has
        return torch.zeros_like(q).scatter(-1, signal.sparse_ids, powers / powers.sum(-1, keepdim=True)), q
    rest = (1 - signal.sparse_values.double().exp().sum(-1, keepdim=True)).clamp(min=0.0) ** power
    p = torch.cat([powers, rest], -1)
    kept = q.gather(-1, signal.sparse_ids)
    outside = q.scatter(-1, signal.sparse_ids, 0.0).sum(-1, keepdim=True)
    return p / p.sum(-1, keepdim=True), torch.cat([kept, outside], -1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    there = p > 0
    return torch.where(there, p * (torch.where(there, p, 1.0).log() - torch.where(there, q, 1.0).log()), 0.0).sum(-1)


def truth(loss: Any, form: str, signal: Any, mask: Tensor, temperature: float, count: float | None = None) -> Any:
    """T^2 D / (number of tokens under the mask), as a loss of the student's outputs, in float64."""

    def of_outputs(outputs: Any) -> Tensor:
        p, q = outcomes(form, outputs.logits, signal, temperature)
        rows = {
            ours.KLDLoss: lambda: kl(p, q),
            ours.JSDLoss: lambda: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
            ours.TVDLoss: lambda: (p - q).abs().sum(-1) / 2,
        }[loss]()
        return temperature**2 * torch.where(mask.squeeze(-1), rows, 0.0).sum() / (count or mask.sum())

    return of_outputs


def missing_of(form: str) -> str:
    return "symmetric_uniform" if form == "symmetric_uniform" else "zero"


# ------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("temperature", "made_at"), [(1.0, 1.0), (2.0, 1.0), (2.0, 2.0), (1.5, 2.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(loss: Any, form: str, temperature: float, made_at: float, dtype: torch.dtype) -> None:
    student, teacher, mask = logits()
    student, teacher = student.to(dtype), teacher.to(dtype)
    if form != "dense" and dtype != torch.float64:
        teacher = teacher.float()  # signals from a file are float32
    signal = signal_of(form, teacher, made_at)
    expected = evaluate(truth(loss, form, signal, mask, temperature), student.double())
    value, gradient = evaluate(loss(temperature, missing_of(form)), student, signal, mask=mask)
    assert gradient.dtype == dtype
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(value, expected[0]) < {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6}[dtype]
    rounding = error(expected[1].to(dtype), expected[1])
    assert error(gradient, expected[1]) < {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 1.1 * rounding)
    assert not gradient[~mask.squeeze(-1)].any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", ["dense", "zero"])
def test_all_masked_is_zero_and_not_0_over_0(loss: Any, form: str) -> None:
    student, teacher, mask = logits()
    value, gradient = evaluate(loss(2.0), student, signal_of(form, teacher), mask=torch.zeros_like(mask))
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_without_its_last_dimension_none_and_a_count(form: str) -> None:
    student, teacher, mask = logits()
    signal, loss = signal_of(form, teacher), ours.KLDLoss(2.0, missing_of(form))
    outputs = types.SimpleNamespace(logits=student)
    assert loss(outputs, signal, mask=mask) == loss(outputs, signal, mask=mask.squeeze(-1))
    everything = torch.ones_like(mask)
    assert error(loss(outputs, signal), truth(ours.KLDLoss, form, signal, everything, 2.0)(outputs)) < 1e-12
    by_count = loss(outputs, signal, mask=mask, num_items_in_batch=50)
    assert error(by_count, truth(ours.KLDLoss, form, signal, mask, 2.0, 50)(outputs)) < 1e-12


@pytest.mark.parametrize("form", ["dense", "zero", "symmetric_uniform"])
def test_counts_of_the_whole_batch_accumulate_to_its_loss(form: str) -> None:
    student, teacher, mask = logits()
    expected = evaluate(truth(ours.JSDLoss, form, signal_of(form, teacher), mask, 2.0), student)
    loss = ours.JSDLoss(2.0, missing_of(form))
    parts = [
        evaluate(loss, student[i : i + 1], signal_of(form, teacher[i : i + 1]), mask[i : i + 1], None, mask.sum())
        for i in range(B)
    ]
    assert error(sum(value for value, _ in parts), expected[0]) < 1e-12
    assert error(torch.cat([gradient for _, gradient in parts]), expected[1]) < 1e-12


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", ["zero", "symmetric_uniform"])
def test_a_teacher_that_is_all_there_in_float32(loss: Any, form: str) -> None:
    """k = V: log(1 - sum p) has nothing left; DistillKit clamps it to 1 - 1e-8, in float32 1, and is nan."""
    student, teacher, mask = logits()
    signal = signal_of(form, teacher.float(), k=V)
    expected = evaluate(truth(loss, "dense", signal_of("dense", teacher), mask, 1.0), student)
    found = evaluate(loss(1.0, form), student.float(), signal, mask=mask)
    for value, exact in zip(found, expected, strict=True):
        assert error(value, exact) < 5e-6


@pytest.mark.parametrize("seed", range(4))
def test_a_sure_teachers_empty_tail_is_exactly_empty(seed: int) -> None:
    """Mass of 10^-7 that float32 leaves over by rounding would be 0.7 % of the whole divergence, 4 10^-5."""
    student, teacher, mask = logits(seed=seed)
    teacher[..., 0] = 9.5 + teacher.max()
    student[..., 0] = 9.0 + student.max()
    student = student.float()
    signal = signal_of("zero", teacher.float())
    expected = evaluate(truth(ours.JSDLoss, "zero", signal, mask, 1.0), student.double())
    for found, exact in zip(evaluate(ours.JSDLoss(1.0), student, signal, mask=mask), expected, strict=True):
        assert error(found, exact) < 3e-6


def test_logits_as_values_do_not_say_what_is_missing() -> None:
    student, teacher, mask = logits()
    loss = ours.TVDLoss(1.0, Missing.SYMMETRIC_UNIFORM)
    with pytest.raises(ValueError, match="expected 'zero' beside values that are logits"):
        loss(types.SimpleNamespace(logits=student), signal_of("zero of logits", teacher), mask=mask)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="expected one of zero, symmetric_uniform, got 'uniform'"):
        ours.KLDLoss(1.0, "uniform")
    with pytest.raises(ValueError, match="temperature: expected a number > 0, got 0"):
        ours.KLDLoss(0)


# ------------------------------------------------------------------------------------------------ in a trainer


class TheirLoss:
    """What is used of DistillKit's losses: the protocol, and the configuration that they keep."""

    def __init__(self, name: str, temperature: float = 2.0, missing: Missing = Missing.ZERO) -> None:
        self.temperature, self.missing = temperature, missing
        self._name = name

    def name(self) -> str:
        return self._name

    def __call__(
        self,
        student_outputs: Any,
        signal: Any,
        mask: Any = None,
        hidden_state_mapping: Any = None,
        num_items_in_batch: Any = None,
    ) -> Any: ...


def test_apply_replaces_what_we_have_of_a_trainers_losses_until_undo() -> None:
    theirs = [TheirLoss("kl", 3.0, Missing.SYMMETRIC_UNIFORM), TheirLoss("hinge"), TheirLoss("jsd"), TheirLoss("tvd")]
    trainer = types.SimpleNamespace(loss_functions=theirs)
    with ours.apply(trainer):
        mine = trainer.loss_functions
        assert [type(loss) for loss in mine] == [ours.KLDLoss, TheirLoss, ours.JSDLoss, ours.TVDLoss]
        assert [loss.name() for loss in mine] == ["kl", "hinge", "jsd", "tvd"]
        assert (mine[0].temperature, mine[0].missing) == (3.0, "symmetric_uniform")
        assert (mine[2].temperature, mine[2].missing) == (2.0, "zero")
        assert not mine[0].requires_hidden_states()
        with pytest.raises(HostChangedError, match="Is it ours already"):
            ours.apply(types.SimpleNamespace(loss_functions=[mine[0]]))
    assert trainer.loss_functions is theirs


def test_a_host_of_another_shape_is_refused_before_anything_is_replaced() -> None:
    with pytest.raises(HostChangedError, match=r"SimpleNamespace.loss_functions with one of kl, jsd, tvd, got \[\]"):
        ours.apply(types.SimpleNamespace())
    without = TheirLoss("kl")
    del without.missing
    with pytest.raises(HostChangedError, match="TheirLoss to have temperature and missing"):
        ours.apply(types.SimpleNamespace(loss_functions=[TheirLoss("jsd"), without]))

    class Changed(TheirLoss):
        def __call__(self, student_outputs: Any, signal: Any) -> Any:  # type: ignore[override]
            ...

    with pytest.raises(HostChangedError, match="to take mask, num_items_in_batch"):
        ours.apply(types.SimpleNamespace(loss_functions=[Changed("kl")]))
    student, _, mask = logits()
    with pytest.raises(HostChangedError, match="with sparse_ids and sparse_values, got SimpleNamespace"):
        ours.KLDLoss(1.0)(types.SimpleNamespace(logits=student), types.SimpleNamespace(ids=1), mask=mask)
