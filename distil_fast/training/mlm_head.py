"""Gives an encoder that came without a masked-LM head one that works, and keeps the result in a cache.

An encoder such as the packaged one was never shown [MASK], so a head on its frozen hidden states predicts hardly more
than word frequencies; encoder and head are therefore trained together, on masked positions. It knows nothing of
students. Next: trainer.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers import BertForMaskedLM, get_linear_schedule_with_warmup

from distil_fast import cross_entropy
from distil_fast.training.atomic import replacing
from distil_fast.training.cache import cache_folder as cache_folder
from distil_fast.training.config import HeadConfig
from distil_fast.training.masked_lm import apply_head, autocast, encode
from distil_fast.training.masking import IGNORED, MaskedBatch

Report: TypeAlias = Callable[[int, str], None]  # steps done, and the loss in words


def fit_head(
    model: BertForMaskedLM, batches: Iterator[MaskedBatch], config: HeadConfig, precision: str, report: Report
) -> None:
    """Train encoder and head in place to predict the masked tokens of `config.steps` batches; dropout stays off.

    The fresh head learns at `config.head_learning_rate`, what was pretrained at `config.learning_rate`. The decoder
    is tied to the word embeddings and belongs to the latter.

    Raises:
        FloatingPointError: the loss became inf or nan.
    """
    decoder = model.get_output_embeddings().weight
    head = [parameter for parameter in model.cls.parameters() if parameter is not decoder]
    groups = [
        {"params": list(model.bert.parameters()), "lr": config.learning_rate},
        {"params": head, "lr": config.head_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(config.warmup * config.steps), config.steps)
    losses = torch.zeros(config.steps, device=model.device)
    for step in range(config.steps):
        input_ids, attention_mask, _, labels, _ = next(batches)
        rows = labels != IGNORED
        with autocast(model, precision):
            logits = apply_head(model, encode(model, input_ids, attention_mask)[rows])
        loss = cross_entropy(logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses[step] = loss.detach()
        done = step + 1
        if done % config.log_interval == 0 or done == config.steps:
            recent = losses[(step // config.log_interval) * config.log_interval : done].mean()
            if not recent.isfinite():
                raise FloatingPointError(
                    f"The loss of the head's fit is {recent.item()} by step {done}; lower its learning rate "
                    f"({config.learning_rate:g}) or use fp32."
                )
            report(done, f"cross-entropy {recent.item():.3f}")


def cache_key(model: BertForMaskedLM, sequences: Sequence[Tensor], settings: object) -> str:
    """A name for the result of a fit: a hash of the pretrained weights, the training text and the settings' repr."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, weight in model.bert.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.numpy().data)
    for sequence in sequences:
        digest.update(sequence.numpy().data)
    return digest.hexdigest()[:32]


def load_fitted(model: BertForMaskedLM, path: Path) -> bool:
    """Load a cached fit into `model`, or return False: there is none, or the file is truncated."""
    try:
        load_model(model, path)
    except (FileNotFoundError, SafetensorError):
        return False
    return True


def save_fitted(model: BertForMaskedLM, path: Path) -> None:
    """Keep a fit; the file appears whole or not at all."""
    with replacing(path) as scratch:
        save_model(model, str(scratch))
