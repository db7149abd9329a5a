"""The measures of quality against whole logits in float64, on models whose answers are known, and the counts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import BertForMaskedLM

from distil_fast.training import evaluate
from distil_fast.training.evaluate import compare, copied_layers, parameter_count, weight_bytes
from distil_fast.training.masking import IGNORED, MaskedBatch
from distil_fast.training.student import student_from_teacher

MakeTeacher = Callable[..., BertForMaskedLM]
LAYERS = [0, 3]


def masked_batches(vocabulary: int = 29) -> list[MaskedBatch]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for width in (12, 20):
        input_ids = torch.randint(5, vocabulary, (3, width), generator=generator)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[0, width // 2 :] = 0
        labels = torch.full_like(input_ids, IGNORED)
        labels[:, 1:4] = torch.randint(5, vocabulary, (3, 3), generator=generator)
        real = attention_mask.flatten().nonzero().squeeze(1)
        chosen = (labels.flatten() != IGNORED).nonzero().squeeze(1)
        fields = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        fields |= {"tokens": real, "masked": chosen}
        found.append(MaskedBatch(**{name: fields[name] for name in MaskedBatch._fields}))
    return found


def whole_logits(model: BertForMaskedLM, batch: MaskedBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        output = model(**inputs, output_hidden_states=True)
    return output.logits.double(), [state.double() for state in output.hidden_states]


@pytest.mark.parametrize("rows", [4, 256])
def test_every_measure_is_that_of_whole_logits(
    make_teacher: MakeTeacher, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(evaluate, "ROWS", rows)
    teacher = make_teacher()
    student = student_from_teacher(teacher, LAYERS)
    pairs = [*copied_layers(LAYERS), (0, 0), (-1, -1)]
    found = compare(teacher, {"student": student}, masked_batches(), pairs)

    s, t, labels, cosines = [], [], [], []
    for batch in masked_batches():
        (s_logits, s_states), (t_logits, t_states) = whole_logits(student, batch), whole_logits(teacher, batch)
        rows_ = batch.labels != IGNORED
        real = batch.attention_mask.bool()
        s.append(s_logits[rows_]), t.append(t_logits[rows_]), labels.append(batch.labels[rows_])
        cosines.append(torch.stack([F.cosine_similarity(s_states[i], t_states[j], -1)[real] for i, j in pairs]))
    logits, teacher_logits, wanted = torch.cat(s), torch.cat(t), torch.cat(labels)
    quality = found["student"]
    assert quality.predictions == len(wanted) == 18
    assert quality.tokens == 12 * 2 + 6 + 20 * 2 + 10
    assert quality.accuracy == pytest.approx((logits.argmax(-1) == wanted).double().mean().item())
    assert quality.agreement == pytest.approx((logits.argmax(-1) == teacher_logits.argmax(-1)).double().mean().item())
    assert math.log(quality.pseudo_perplexity) == pytest.approx(F.cross_entropy(logits, wanted).item(), rel=1e-5)
    kl = F.kl_div(logits.log_softmax(-1), teacher_logits.log_softmax(-1), reduction="batchmean", log_target=True)
    assert quality.kl == pytest.approx(kl.item(), rel=1e-5)
    assert kl.item() > 0.01
    assert quality.cosines == pytest.approx(torch.cat(cosines, 1).mean(1).tolist(), rel=1e-5)
    own = found["teacher"]
    assert (own.agreement, own.kl) == (1.0, 0.0)
    assert own.cosines == pytest.approx([1.0] * 4)
    assert own.accuracy == pytest.approx((teacher_logits.argmax(-1) == wanted).double().mean().item())


def test_pairs_compare_a_layer_with_the_one_it_was_copied_from(make_teacher: MakeTeacher) -> None:
    """A student of the first layers differs from its teacher by the embeddings' token type alone."""
    assert copied_layers([0, 2, 5]) == [(1, 1), (2, 3), (3, 6)]
    teacher = make_teacher()
    teacher.bert.embeddings.token_type_embeddings.weight.data.zero_()
    student = student_from_teacher(teacher, [0, 1])
    right = compare(teacher, {"student": student}, masked_batches(), copied_layers([0, 1]))["student"].cosines
    wrong = compare(teacher, {"student": student}, masked_batches(), [(1, 2), (2, 3)])["student"].cosines
    assert right == pytest.approx([1.0, 1.0], abs=1e-6)
    assert max(wrong) < 0.999


def test_a_model_of_equal_logits_has_a_perplexity_of_its_vocabulary(make_teacher: MakeTeacher) -> None:
    model = make_teacher()
    for parameter in model.cls.parameters():
        parameter.data.zero_()
    assert compare(model, {}, masked_batches())["teacher"].pseudo_perplexity == pytest.approx(29, rel=1e-6)


def test_models_are_left_in_their_mode_and_without_gradients(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher(hidden_dropout_prob=0.5)
    student = student_from_teacher(teacher).train()
    first, second = (compare(teacher, {"s": student}, masked_batches())["s"] for _ in range(2))
    assert first == second  # no dropout
    assert student.training
    assert not teacher.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in student.parameters())


def test_wrong_arguments(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher()
    with pytest.raises(ValueError, match="vocabulary of 29 tokens, got 40"):
        compare(teacher, {"student": make_teacher(vocabulary=40)}, masked_batches())
    with pytest.raises(ValueError, match="which the teacher's results have"):
        compare(teacher, {"teacher": teacher}, masked_batches())
    with pytest.raises(ValueError, match="at least one position with a label"):
        compare(teacher, {}, [])
    with pytest.raises(ValueError, match=r"width 16, got 32"):
        compare(teacher, {"student": make_teacher(hidden_size=32)}, masked_batches(), [(1, 1)])
    with pytest.raises(ValueError, match="layers of the student from -5 to 4, got 5"):
        compare(teacher, {"student": make_teacher()}, masked_batches(), [(5, 1)])


def test_shared_parameters_count_once(make_teacher: MakeTeacher) -> None:
    tied, untied = make_teacher(), make_teacher(tie_word_embeddings=False)
    assert parameter_count(untied) - parameter_count(tied) == 29 * 17  # and its bias
    assert weight_bytes(tied) == 4 * parameter_count(tied)
