"""The original's step: its losses and gradients against distil_fast.triple_loss, and what it does as it did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from distil_fast import triple_loss
from distil_fast.bench import train_models
from distil_fast.bench.original import Original
from distil_fast.bench.syncs import OperatorCounter, aten
from distil_fast.bench.train_cases import TrainCase
from distil_fast.training.batch import IGNORED, MaskedBatch
from distil_fast.training.settings import LossConfig, OptimiserConfig

CASE = TrainCase(24, 2, 1, batch=4, length=16, shortest=9, vocabulary=300)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are only slowed down by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def batch() -> MaskedBatch:
    return train_models.masked_batch(CASE)


def original(loss: LossConfig | None = None, **options: int) -> Original:
    student, teacher = train_models.student(CASE), train_models.teacher(CASE)
    return Original(student, teacher, loss or LossConfig(), OptimiserConfig(warmup=0.0), steps=10, **options)


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_its_losses_and_gradients_are_those_of_the_triple_loss(batch: MaskedBatch, positions: str) -> None:
    loss = LossConfig(positions=positions)  # type: ignore[arg-type]
    theirs, ours = original(loss), original(loss)
    losses = theirs.losses(*theirs.outputs(batch), batch)
    losses.loss.backward()
    student, teacher = ours.outputs(batch)
    terms = triple_loss(
        student.logits,
        teacher.logits,
        batch.labels,
        student.hidden_states[-1],
        teacher.hidden_states[-1],
        batch.attention_mask,
        restrict_ce_to_mask=positions == "masked",
    )
    terms.loss.backward()
    for name in ("loss", "ce", "mlm", "cos"):
        assert getattr(losses, name).item() == pytest.approx(getattr(terms, name).item(), rel=1e-4), name
    wanted = gradients(ours.student)
    assert (gradients(theirs.student) - wanted).norm() <= 1e-4 * wanted.norm()


def test_the_two_positions_differ(batch: MaskedBatch) -> None:
    step = original()
    of_all = step.losses(*step.outputs(batch), batch).ce
    step.config = LossConfig(positions="masked")
    assert abs(step.losses(*step.outputs(batch), batch).ce / of_all - 1) > 1e-3


def test_a_term_of_weight_0_is_not_computed(batch: MaskedBatch) -> None:
    step = original(LossConfig(alpha_mlm=0.0, alpha_cos=0.0))
    losses = step.losses(*step.outputs(batch), batch)
    assert (losses.mlm, losses.cos) == (None, None)
    assert losses.loss == 5 * losses.ce


def test_it_updates_once_in_an_accumulation_by_the_mean_of_means(batch: MaskedBatch) -> None:
    step = original(accumulation_steps=2)
    before = [p.clone() for p in step.student.parameters()]
    step.step([batch])
    assert all(torch.equal(p, b) for p, b in zip(step.student.parameters(), before, strict=True))
    half = gradients(step.student)
    alone = original()
    alone.losses(*alone.outputs(batch), batch).loss.backward()
    torch.testing.assert_close(2 * half, gradients(alone.student))
    step.step([batch])
    assert any(not torch.equal(p, b) for p, b in zip(step.student.parameters(), before, strict=True))
    assert all(p.grad is None for p in step.student.parameters())
    assert step.last["loss"] == pytest.approx(step.total_loss / 2)


def test_it_reads_what_the_original_reads(batch: MaskedBatch) -> None:
    step = original()
    step.step([batch])  # AdamW makes its moments
    counter = OperatorCounter()
    with counter:
        step.losses(*step.outputs(batch), batch)
    outside = counter.seen[str(aten._local_scalar_dense)]  # transformers asks whether there is padding
    assert counter.seen[str(aten.masked_select)] == 4
    with counter:
        step.step([batch])
    assert counter.seen[str(aten._local_scalar_dense)] - 2 * outside == 6  # five numbers, and whether one is nan


def test_nan_stops_it(batch: MaskedBatch) -> None:
    step = original()
    with torch.no_grad():
        next(step.student.parameters())[5] = torch.nan
    with pytest.raises(FloatingPointError, match="micro-batch 0"):
        step.step([batch])


def test_weight_decay_spares_what_the_original_spared() -> None:
    student, teacher = train_models.student(CASE), train_models.teacher(CASE)
    optimiser = replace(OptimiserConfig(), weight_decay=0.1)
    step = Original(student, teacher, LossConfig(), optimiser, steps=10)
    decaying, spared = step.optimizer.param_groups
    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in student.named_parameters()}
    assert {names[id(p)] for p in spared["params"]} == {
        name for name in names.values() if name.endswith("bias") or name.endswith("LayerNorm.weight")
    }
    assert any(names[id(p)].endswith("sa_layer_norm.weight") for p in decaying["params"])


def test_the_batch_is_as_its_case_says() -> None:
    batch = train_models.masked_batch(CASE)
    lengths = batch.attention_mask.sum(1)
    assert (lengths.min(), lengths.max()) == (CASE.shortest, CASE.length)
    assert torch.equal(batch.tokens, batch.attention_mask.flatten().nonzero().squeeze(1))
    assert batch.masked is not None
    assert torch.equal(batch.masked, (batch.labels.flatten() != IGNORED).nonzero().squeeze(1))
    assert len(batch.masked) == -(-15 * len(batch.tokens) // 100)
    assert (batch.input_ids[batch.attention_mask == 0] == 0).all()
