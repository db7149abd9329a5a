"""How good a masked language model is on held-out text, and how it compares with its teacher.

Accuracy, pseudo-perplexity and agreement under fixed masks; size and latency. It knows models and masked batches;
nothing of training or of the screen. Next: report.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distil_fast import cross_entropy
from distil_fast.training.masked_lm import MaskedLM, apply_head, encode
from distil_fast.training.masking import IGNORED, MaskedBatch


class Predictions(NamedTuple):
    """Per masked position, in the order of the batches: the likeliest token, the true one, the cross-entropy."""

    top1: Tensor
    labels: Tensor
    losses: Tensor


class Quality(NamedTuple):
    """All over masked positions; accuracy and agreement are shares of 1."""

    accuracy: float
    pseudo_perplexity: float
    agreement: float


@torch.inference_mode()
def predict(model: MaskedLM, masked: Sequence[MaskedBatch]) -> Predictions:
    """The model's predictions for every position with a label; the head runs on those alone, in fp32."""
    model.train(False)
    top1, labels, losses = [], [], []
    for batch in masked:
        rows = batch.labels != IGNORED
        logits = apply_head(model, encode(model, batch.input_ids, batch.attention_mask)[rows])
        top1.append(logits.argmax(-1))
        labels.append(batch.labels[rows])
        losses.append(cross_entropy(logits, labels[-1], reduction="none"))
    return Predictions(torch.cat(top1), torch.cat(labels), torch.cat(losses))


def quality(predictions: Predictions, teacher: Predictions) -> Quality:
    """Top-1 accuracy, exp of the mean cross-entropy, and how often the likeliest token is the teacher's too.

    Both must be predictions of the same masked batches.
    """
    return Quality(
        accuracy=_share(predictions.top1 == predictions.labels),
        pseudo_perplexity=predictions.losses.double().mean().exp().item(),
        agreement=_share(predictions.top1 == teacher.top1),
    )


def _share(hits: Tensor) -> float:
    return hits.double().mean().item()


def parameter_count(model: MaskedLM) -> int:
    """Shared parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: MaskedLM) -> int:
    """What the weights take on disk, but for a header; shared parameters are stored once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@torch.inference_mode()
def encoder_latencies(models: Sequence[MaskedLM], input_ids: Tensor, repeats: int = 40) -> list[float]:
    """Median seconds of each model's encoder on `input_ids` [1, S], without the head; the models take turns."""
    attention_mask = torch.ones_like(input_ids)
    seconds: list[list[float]] = [[] for _ in models]
    for repeat in range(repeats + 3):  # three rounds warm up
        for model, times in zip(models, seconds, strict=True):
            start = time.perf_counter()
            encode(model, input_ids, attention_mask)
            if repeat >= 3:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]
