"""The table of training cases: shapes of teacher, student and micro-batch, who takes a step on them, and what is told.

Of whole encoders too, whose size and latency are compared. It knows neither models nor time, and needs no transformers.
Next: train_models.py, which fills a case; train.py, which times it; encoders.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distil_fast.bench.cases import BF16, DTYPE_NAMES, FP32

ORIGINAL = "original"
EAGER, COMPILED, OURS = "modern eager", "modern compiled", "ours"
MASKED = " masked"  # after a contender's name: KL on the masked tokens only
CONTENDERS = (ORIGINAL, EAGER, COMPILED, OURS, EAGER + MASKED, COMPILED + MASKED, OURS + MASKED)

# what is told of a contender beside its time: Row.facts by name
TOKENS, PADDING, SYNCS, PARAMETERS = "tokens", "padding", "host syncs", "parameters"

# and the milliseconds of a step's parts: Row.parts by name
TEACHER, FORWARD, BACKWARD = "teacher encoder", "student encoder", "student encoder backward"
HEADS_AND_LOSS, OPTIMISER = "heads and loss", "optimiser"
PARTS = (TEACHER, FORWARD, HEADS_AND_LOSS, BACKWARD, OPTIMISER)
LOSS_ALONE = "loss alone"  # belongs to the heads and the loss
MASKING = "masking"  # before the step: the same for everyone


@dataclass(frozen=True)
class TrainCase:
    """One optimiser step of one micro-batch.

    The sequences' lengths run evenly from `shortest` to `length`: a bucket, as real text falls into it. Weights are
    float32; of another `dtype` the step runs under autocast. `attention` is transformers' implementation, for all.
    """

    width: int
    teacher_layers: int
    student_layers: int
    batch: int
    length: int
    shortest: int
    vocabulary: int = 30522
    dtype: torch.dtype = FP32
    device: str = "cpu"
    attention: str = "eager"  # on a CPU, torch's fused attention has the slower backward
    contenders: tuple[str, ...] = CONTENDERS
    quick: bool = False

    @property
    def name(self) -> str:
        """What tells this case from every other."""
        lengths = "ragged" if self.shortest < self.length else "full"
        layers = f"{self.teacher_layers} to {self.student_layers} layers of {self.width}"
        return f"train {DTYPE_NAMES[self.dtype]} {self.batch}x{self.length} {lengths}, {layers}"

    @property
    def precision(self) -> str:
        return DTYPE_NAMES[self.dtype]

    @property
    def heads(self) -> int:
        """Of attention: 12, as MiniLM and BERT-base have them, but for tiny models."""
        return 12 if self.width % 12 == 0 and self.width >= 384 else 2


TRAIN = (
    TrainCase(384, 6, 3, batch=8, length=128, shortest=122, quick=True),
    TrainCase(384, 6, 3, batch=8, length=128, shortest=128),
)

TRAIN_GPU = (
    TrainCase(768, 12, 6, 64, 512, shortest=488, dtype=BF16, device="cuda", attention="sdpa", quick=True),
    TrainCase(768, 12, 6, 64, 512, shortest=512, dtype=BF16, device="cuda", attention="sdpa"),
)


BERT_BASE, DISTILBERT = "BERT-base", "DistilBERT"


@dataclass(frozen=True)
class EncoderCase:
    """One sequence of this length through both encoders. `layers`: of the teacher, twice the student's."""

    length: int
    layers: int = 12
    width: int = 768
    vocabulary: int = 30522
    quick: bool = True

    @property
    def name(self) -> str:
        """What tells this case from every other."""
        return f"encoder fp32 1x{self.length}"


# The sentences of STS-B, on which the paper timed them (Sanh et al. 2019, table 3), have about 32 tokens.
ENCODERS = (EncoderCase(32), EncoderCase(128))

SUITES: dict[str, tuple[TrainCase, ...]] = {"train": TRAIN, "train-gpu": TRAIN_GPU}
