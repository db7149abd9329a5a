"""Every number of a training run, with its unit, its default and where the default comes from.

Frozen dataclasses of the demo; no behaviour. The recipe's defaults are
those of the released DistilBERT (Sanh et al. 2019) unless a comment says otherwise. Next: demo.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from distil_fast.training.settings import InputError as InputError
from distil_fast.training.settings import MaskingConfig as MaskingConfig

# Uniform positions, all of them hidden: the question a reader expects behind "accuracy" and "pseudo-perplexity".
EVALUATION_MASKING = MaskingConfig(mask=1.0, random=0.0, smoothing=0.0)

# For runs of a few minutes. Twice the share, because a masked position teaches more than another; and uniform, as in
# the evaluation, because what smoothing does to the frequencies of words takes longer than that to unlearn.
SHORT_RUN_MASKING = MaskingConfig(rate=0.3, smoothing=0.0)


@dataclass(frozen=True)
class TrainingConfig:
    """The distillation. A step sees micro_batch_size * accumulation_steps sequences."""

    steps: int
    micro_batch_size: int = 8  # sequences
    accumulation_steps: int = 1  # micro-batches of an optimiser step
    learning_rate: float = 5e-4  # peak
    warmup: float = 0.05  # of the steps, linear; then linear decay to 0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    max_grad_norm: float = 5.0
    temperature: float = 2.0
    alpha_ce: float = 5.0
    alpha_mlm: float = 2.0
    alpha_cos: float = 1.0
    dropout: bool = True  # whether the student's dropout is on
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    log_interval: int = 10  # optimiser steps between two readings of the losses


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


@dataclass(frozen=True)
class DemoConfig:
    """What `distil-fast demo` does."""

    teacher: str | None = None  # folder or hub name; None: the packaged MiniLM
    text: Path | None = None  # UTF-8 file; None: documentation of installed packages
    output: Path = Path("runs/demo")
    cache: Path | None = None  # of fitted heads; None: $XDG_CACHE_HOME/distil_fast
    sequence_length: int = 128  # tokens, [CLS] and [SEP] included
    precision: str = "auto"  # "fp32", "bf16", or "auto": bf16 where the processor multiplies it
    seed: int = 56
    training: TrainingConfig | None = None  # None: `short_training`
    head: HeadConfig | None = None  # None: `short_head_fit`


# Two cores with bf16 instructions take three and two and a half minutes for these; fp32 is slower, and gets fewer.
HEAD_STEPS = {"bf16": 800, "fp32": 250}
TRAINING_STEPS = {"bf16": 250, "fp32": 100}


def short_head_fit(precision: str) -> HeadConfig:
    """The demo's head fit, within three minutes."""
    return HeadConfig(steps=HEAD_STEPS[precision])


def short_training(precision: str) -> TrainingConfig:
    """The demo's distillation, within three minutes: the recipe, but for what suits a run of a few hundred steps.

    That is `SHORT_RUN_MASKING`, an optimiser step of only two micro-batches (many small steps learn faster), and no
    dropout (no text is seen twice).
    """
    return TrainingConfig(
        steps=TRAINING_STEPS[precision], accumulation_steps=2, dropout=False, masking=SHORT_RUN_MASKING
    )
