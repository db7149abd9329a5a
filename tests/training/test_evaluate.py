"""The measures of quality on models whose predictions are known, and the counts of the table."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import BertForMaskedLM

from distil_fast.training.evaluate import (
    Predictions,
    encoder_latencies,
    parameter_count,
    predict,
    quality,
    weight_bytes,
)
from distil_fast.training.masking import IGNORED, MaskedBatch
from distil_fast.training.student import student_from_teacher

MakeTeacher = Callable[..., BertForMaskedLM]


def masked_batches() -> list[MaskedBatch]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for width in (12, 20):
        input_ids = torch.randint(5, 29, (3, width), generator=generator)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[0, width // 2 :] = 0
        labels = torch.full_like(input_ids, IGNORED)
        labels[:, 1:4] = torch.randint(5, 29, (3, 3), generator=generator)
        found.append(MaskedBatch(input_ids, attention_mask, attention_mask.flatten().nonzero().flatten(), labels, None))
    return found


def test_predictions_are_those_of_the_whole_model_at_the_masked_positions(make_teacher: MakeTeacher) -> None:
    teacher = make_teacher()
    for model in (teacher, student_from_teacher(teacher)):
        masked = masked_batches()
        actual = predict(model, masked)
        logits, labels = [], []
        with torch.no_grad():
            for input_ids, attention_mask, _, wanted, _ in masked:
                output = model(input_ids=input_ids, attention_mask=attention_mask).logits
                logits.append(output[wanted != IGNORED])
                labels.append(wanted[wanted != IGNORED])
        whole = torch.cat(logits)
        assert torch.equal(actual.labels, torch.cat(labels))
        assert torch.equal(actual.top1, whole.argmax(-1))
        expected = F.cross_entropy(whole.double(), actual.labels, reduction="none")
        torch.testing.assert_close(actual.losses.double(), expected, rtol=1e-5, atol=0)


def test_quality_by_hand() -> None:
    labels = torch.tensor([7, 8, 9, 10])
    losses = torch.tensor([0.5, 1.5, 2.0, 4.0])
    teacher = Predictions(torch.tensor([7, 8, 1, 2]), labels, losses)
    student = Predictions(torch.tensor([7, 3, 1, 10]), labels, losses / 2)
    measured = quality(student, teacher)
    assert measured.accuracy == pytest.approx(0.5)
    assert measured.agreement == pytest.approx(0.5)
    assert measured.pseudo_perplexity == pytest.approx(math.exp(1.0))
    assert quality(teacher, teacher).agreement == 1.0


def test_a_model_of_equal_logits_has_a_perplexity_of_its_vocabulary(make_teacher: MakeTeacher) -> None:
    model = make_teacher()
    for parameter in model.cls.parameters():
        parameter.data.zero_()
    predictions = predict(model, masked_batches())
    assert quality(predictions, predictions).pseudo_perplexity == pytest.approx(29, rel=1e-6)


def test_shared_parameters_count_once(make_teacher: MakeTeacher) -> None:
    tied, untied = make_teacher(), make_teacher(tie_word_embeddings=False)
    assert parameter_count(untied) - parameter_count(tied) == 29 * 17  # and its bias
    assert weight_bytes(tied) == 4 * parameter_count(tied)


def test_latencies_tell_a_deep_encoder_from_a_shallow_one(make_teacher: MakeTeacher) -> None:
    deep, shallow = encoder_latencies([make_teacher(layers=12), make_teacher(layers=1)], torch.full((1, 30), 7), 10)
    assert deep > 2 * shallow > 0
