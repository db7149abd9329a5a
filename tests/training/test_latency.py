"""Latency and throughput: a deep encoder is slower than a shallow one, and the numbers fit each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import BertForMaskedLM

from distil_fast.training.latency import encoder_latencies, encoder_speeds

MakeTeacher = Callable[..., BertForMaskedLM]


def test_latencies_tell_a_deep_encoder_from_a_shallow_one(make_teacher: MakeTeacher) -> None:
    models = [make_teacher(layers=12).train(), make_teacher(layers=1)]
    deep, shallow = encoder_latencies(models, torch.full((1, 30), 7), 10)
    assert deep > 2 * shallow > 0
    assert [model.training for model in models] == [True, False]


def test_speeds_at_both_batch_sizes(make_teacher: MakeTeacher) -> None:
    found = encoder_speeds({"teacher": make_teacher(layers=2), "student": make_teacher(layers=1)}, 16, repeats=3)
    assert set(found) == {"teacher", "student"}
    for speeds in found.values():
        assert [(speed.batch_size, speed.sequence_length) for speed in speeds] == [(1, 16), (32, 16)]
        for speed in speeds:
            assert speed.tokens_per_second * speed.seconds == pytest.approx(speed.batch_size * 16)


def test_a_budget_of_time_ends_the_repeats(make_teacher: MakeTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = []
    monkeypatch.setattr(
        "distil_fast.training.latency._forward_seconds", lambda *_: forwards.append(None) or float(len(forwards))
    )
    assert encoder_latencies([make_teacher(layers=1)], torch.full((1, 4), 7), 100, seconds=0.0) == [5.0]
    assert len(forwards) == 6  # three to warm up, three to count


def test_a_sequence_longer_than_the_positions_is_refused(make_teacher: MakeTeacher) -> None:
    with pytest.raises(ValueError, match="at most 40 for teacher, got 64"):
        encoder_speeds({"teacher": make_teacher(layers=1)}, 64)
