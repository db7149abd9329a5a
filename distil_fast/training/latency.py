"""How fast encoders are: latency at batch 1 and 32, as Sanh et al. 2019 time them, and tokens a second.

Models take turns within one process and medians are compared, so that what else the machine does meets all of them. It
knows models and token ids; nothing of quality. Next: judge.py, report.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

WARM_UP = 3  # rounds that do not count


class Speed(NamedTuple):
    """Of one encoder, without a head, in the precision of its weights."""

    batch_size: int  # sequences
    sequence_length: int  # tokens, none of them padding
    seconds: float  # of one forward; the median
    tokens_per_second: float


def encoder_speeds(
    models: Mapping[str, PreTrainedModel],
    sequence_length: int = 128,
    batch_sizes: Sequence[int] = (1, 32),
    repeats: int = 20,
    seconds: float = 30.0,
) -> dict[str, list[Speed]]:
    """The speed of each model's encoder at each batch size, on token ids drawn evenly from all vocabularies.

    Args:
        models: on one device, with room for `sequence_length` positions.
        repeats: forwards that a median is taken of.
        seconds: for all models at one batch size; when they are over, fewer repeats have to do, but three at least.

    Raises:
        ValueError: a sequence longer than a model's positions.
    """
    for name, model in models.items():
        positions = getattr(model.config, "max_position_embeddings", sequence_length)
        if sequence_length > positions:
            raise ValueError(f"sequence_length: expected at most {positions} for {name}, got {sequence_length}.")
    vocabulary = min(model.config.vocab_size for model in models.values())
    device = next(iter(models.values())).device
    speeds: dict[str, list[Speed]] = {name: [] for name in models}
    generator = torch.Generator().manual_seed(0)
    for batch_size in batch_sizes:
        shape = (batch_size, sequence_length)
        # not below 2: in RoBERTa's family 1 is padding, from which it counts positions
        ids = torch.randint(min(2, vocabulary - 1), vocabulary, shape, generator=generator).to(device)
        medians = encoder_latencies(list(models.values()), ids, repeats, seconds)
        for name, median in zip(models, medians, strict=True):
            speeds[name].append(Speed(batch_size, sequence_length, median, ids.numel() / median))
    return speeds


@torch.inference_mode()
def encoder_latencies(
    models: Sequence[PreTrainedModel], input_ids: Tensor, repeats: int = 40, seconds: float = float("inf")
) -> list[float]:
    """Median seconds of each model's encoder on `input_ids` [B, S], without the head; the models take turns.

    On a GPU each forward is waited for. Models are in evaluation mode meanwhile.
    """
    attention_mask = torch.ones_like(input_ids)
    times: list[list[float]] = [[] for _ in models]
    modes = [model.training for model in models]
    for model in models:
        model.train(False)
    begin = time.perf_counter()
    for repeat in range(repeats + WARM_UP):
        for model, found in zip(models, times, strict=True):
            elapsed = _forward_seconds(model, input_ids, attention_mask)
            if repeat >= WARM_UP:
                found.append(elapsed)
        if len(times[0]) >= 3 and time.perf_counter() - begin > seconds:
            break
    for model, mode in zip(models, modes, strict=True):
        model.train(mode)
    return [statistics.median(found) for found in times]


def _forward_seconds(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> float:
    _wait(input_ids.device)
    start = time.perf_counter()
    model.base_model(input_ids=input_ids, attention_mask=attention_mask)
    _wait(input_ids.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
