"""The contender computes the same loss, is refused where it does not, and both are timed on real tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import BertForMaskedLM

from distil_fast import TripleTerms
from distil_fast.reference import triple_loss
from distil_fast.training import throughput
from distil_fast.training.masking import IGNORED, MaskedBatch
from distil_fast.training.settings import LossConfig
from distil_fast.training.student import student_from_teacher

MakeTeacher = Callable[..., BertForMaskedLM]
CONFIG = LossConfig()


@pytest.mark.parametrize("lengths", [[9, 9, 9], [9, 4, 6]])
def test_the_plain_loss_is_the_references(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)

    def inputs() -> list[Tensor]:
        generator.manual_seed(0)
        shapes = [(3, 9, 50), (3, 9, 50), (3, 9, 8), (3, 9, 8)]
        return [3 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    attention_mask = (torch.arange(9) < torch.tensor(lengths).unsqueeze(1)).long()
    labels = torch.where(torch.arange(9) % 4 == 1, torch.randint(50, (3, 9), generator=generator), IGNORED)
    counts = {"ce_count": torch.tensor(40), "mlm_count": torch.tensor(11), "cos_count": torch.tensor(40)}
    alphas = {"temperature": 3.0, "alpha_ce": 5.0, "alpha_mlm": 2.0, "alpha_cos": 1.5}
    found: list[tuple[TripleTerms, Tensor, Tensor]] = []
    for function in (triple_loss, throughput.plain_triple_loss):
        s, t, s_hidden, t_hidden = inputs()
        s.requires_grad_(), s_hidden.requires_grad_()
        terms = function(s, t, labels, s_hidden, t_hidden, attention_mask, **alphas, **counts)
        terms.loss.backward()
        assert s.grad is not None
        assert s_hidden.grad is not None
        found.append((terms, s.grad, s_hidden.grad))
    for expected, actual in zip(found[0][0], found[1][0], strict=True):
        assert actual.item() == pytest.approx(expected.item(), rel=1e-5)  # the contender computes in float32
    for expected, actual in zip(found[0][1:], found[1][1:], strict=True):
        assert (actual - expected).norm() < 1e-5 * expected.norm()


def test_speeds_count_real_tokens_and_leave_the_student_alone(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher()
    student = student_from_teacher(teacher)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    input_ids = torch.full((2, 12), 7)
    attention_mask = (torch.arange(12) < torch.tensor([[12], [5]])).long()
    batch = MaskedBatch(
        input_ids,
        attention_mask,
        attention_mask.flatten().nonzero().flatten(),
        torch.where(torch.arange(12) == 3, input_ids, IGNORED),
        None,
    )
    speeds = throughput.loss_throughput(student, teacher, batch, CONFIG, "fp32")
    assert set(speeds) == {"distil_fast", "plain PyTorch"}
    assert 10 < min(speeds.values()) < max(speeds.values()) < 1e7
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


def test_contenders_that_disagree_are_not_timed(make_teacher: MakeTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Tensor, **kwargs: Tensor) -> TripleTerms:
        terms = throughput.plain_triple_loss(*args, **kwargs)  # type: ignore[arg-type]
        return terms._replace(loss=1.01 * terms.loss)

    monkeypatch.setattr(throughput, "LOSSES", throughput.LOSSES | {throughput.PYTORCH: wrong})
    teacher = make_teacher()
    ids = torch.full((2, 12), 7)
    batch = MaskedBatch(ids, torch.ones_like(ids), torch.arange(ids.numel()), ids, None)
    with pytest.raises(RuntimeError, match="disagree and are not timed"):
        throughput.loss_throughput(student_from_teacher(teacher), teacher, batch, CONFIG, "fp32")
