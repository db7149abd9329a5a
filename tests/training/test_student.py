"""The student's layers and weights: with every layer kept and token types off, it must be the teacher."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import BertForMaskedLM, DistilBertForMaskedLM

from distil_fast.training.settings import InputError
from distil_fast.training.student import evenly_spaced_layers, student_from_teacher

MakeTeacher = Callable[..., BertForMaskedLM]


@pytest.mark.parametrize(
    ("teacher_layers", "student_layers", "expected"),
    [
        (12, None, [0, 2, 4, 7, 9, 11]),
        (6, None, [0, 2, 5]),
        (8, 3, [0, 3, 7]),  # 3.5: round() would say 4
        (12, 3, [0, 5, 11]),
        (24, None, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]),
        (5, 5, [0, 1, 2, 3, 4]),
        (2, None, [0]),
        (1, None, [0]),
    ],
)
def test_layers_are_the_recipes(teacher_layers: int, student_layers: int | None, expected: list[int]) -> None:
    assert evenly_spaced_layers(teacher_layers, student_layers) == expected


def test_layers_are_distinct_and_keep_both_ends() -> None:
    for teacher_layers in range(2, 49):
        for student_layers in range(2, teacher_layers + 1):
            layers = evenly_spaced_layers(teacher_layers, student_layers)
            exact = [i * (teacher_layers - 1) / (student_layers - 1) for i in range(student_layers)]
            assert len(set(layers)) == student_layers
            assert (layers[0], layers[-1]) == (0, teacher_layers - 1)
            assert max(abs(layer - x) for layer, x in zip(layers, exact, strict=True)) <= 0.5


@pytest.mark.parametrize("student_layers", [0, -1, 5])
def test_impossible_number_of_layers(student_layers: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 4"):
        evenly_spaced_layers(4, student_layers)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_student_of_all_layers_is_the_teacher(make_teacher: MakeTeacher, tied: bool, activation: str) -> None:
    teacher = make_teacher(layers=3, tie_word_embeddings=tied, hidden_act=activation).double()
    teacher.bert.embeddings.token_type_embeddings.weight.data.zero_()
    student = student_from_teacher(teacher, range(3))
    input_ids = torch.randint(5, 29, (3, 17), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 9:] = 0
    real = attention_mask.bool()
    with torch.no_grad():
        expected = teacher(input_ids=input_ids, attention_mask=attention_mask).logits[real]
        actual = student(input_ids=input_ids, attention_mask=attention_mask).logits[real]
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_student_takes_the_layers_asked_for(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher(layers=4)
    student = student_from_teacher(teacher, [3, 1])
    for mine, theirs in ((0, 3), (1, 1)):
        layer, source = student.distilbert.transformer.layer[mine], teacher.bert.encoder.layer[theirs]
        assert torch.equal(layer.attention.q_lin.weight, source.attention.self.query.weight)
        assert torch.equal(layer.ffn.lin2.bias, source.output.dense.bias)
    assert len(student.distilbert.transformer.layer) == 2


def test_default_student_is_half_the_teacher_without_token_types(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher(layers=6)
    student = student_from_teacher(teacher)
    layer = sum(p.numel() for p in teacher.bert.encoder.layer[0].parameters())
    token_types = teacher.bert.embeddings.token_type_embeddings.weight.numel()
    assert teacher.num_parameters() - student.num_parameters() == 3 * layer + token_types
    assert isinstance(student, DistilBertForMaskedLM)
    assert not student.training


def test_student_shares_no_memory_with_its_teacher_and_keeps_its_tie(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher()
    before = teacher.bert.embeddings.word_embeddings.weight.clone()
    student = student_from_teacher(teacher)
    student.vocab_projector.weight.data.zero_()
    assert student.distilbert.embeddings.word_embeddings.weight.abs().max() == 0
    assert torch.equal(teacher.bert.embeddings.word_embeddings.weight, before)


def test_wrong_teacher_and_wrong_layers(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher()
    with pytest.raises(InputError, match="expected a BertForMaskedLM, which has a masked-LM head, got a BertModel"):
        student_from_teacher(teacher.bert)
    for layers in ([], [4], [-1]):
        with pytest.raises(ValueError, match="expected indices from 0 to 3"):
            student_from_teacher(teacher, layers)
