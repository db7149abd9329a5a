"""Gives an encoder that came without a masked-LM head one that works, and keeps the result in a cache.

An encoder such as the packaged one was never shown [MASK], so a head on its frozen hidden states predicts hardly more
than word frequencies; encoder and head are therefore trained together, on masked positions. It knows nothing of
students. Next: trainer.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from transformers import BertForMaskedLM, get_linear_schedule_with_warmup

from distil_fast import cross_entropy
from distil_fast.training.arrange import Sequences
from distil_fast.training.atomic import replacing
from distil_fast.training.cache import make_writable
from distil_fast.training.masked_lm import apply_head, encode
from distil_fast.training.masking import IGNORED, MaskedBatch
from distil_fast.training.precision import autocast
from distil_fast.training.report import progress
from distil_fast.training.settings import MaskingConfig
from distil_fast.training.text import Text

Report: TypeAlias = Callable[[int, str], None]  # steps done, and the loss in words


# For runs of a few minutes. Twice the share, because a masked position teaches more than another; and uniform, as in
# the evaluation, because what smoothing does to the frequencies of words takes longer than that to unlearn.
SHORT_RUN_MASKING = MaskingConfig(rate=0.3, smoothing=0.0)

HEAD_STEPS = {"bf16": 800, "fp32": 250}  # which two cores with and without bf16 instructions make in three minutes


@dataclass(frozen=True)
class HeadConfig:
    """The fit of a masked-LM head, and of the encoder under it, by plain cross-entropy on masked positions.

    Chosen for accuracy after three minutes on two cores: many small steps.
    """

    steps: int
    batch_size: int = 8  # sequences
    learning_rate: float = 5e-4  # peak, of the encoder
    head_learning_rate: float = 5e-3  # peak, of the head's transform and bias, which start from nothing
    warmup: float = 0.05  # of the steps, linear; then linear decay to 0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    max_grad_norm: float = 1.0
    masking: MaskingConfig = field(default_factory=lambda: SHORT_RUN_MASKING)
    log_interval: int = 10  # steps between two readings of the loss


def short_fit(precision: str) -> HeadConfig:
    """A fit within three minutes, in a resolved precision."""
    return HeadConfig(steps=HEAD_STEPS[precision])


def give(
    model: BertForMaskedLM, text: Text, config: HeadConfig, precision: str, seed: int, cache: Path, console: Console
) -> None:
    """Fit a head to the model on the text, or take the one that was fitted on it before.

    Raises:
        InputError: the cache cannot be written.
        FloatingPointError: the loss became inf or nan.
    """
    make_writable(cache, "cache")
    assert isinstance(text.training, Sequences)
    path = cache / f"{cache_key(model, text.training.key, (config, seed, precision))}.safetensors"
    if load_fitted(model, path):
        console.print(f"The teacher's masked-LM head was fitted before ({path}).")
        return
    console.print(
        "The teacher is an encoder without a masked-LM head. One is fitted on the text now, encoder and all, and kept "
        "for the next time."
    )
    masking = text.masking(config.masking, model.config.vocab_size, seed)
    stream = map(masking, text.feed(config.batch_size, seed))
    with progress(console, "Fitting the head", config.steps) as advance:
        fit_head(model, stream, config, precision, advance)
    save_fitted(model, path)


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
        with autocast(model.device, precision):
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


def cache_key(model: BertForMaskedLM, *settings: object) -> str:
    """A name for the result of a fit: a hash of the pretrained weights and of the settings' repr, the text's key among
    them."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, weight in model.bert.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.numpy().data)
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
