"""A step on 64 sequences is a step on 4 x 16 of them: losses, gradients, weights; a mean of means is another.

Two ranks of 2 x 16 are in test_distributed.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

from distil_fast import triple_loss
from distil_fast.training.batch import IGNORED, MaskedBatch
from distil_fast.training.metrics import History
from distil_fast.training.protocols import Objective
from distil_fast.training.trainer import Trainer
from tests.training.toy import AsItIs, Given, ToyMasking, ToyObjective, a_batch, pieces, toy_config


@pytest.fixture(scope="module")
def batches() -> list[MaskedBatch]:
    """Three steps of 64 ragged sequences."""
    masking = ToyMasking()
    return [masking(a_batch(step, 64)) for step in range(3)]


class Recording(torch.optim.AdamW):
    """Keeps every gradient that it is given, after clipping and unscaling."""

    seen: ClassVar[list[list[Tensor]]] = []

    def step(self, closure: Any = None) -> Any:
        scale = self.grad_scale  # type: ignore[attr-defined]
        self.seen.append([p.grad.clone() / scale for group in self.param_groups for p in group["params"]])
        return super().step(closure)


def run(
    objective: Objective, batches: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[History, list[list[Tensor]], dict[str, Tensor]]:
    monkeypatch.setattr(Recording, "seen", [])
    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    settings = {"steps": 3, "dropout": False, "accumulation_steps": len(batches) // 3} | changes
    history = Trainer(objective, Given(batches), AsItIs(), toy_config(folder, **settings)).fit()
    return history, Recording.seen, objective.state_dict()


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of the tensors' relative distances."""
    return max(float((a - e).norm() / e.norm()) for a, e in zip(actual, expected, strict=True))


def test_accumulated_steps_are_big_steps(
    batches: list[MaskedBatch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [piece for batch in batches for piece in pieces(batch, 16)]
    counts = torch.stack([ToyObjective().counts(piece) for piece in parts])
    assert (counts.std(0) > 1).all()  # a mean of means would be wrong
    whole = run(ToyObjective(), batches, tmp_path / "whole", monkeypatch)
    accumulated = run(ToyObjective(), parts, tmp_path / "parts", monkeypatch)
    for column in ("loss", "ce", "mlm", "gradient_norm", "tokens"):
        torch.testing.assert_close(accumulated[0][column], whole[0][column], rtol=1e-6, atol=0)
    for mine, theirs in zip(accumulated[1], whole[1], strict=True):
        assert difference(mine, theirs) < 2e-6
    assert difference(list(accumulated[2].values()), list(whole[2].values())) < 2e-6


class MeanOfMeans(ToyObjective):
    """What every other trainer does: each micro-batch's own mean, divided by the number of micro-batches."""

    def forward(self, batch: MaskedBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(batch, 4 * self.counts(batch))


def test_a_mean_of_means_is_seen(batches: list[MaskedBatch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [piece for batch in batches for piece in pieces(batch, 16)]
    whole = run(ToyObjective(), batches, tmp_path / "whole", monkeypatch)
    naive = run(MeanOfMeans(), parts, tmp_path / "naive", monkeypatch)
    assert difference(naive[1][0], whole[1][0]) > 1e-3
    assert ((naive[0]["loss"] - whole[0]["loss"]).abs() > 1e-4 * whole[0]["loss"]).all()


def test_a_term_without_positions_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ToyMasking()(a_batch(0, 8))
    empty = batch._replace(labels=torch.full_like(batch.labels, IGNORED))
    history, gradients, _ = run(ToyObjective(), [empty] * 3, tmp_path, monkeypatch)
    assert (history["mlm"] == 0).all()
    assert (history["skipped"] == 0).all()
    assert all(gradient.isfinite().all() for step in gradients for gradient in step)


class TripleObjective(Objective):
    """DistilBERT's three terms from a tiny BERT, by `distil_fast.triple_loss`."""

    terms: ClassVar[tuple[str, ...]] = ("ce", "mlm", "cos")

    def __init__(self, teacher: BertForMaskedLM) -> None:
        super().__init__()
        self.teacher = [teacher]
        c = teacher.config
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.student = DistilBertForMaskedLM(
                DistilBertConfig(vocab_size=c.vocab_size, dim=16, n_layers=2, n_heads=2, hidden_dim=32, dropout=0.0)
            )

    def counts(self, batch: MaskedBatch) -> Tensor:
        tokens = batch.attention_mask.sum()
        return torch.stack([tokens, (batch.labels != IGNORED).sum(), tokens]).float()

    def forward(self, batch: MaskedBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "output_hidden_states": True}
        with torch.no_grad():
            teacher = self.teacher[0](**inputs)
        student = self.student(**inputs)
        terms = triple_loss(
            student.logits,
            teacher.logits,
            batch.labels,
            student.hidden_states[-1],
            teacher.hidden_states[-1],
            batch.attention_mask,
            ce_count=counts[0],
            mlm_count=counts[1],
            cos_count=counts[2],
        )
        return terms.loss, torch.stack(terms[1:]).detach()


def test_the_triple_loss_of_a_tiny_bert(
    make_teacher: Callable[..., BertForMaskedLM],
    batches: list[MaskedBatch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher = make_teacher(layers=3, vocabulary=31)
    parts = [piece for batch in batches for piece in pieces(batch, 16)]
    whole = run(TripleObjective(teacher), batches, tmp_path / "whole", monkeypatch)
    accumulated = run(TripleObjective(teacher), parts, tmp_path / "parts", monkeypatch)
    for column in ("loss", "ce", "mlm", "cos", "gradient_norm"):
        torch.testing.assert_close(accumulated[0][column], whole[0][column], rtol=5e-6, atol=0)
    everything = [torch.cat([g.flatten() for g in step]) for step in accumulated[1]]
    expected = [torch.cat([g.flatten() for g in step]) for step in whole[1]]
    assert difference(everything, expected) < 1e-5
