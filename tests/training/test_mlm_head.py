"""The fit of a missing head: it learns, and its cache is keyed, whole or refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM

from distil_fast.training.config import HeadConfig
from distil_fast.training.masking import IGNORED, MaskedBatch
from distil_fast.training.mlm_head import cache_folder, cache_key, fit_head, load_fitted, save_fitted

MakeTeacher = Callable[..., BertForMaskedLM]


def a_batch() -> MaskedBatch:
    input_ids = torch.randint(5, 29, (6, 20), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(20) % 5 == 2, input_ids, IGNORED)
    return MaskedBatch(
        input_ids=torch.where(labels == IGNORED, input_ids, 4),
        attention_mask=torch.ones_like(input_ids),
        tokens=torch.arange(input_ids.numel()),
        labels=labels,
        masked=None,
    )


def test_fit_learns_its_text_and_reports(make_teacher: MakeTeacher) -> None:
    model = make_teacher()
    reports: list[tuple[int, str]] = []
    config = HeadConfig(steps=60, learning_rate=5e-3, head_learning_rate=5e-3, log_interval=20)
    fit_head(model, repeat(a_batch()), config, "fp32", lambda *report: reports.append(report))
    with torch.no_grad():
        batch = a_batch()
        logits = model(input_ids=batch.input_ids).logits[batch.labels != IGNORED]
    assert (logits.argmax(-1) == batch.labels[batch.labels != IGNORED]).double().mean() > 0.9
    assert [done for done, _ in reports] == [20, 40, 60]
    assert torch.equal(model.cls.predictions.decoder.weight, model.bert.embeddings.word_embeddings.weight)


def test_fit_stops_on_a_loss_that_is_not_finite(make_teacher: MakeTeacher) -> None:
    model = make_teacher()
    model.cls.predictions.bias.data[7] = float("nan")
    with pytest.raises(FloatingPointError, match="nan by step 10"):
        fit_head(model, chain(repeat(a_batch())), HeadConfig(steps=30), "fp32", lambda *_: None)


def test_cache_round_trip(make_teacher: MakeTeacher, tmp_path: Path) -> None:
    fitted, other = make_teacher(layers=3), make_teacher(layers=3)
    for parameter in fitted.parameters():
        parameter.data.add_(1.0)
    path = tmp_path / "deep" / "fit.safetensors"
    assert not load_fitted(other, path)
    save_fitted(fitted, path)
    assert [entry.name for entry in path.parent.iterdir()] == ["fit.safetensors"]
    assert load_fitted(other, path)
    for name, tensor in fitted.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert other.cls.predictions.decoder.weight is other.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_cache_is_refused_and_changes_nothing(
    make_teacher: MakeTeacher, tmp_path: Path, kept: float
) -> None:
    model = make_teacher()
    path = tmp_path / "fit.safetensors"
    save_fitted(model, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not load_fitted(model, path)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_cache_key_depends_on_weights_text_and_settings(make_teacher: MakeTeacher) -> None:
    model, text = make_teacher(), [torch.tensor([2, 7, 3]), torch.tensor([2, 8, 3])]
    key = cache_key(model, text, HeadConfig(steps=5))
    assert key == cache_key(make_teacher(), [t.clone() for t in text], HeadConfig(steps=5))
    others = [
        cache_key(model, text, HeadConfig(steps=6)),
        cache_key(model, [text[0], torch.tensor([2, 9, 3])], HeadConfig(steps=5)),
        cache_key(make_teacher(layers=3), text, HeadConfig(steps=5)),
    ]
    model.bert.encoder.layer[1].output.dense.bias.data[0] += 1e-6
    others.append(cache_key(model, text, HeadConfig(steps=5)))
    assert len({key, *others}) == 5


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "distil_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "distil_fast"
