"""The student's layers and weights: with every layer kept and token types off or folded, it must be the teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM, BertForMaskedLM, DistilBertForMaskedLM, PreTrainedModel

from distil_fast.training.architectures import architecture, layer_count
from distil_fast.training.masked_lm import decoder
from distil_fast.training.settings import InputError, StudentConfig
from distil_fast.training.student import evenly_spaced_layers, make_student, student_from_teacher
from tests.training.families import FAMILIES, LAYERS, PADDING, VOCABULARY, configuration, make_batch, make_model

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


# ------------------------------------------------------------------------------------------------ every family


def logits(model: PreTrainedModel, family: str) -> torch.Tensor:
    batch = make_batch(family)
    with torch.no_grad():
        whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return whole.logits[batch.attention_mask.bool()]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_and_folded_token_types_are_the_teacher(family: str, tied: bool) -> None:
    teacher = make_model(family, tie_word_embeddings=tied).double()
    student = student_from_teacher(teacher, range(LAYERS), token_types="fold")
    expected = logits(teacher, family)
    bound = {"rtol": 0, "atol": 1e-12 * expected.abs().max().item()}
    torch.testing.assert_close(logits(student, family), expected, **bound)
    dropped = logits(student_from_teacher(teacher, range(LAYERS)), family)
    has_types = family not in ("distilbert", "mpnet")
    assert ((dropped - expected).abs().max() > 0.01) == has_types
    assert (decoder(student)[0] is student.get_input_embeddings().weight) == tied
    assert decoder(student)[0].data_ptr() != decoder(teacher)[0].data_ptr()


@pytest.mark.parametrize("family", FAMILIES)
def test_students_of_every_family(family: str) -> None:
    teacher = make_model(family)
    student = student_from_teacher(teacher, [2, 0])
    assert type(student) is (DistilBertForMaskedLM if family in ("bert", "distilbert") else type(teacher))
    assert not student.training
    names = [name for name, _ in student.named_parameters()]
    assert not any("pooler" in name for name in names)
    frozen = [(name, p) for name, p in student.named_parameters() if not p.requires_grad]
    if family in ("bert", "distilbert", "mpnet"):
        assert not frozen
        assert not any("token_type" in name for name in names)
    else:
        assert [name.split(".")[-2] for name, _ in frozen] == ["token_type_embeddings"]
        assert frozen[0][1].shape[0] == 1
        assert not frozen[0][1].any()
    mine, theirs = (model.get_submodule(architecture(model).layers) for model in (student, teacher))
    for layer, source in ((0, 2), (1, 0)):
        copies = zip(
            sorted(p.double().sum().item() for p in mine[layer].parameters()),
            sorted(p.double().sum().item() for p in theirs[source].parameters()),
            strict=True,
        )
        assert all(a == b for a, b in copies)
    assert teacher.config.num_hidden_layers == LAYERS  # its configuration is not shared


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_student_is_a_hugging_face_checkpoint(family: str, tmp_path: Path) -> None:
    student = make_student(make_model(family), StudentConfig(layers=[0, 2], token_types="fold"))
    student.save_pretrained(tmp_path)
    loaded, report = AutoModelForMaskedLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(loaded) is type(student)
    assert torch.equal(logits(loaded, family), logits(student, family))
    assert layer_count(loaded) == 2


@pytest.mark.parametrize(("layers", "count"), [(None, 1), (2, 2), ([2, 2, 0, 1], 4)])
def test_layers_by_list_by_number_or_half(layers: list[int] | int | None, count: int) -> None:
    assert layer_count(make_student(make_model("roberta"), StudentConfig(layers=layers))) == count


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_random_students_have_the_shape_alone(family: str) -> None:
    teacher = make_model(family)
    copied = make_student(teacher, StudentConfig(layers=2))
    random = make_student(teacher, StudentConfig(layers=2, initialisation="random"))
    assert random.config.to_dict() == copied.config.to_dict()
    assert not random.training
    for (name, mine), (_, other) in zip(random.named_parameters(), copied.named_parameters(), strict=True):
        assert mine.shape == other.shape
        assert mine.requires_grad == other.requires_grad
        assert "token_type" in name or not torch.equal(mine, other), name


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize(("family", "other"), [("bert", "distilbert"), ("roberta", "distilbert"), ("bert", "electra")])
def test_students_of_another_shape(family: str, other: str, as_file: bool, tmp_path: Path) -> None:
    configuration(other, hidden_size=12, num_hidden_layers=2).save_pretrained(tmp_path)
    teacher = make_model(family)
    student = make_student(teacher, StudentConfig(config=tmp_path / "config.json" if as_file else tmp_path))
    assert (student.config.model_type, student.config.hidden_size, layer_count(student)) == (other, 12, 2)
    words = student.get_input_embeddings()
    assert isinstance(words, torch.nn.Embedding)
    assert words.padding_idx == PADDING.get(family, 0)  # the teacher's, whatever the configuration says
    assert logits(student, family).shape[-1] == VOCABULARY


def test_choices_that_cannot_be(tmp_path: Path) -> None:
    teacher = make_model("bert")
    configuration("distilbert", vocab_size=66).save_pretrained(tmp_path / "words")
    configuration("mpnet").save_pretrained(tmp_path / "padding")
    (tmp_path / "gpt.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "broken.json").write_text("{")
    cases = [
        (StudentConfig(layers=[0, 3]), r"layers: expected indices from 0 to 2 .*, got \[0, 3\]"),
        (StudentConfig(layers=[-1]), r"got \[-1\]"),
        (StudentConfig(layers=[]), r"got \[\]"),
        (StudentConfig(layers=4), "expected 1 to 3"),
        (StudentConfig(layers=0), "expected 1 to 3"),
        (StudentConfig(initialisation="random", layers=[3]), "expected indices from 0 to 2"),
        (StudentConfig(initialisation="random", token_types="fold"), "student.token_types: expected 'drop'"),
        (StudentConfig(config=tmp_path / "words"), "vocabulary of 67 tokens, got 66"),
        (StudentConfig(config=tmp_path / "words", layers=2), "student.layers: expected none"),
        (StudentConfig(config=tmp_path / "padding"), "takes token 1 for padding, .* pads with 0"),
        (StudentConfig(config=tmp_path / "gpt.json"), "student.config: .* got a 'gpt2'"),
        (StudentConfig(config=tmp_path / "broken.json"), "student.config: expected a Hugging Face configuration"),
        (StudentConfig(config=tmp_path / "absent"), "student.config: expected a Hugging Face configuration"),
    ]
    for config, message in cases:
        with pytest.raises(InputError, match=message):
            make_student(teacher, config)
    with pytest.raises(InputError, match="token_types: expected one of drop, fold, got 'keep'"):
        student_from_teacher(teacher, token_types="keep")
