"""Ours in the place of ModelOpt's loss of logits: in mtd.convert's kd_loss mode, a converted model and its KDTrainer.

Against the installed package, and against the formula in float64. It knows nothing of kernels.
"""

from __future__ import annotations

import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM
from transformers.modeling_outputs import CausalLMOutput

pytest.importorskip("modelopt")
with warnings.catch_warnings():  # of torch.jit, and of what it can do without
    warnings.simplefilter("ignore")
    import modelopt.torch.distill as mtd
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

from distil_fast.integrations import HostChangedError
from distil_fast.integrations import modelopt as ours

pytestmark = [
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss by both:UserWarning"),  # theirs does
    pytest.mark.filterwarnings("ignore:`StaticLossBalancer` weights do not sum to 1.0:UserWarning"),
]

V, SHAPE = 61, (3, 10)
REDUCTIONS = ["mean", "batchmean", "sum", "none"]


def logits(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(*SHAPE, V, generator=g, dtype=torch.float64) for _ in range(2))
    return student, teacher


def padding() -> Tensor:
    return torch.arange(SHAPE[1]) < torch.tensor([10, 5, 3])[:, None]


def truth(student: Tensor, teacher: Tensor, reduction: str, temperature: float, mask: Tensor | None = None) -> Tensor:
    """T^2 KL(teacher || student) in float64 by the host's denominators, rows of padding left out."""
    log_q, log_p = (x.double().div(temperature).log_softmax(-1) for x in (student, teacher))
    rows = (log_p.exp() * (log_p - log_q)).sum(-1) * temperature**2
    mask = torch.ones(SHAPE) if mask is None else mask
    rows = rows * mask
    count = {"mean": mask.sum() * V, "batchmean": SHAPE[0], "sum": 1, "token_mean": mask.sum()}
    return rows if reduction == "none" else rows.sum() / count[reduction]


def evaluate(loss: Any, student: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, *arguments, **options)
    weights = torch.arange(1.0, 1.0 + value.numel()).view(value.shape).to(value)  # so that rows cannot change places
    (gradient,) = torch.autograd.grad((value * weights).sum(), leaf)
    return value.detach(), gradient


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# ------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients_are_theirs(reduction: str, temperature: float, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in logits())
    expected = evaluate(lambda s: truth(s, teacher, reduction, temperature), student.double())
    theirs, mine = (
        evaluate(side.LogitsDistillationLoss(temperature, reduction), student, teacher) for side in (mtd, ours)
    )
    assert mine[0].shape == theirs[0].shape
    assert mine[0].dtype == torch.float32
    assert mine[1].dtype == dtype
    for found, peer, exact in zip(mine, theirs, expected, strict=True):
        if dtype == torch.float32:
            assert error(found, exact) < 3e-6
            assert error(peer, exact) < 3e-5
        else:
            assert error(found, exact) <= error(peer, exact)
    if dtype == torch.bfloat16:
        assert error(mine[0], expected[0]) < 2e-6  # theirs computes in bfloat16, and is 10^-3 off and more
        assert error(mine[1], expected[1]) <= 1.1 * error(expected[1].bfloat16(), expected[1])


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "token_mean"])
@pytest.mark.parametrize("mask", ["bool", "weights"])
def test_a_mask_leaves_tokens_out(reduction: str, mask: str) -> None:
    student, teacher = logits()
    rows = padding() if mask == "bool" else padding() * torch.linspace(0.5, 2.0, 10)
    expected = evaluate(lambda s: truth(s, teacher, reduction, 2.0, rows), student)
    student[~padding()] = torch.nan  # is not read
    mine = evaluate(ours.LogitsDistillationLoss(2.0, reduction), student, teacher, mask=rows)
    for found, exact in zip(mine, expected, strict=True):
        assert error(found, exact) < 1e-6 if mask == "weights" else error(found, exact) < 1e-12


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "token_mean"])
def test_without_a_token_it_is_zero(reduction: str) -> None:
    value, gradient = evaluate(ours.LogitsDistillationLoss(2.0, reduction), *logits(), mask=torch.zeros(SHAPE).bool())
    assert not value.any()
    assert not gradient.any()


def test_outputs_of_transformers_and_a_teacher_with_gradients_are_taken() -> None:
    student, teacher = logits()
    loss = ours.LogitsDistillationLoss(2.0, "token_mean")
    expected = truth(student, teacher, "token_mean", 2.0)
    teacher.requires_grad_()
    assert error(loss(CausalLMOutput(logits=student), CausalLMOutput(logits=teacher)), expected) < 1e-12
    assert isinstance(loss, nn.modules.loss._Loss)


def test_what_is_no_reduction_or_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reduction: expected one of mean, .* token_mean, got 'tok'"):
        ours.LogitsDistillationLoss(reduction="tok")
    with pytest.raises(ValueError, match="temperature: expected a number > 0, got 0"):
        ours.LogitsDistillationLoss(0.0)


# ------------------------------------------------------------------------------------------------ in ModelOpt


def bert(seed: int, hidden: int) -> BertForMaskedLM:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=V, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForMaskedLM(config)


def converted(loss: Any, pair: tuple[str, str] = ("", "")) -> Any:
    """A student of which ModelOpt made a meta-model with its teacher, `loss` being the criterion of one pair."""
    balancer = mtd.StaticLossBalancer(0.7)
    mode = ("kd_loss", {"teacher_model": bert(1, 16), "criterion": {pair: loss}, "loss_balancer": balancer})
    return mtd.convert(bert(2, 8), mode=[mode])


def batch(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, SHAPE, generator=g)
    return {"input_ids": ids, "attention_mask": padding().long(), "labels": torch.where(padding(), ids, -100)}


def step(model: Any, count: int = 2, **options: Any) -> tuple[float, Tensor]:
    """Two batches' losses and the gradients that they accumulate."""
    model.train()
    model.zero_grad()
    total = 0.0
    for seed in range(count):
        inputs = batch(seed)
        loss = model.compute_kd_loss(student_loss=model(**inputs).loss, **options) / count
        loss.backward()
        total += loss.item()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return total, torch.cat(gradients)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_kd_loss_mode_trains_the_same_by_ours(reduction: str) -> None:
    pair = "cls.predictions", "cls.predictions"  # whose outputs are the logits: theirs takes tensors only
    theirs, mine = (step(converted(side.LogitsDistillationLoss(2.0, reduction), pair)) for side in (mtd, ours))
    whole = step(converted(ours.LogitsDistillationLoss(2.0, reduction)))  # ours takes the models' outputs too
    for found in (mine, whole):
        assert found[0] == pytest.approx(theirs[0], rel=1e-5)
        assert error(found[1], theirs[1]) < 1e-5


def test_a_mask_or_a_reduction_of_ones_own_goes_through_compute_kd_loss() -> None:
    mask = padding()
    pair = "cls.predictions", "cls.predictions"
    by_hand = {"loss_reduction_fn": lambda rows: (rows * mask).sum() / mask.sum()}
    theirs = step(converted(mtd.LogitsDistillationLoss(2.0, "none"), pair), **by_hand)
    for mine in (
        step(converted(ours.LogitsDistillationLoss(2.0, "none")), **by_hand),
        step(converted(ours.LogitsDistillationLoss(2.0, "token_mean")), mask=mask),
    ):
        assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
        assert error(mine[1], theirs[1]) < 1e-5


def test_apply_replaces_the_loss_of_a_converted_model_until_undo() -> None:
    pair = "cls.predictions", "cls.predictions"
    model = converted(mtd.LogitsDistillationLoss(2.0, "batchmean"), pair)
    before, losses = step(model), dict(model._layers_to_loss)
    with ours.apply(model):
        (loss,) = model._layers_to_loss.values()
        assert type(loss) is ours.LogitsDistillationLoss
        model(**batch())
        assert list(model.compute_kd_loss(skip_balancer=True)) == ["LogitsDistillationLoss_0"]  # as theirs is called
        found = step(model)
        assert found[0] == pytest.approx(before[0], rel=1e-5)
        assert error(found[1], before[1]) < 1e-5
        with pytest.raises(HostChangedError, match="Is it ours already"):
            ours.apply(model)
    assert model._layers_to_loss == losses
    exported = mtd.export(model)
    assert type(exported) is BertForMaskedLM


def kd_trainer(temperature: float) -> Any:
    """What KDTrainer's loss uses of it, without a Trainer's machinery."""
    trainer = object.__new__(KDTrainer)
    trainer._kd_criterion = mtd.LogitsDistillationLoss(temperature, "none")
    trainer._last_teacher_outputs = None
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("labels", ["some", "none of them", None])
def test_kdtrainers_loss_is_the_same_by_ours(dtype: torch.dtype, labels: str | None) -> None:
    student, teacher = (x.to(dtype) for x in logits())
    given = None if labels is None else batch()["labels"] if labels == "some" else torch.full(SHAPE, -100)
    trainer = kd_trainer(2.0)

    def loss(student: Tensor) -> Tensor:
        trainer._last_teacher_outputs = CausalLMOutput(logits=teacher)
        return trainer._standard_kd_loss(CausalLMOutput(logits=student), given)

    theirs = evaluate(loss, student)
    with ours.apply(trainer):
        mine = evaluate(loss, student)
        assert trainer._last_teacher_outputs is None
    assert "_standard_kd_loss" not in vars(trainer)
    if labels == "none of them":
        assert theirs[0] == mine[0] == 0
        assert not mine[1].any()
        return
    for found, peer in zip(mine, theirs, strict=True):
        assert error(found, peer) < (1e-5 if dtype == torch.float32 else 3e-3)
    assert error(mine[0], theirs[0]) < 1e-5  # both in float32


# ------------------------------------------------------------------------------------------------ other shapes


def test_a_host_of_another_shape_is_refused_before_anything_is_replaced() -> None:
    with pytest.raises(HostChangedError, match="expected a DistillationModel with a LogitsDistillationLoss"):
        ours.apply(nn.Linear(2, 2))
    host = types.SimpleNamespace(_layers_to_loss={("a", "b"): mtd.MGDLoss(2, 2)})
    with pytest.raises(HostChangedError, match=r"got SimpleNamespace with \['MGDLoss'\]"):
        ours.apply(host)
    loss = mtd.LogitsDistillationLoss(2.0)
    del loss._temperature
    with pytest.raises(HostChangedError, match="LogitsDistillationLoss to have _temperature and _reduction"):
        ours.apply(types.SimpleNamespace(_layers_to_loss={("a", "b"): loss}))
    trainer = types.SimpleNamespace(_kd_criterion=mtd.LogitsDistillationLoss(2.0, "none"))
    with pytest.raises(HostChangedError, match="to have a LogitsDistillationLoss and _standard_kd_loss"):
        ours.apply(trainer)
    trainer._standard_kd_loss = lambda outputs: outputs
    with pytest.raises(HostChangedError, match="to take labels"):
        ours.apply(trainer)
