"""The step: its gradient is the big batch's, its loss the recipe's; the loop learns, reproduces, and stops on nan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import BertForMaskedLM

from distil_fast import TripleTerms, triple_loss
from distil_fast.training.config import MaskingConfig, TrainingConfig
from distil_fast.training.masking import IGNORED, Batch, DynamicMasking, MaskedBatch
from distil_fast.training.student import student_from_teacher
from distil_fast.training.simple import Trainer, accumulate_gradients

VOCABULARY = 29
CONFIG = TrainingConfig(steps=30, micro_batch_size=4, accumulation_steps=2, learning_rate=3e-3, log_interval=5)
MakeTeacher = Callable[..., BertForMaskedLM]


def a_masked_batch(lengths: list[int], seed: int = 0) -> MaskedBatch:
    generator = torch.Generator().manual_seed(seed)
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    input_ids = torch.randint(5, VOCABULARY, attention_mask.shape, generator=generator) * attention_mask
    masking = DynamicMasking(torch.ones(VOCABULARY), range(5), 4, MaskingConfig(), seed)
    return masking(Batch(input_ids, attention_mask, attention_mask.flatten().nonzero().flatten()))


def parts(batch: MaskedBatch, rows: int) -> list[MaskedBatch]:
    """The batch in pieces, each cut to its own longest row, so that the pieces have other padding than the whole."""
    pieces = []
    for i in range(0, len(batch.input_ids), rows):
        width = int(batch.attention_mask[i : i + rows].sum(1).max())
        ids, mask, labels = (
            tensor[i : i + rows, :width] for tensor in (batch.input_ids, batch.attention_mask, batch.labels)
        )
        pieces.append(MaskedBatch(ids, mask, mask.flatten().nonzero().flatten(), labels, None))
    return pieces


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_four_accumulated_batches_are_one_big_batch(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher().double()
    whole = student_from_teacher(teacher)
    accumulated = copy.deepcopy(whole)
    batch = a_masked_batch([37, 5, 12, 20, 9, 33, 4, 4, 16, 40, 7, 21, 3, 6, 8, 5])
    pieces = parts(batch, 4)
    assert len({int((piece.labels != IGNORED).sum()) for piece in pieces}) > 1  # a mean of means would be wrong
    expected = accumulate_gradients(whole, teacher, [batch], CONFIG)
    actual = accumulate_gradients(accumulated, teacher, pieces, CONFIG)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    mine, theirs = gradients(accumulated), gradients(whole)
    assert mine.keys() == theirs.keys() == {name for name, _ in whole.named_parameters()}
    for name, gradient in theirs.items():
        if name.endswith("k_lin.bias"):  # a constant added to all scores: softmax does not see it
            continue
        assert gradient.norm() > 1e-6, name
        assert (mine[name] - gradient).norm() <= 1e-11 * gradient.norm(), name


def test_the_loss_of_a_step_is_distilberts(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher().double()
    student = student_from_teacher(teacher)
    batch = a_masked_batch([30, 11, 19])
    actual = accumulate_gradients(student, teacher, [batch], CONFIG)

    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "output_hidden_states": True}
    with torch.no_grad():
        s, t = student(**inputs), teacher(**inputs)
    real = batch.attention_mask.bool()
    ce = 4 * F.kl_div(F.log_softmax(s.logits[real] / 2, -1), F.softmax(t.logits[real] / 2, -1), reduction="batchmean")
    mlm = F.cross_entropy(s.logits.flatten(0, 1), batch.labels.flatten())
    hidden = s.hidden_states[-1][real], t.hidden_states[-1][real]
    cos = F.cosine_embedding_loss(*hidden, hidden[0].new_ones(len(hidden[0])))
    expected = torch.stack([5 * ce + 2 * mlm + cos, ce, mlm, cos])
    assert expected.min() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


def endless(seed: int = 0) -> Iterator[MaskedBatch]:
    lengths = torch.Generator().manual_seed(seed)
    while True:
        seed += 1
        yield a_masked_batch(torch.randint(6, 30, (4,), generator=lengths).tolist(), seed)


def test_training_lowers_every_term_and_leaves_the_teacher_alone(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher()
    before = copy.deepcopy(teacher.state_dict())
    student = student_from_teacher(teacher)
    reports: list[int] = []
    history = Trainer(student, teacher, CONFIG).fit(endless(), lambda done, words: reports.append(done))
    assert history.shape == (30, 4)
    first, last = history[:5].mean(0), history[-5:].mean(0)
    assert (last[[0, 1, 3]] < 0.8 * first[[0, 1, 3]]).all()
    assert reports == [5, 10, 15, 20, 25, 30]
    assert not student.training
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_training_is_reproducible_with_dropout(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher(hidden_dropout_prob=0.1)
    histories = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        histories.append(Trainer(student_from_teacher(teacher), teacher, CONFIG).fit(endless(), lambda *_: None))
    assert torch.equal(histories[0], histories[1])
    assert not torch.equal(histories[0], histories[2])


def test_learning_rate_warms_up_and_decays_to_nothing(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher()
    trainer = Trainer(student_from_teacher(teacher), teacher, TrainingConfig(steps=40, learning_rate=1e-3))
    rates = []
    for _ in range(40):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.step([a_masked_batch([8, 6])])
    assert rates[:3] == pytest.approx([0.0, 5e-4, 1e-3])
    assert rates[-1] == pytest.approx(1e-3 / 38)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.0


def test_gradients_are_clipped(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher()
    config = TrainingConfig(steps=3, max_grad_norm=1e-3)
    trainer = Trainer(student_from_teacher(teacher), teacher, config)
    trainer.step([a_masked_batch([20, 30])])
    norm = torch.stack([p.grad.norm() for p in trainer.parameters if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_names_its_step(make_teacher: MakeTeacher, value: float) -> None:
    teacher = make_teacher()
    calls = 0

    def broken(*args: torch.Tensor, **kwargs: object) -> TripleTerms:
        nonlocal calls
        calls += 1
        terms = triple_loss(*args, **kwargs)  # type: ignore[arg-type]
        return terms._replace(loss=terms.loss * value) if calls == 2 * 7 + 1 else terms  # two micro-batches a step

    trainer = Trainer(student_from_teacher(teacher), teacher, CONFIG, loss_function=broken)
    with pytest.raises(FloatingPointError, match="optimiser step 7 is not finite") as error:
        trainer.fit(endless(), lambda *_: None)
    assert "Lower the learning rate (0.003)" in str(error.value)
    assert calls == 20  # found when the losses of steps 5 to 9 were read
