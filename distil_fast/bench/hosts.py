"""The losses of other people's trainers, and ours in their place: the table that `bench integrations` goes through.

A new host is an entry of HOSTS: a name; the package whose version is told; where its loss and ours are to be found,
"module:object", imported only when they are measured (an ImportError is the reason that the report gives); how many
lines of its user change; `use`, which makes of either object a function of a Batch; and `means`, what both must
compute, by distil_fast.reference. It knows no time. Next: host_problem.py; docs/integrations.md.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from distil_fast import JSD, reference
from distil_fast.bench.cases import BF16, FP32, Case

ROWS, VOCABULARY, WIDTH, SEQUENCES = 512, 30522, 384, 4  # tokens of a batch, logits, hidden states, sequences
UNLABELLED = 1 / 8  # of the tokens; every eighth, so that each part of a batch has its share
BEFORE, AFTER = "host", "ours"
CHUNKS = 8  # torchtune's default
ALPHA_CE, ALPHA_MLM = 5.0, 2.0  # DistilBERT's; its cosine has no logits and is left out
OURS = "distil_fast.integrations"


class Batch(NamedTuple):
    """What a loss is called with. `student`, `teacher`: logits [B, S, V], or hidden states [B, S, H] with the heads'
    weights [V, H]; labels [B, S], -100 where a token has none."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    student_weight: Tensor
    teacher_weight: Tensor


Loss = Callable[[Batch], Tensor]
Means = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # of logits [n, V] twice, labels [n], and the loss's count


@dataclass(frozen=True)
class Host:
    """`labelled`: tokens without a label take no part; else all do. `hidden`: the loss starts from hidden states."""

    name: str
    package: str
    lines: int
    own: str
    ours: str
    use: Callable[[Any], Loss]
    means: Means
    labelled: bool = True
    hidden: bool = False

    def loss(self, of: str) -> Loss:
        """The loss of BEFORE or AFTER.

        Raises:
            ImportError: the host, or its integration, is not installed.
        """
        own = _found(self.own)  # the comparison is with the host installed
        return self.use(own if of == BEFORE else _found(self.ours))


def _found(place: str) -> Any:
    module, _, name = place.partition(":")
    return operator.attrgetter(name)(importlib.import_module(module))


def _divergence(kind: str | JSD, temperature: float = 1.0, *, t_squared: bool = False) -> Means:
    """The mean of a divergence over the tokens that take part."""

    def means(student: Tensor, teacher: Tensor, labels: Tensor, count: float) -> Tensor:
        return reference.divergence_loss(
            student, teacher, divergence=kind, temperature=temperature, t_squared=t_squared, count=count
        )

    return means


# ------------------------------------------------------------------------------------------------ how each is called


def _trl_logits(beta: float) -> Callable[[Any], Loss]:
    return lambda loss: lambda batch: loss(batch.student, batch.teacher, batch.labels, beta=beta)


def _trl_hidden(loss: Any) -> Loss:
    def call(batch: Batch) -> Tensor:
        mask = (batch.labels != -100).int()
        found = loss(batch.student, batch.teacher, batch.student_weight, batch.teacher_weight, mask, beta=0.5)
        return found[0]

    return call


def _torchtune(kind: Any) -> Loss:
    loss = kind()
    return lambda batch: loss(batch.student.flatten(0, 1), batch.teacher.flatten(0, 1), batch.labels.flatten())


def _torchtune_chunked(kind: Any) -> Loss:
    loss = kind(CHUNKS)

    def chunks(logits: Tensor) -> list[Tensor]:
        # torchtune's models make them one by one; the backward of this is one copy, of tensor_split's slices eight sums
        return list(logits.chunk(CHUNKS, dim=1))

    return lambda batch: loss(chunks(batch.student), chunks(batch.teacher), batch.labels)


def _textbrewer(loss: Any) -> Loss:
    return lambda batch: loss(batch.student, batch.teacher, temperature=4.0)


def _modelopt(kind: Any) -> Loss:
    loss = kind(temperature=2.0, reduction="batchmean")
    return lambda batch: loss(batch.student.flatten(0, 1), batch.teacher.flatten(0, 1))


def _distilbert(step_losses: Any) -> Loss:
    alphas = {"alpha_ce": ALPHA_CE, "alpha_mlm": ALPHA_MLM, "alpha_clm": 0.0}

    def call(batch: Batch) -> Tensor:
        mask = batch.labels.new_ones(batch.labels.shape)
        return step_losses(batch.student, batch.teacher, None, None, mask, batch.labels, **alphas).loss

    return call


def _distilbert_means(student: Tensor, teacher: Tensor, labels: Tensor, count: float) -> Tensor:
    soft = _divergence("forward_kl", 2.0, t_squared=True)(student, teacher, labels, count)
    return ALPHA_CE * soft + ALPHA_MLM * reference.cross_entropy(student, labels, count=(1 - UNLABELLED) * count)


HOSTS = (
    Host(
        "TRL GKD beta=0.5",
        "trl",
        2,
        "trl.experimental.gkd:GKDTrainer.generalized_jsd_loss",
        f"{OURS}.trl_losses:generalized_jsd_loss",
        _trl_logits(0.5),
        _divergence(JSD(0.5)),
    ),
    Host(
        "TRL GKD beta=0",
        "trl",
        2,
        "trl.experimental.gkd:GKDTrainer.generalized_jsd_loss",
        f"{OURS}.trl_losses:generalized_jsd_loss",
        _trl_logits(0.0),
        _divergence("forward_kl"),
    ),
    Host(
        "TRL DistillationTrainer",
        "trl",
        2,
        "trl.trainer.distillation_trainer:_chunked_divergence_loss",
        f"{OURS}.trl_losses:chunked_divergence_loss",
        _trl_hidden,
        _divergence(JSD(0.5)),
        hidden=True,
    ),
    Host(
        "torchtune ForwardKLLoss",
        "torchtune",
        1,
        "torchtune.modules.loss:ForwardKLLoss",
        f"{OURS}.torchtune:ForwardKLLoss",
        _torchtune,
        _divergence("soft_cross_entropy"),
    ),
    Host(
        "torchtune ForwardKL chunked",
        "torchtune",
        1,
        "torchtune.modules.loss:ForwardKLWithChunkedOutputLoss",
        f"{OURS}.torchtune:ForwardKLWithChunkedOutputLoss",
        _torchtune_chunked,
        _divergence("soft_cross_entropy"),
    ),
    Host(
        "TextBrewer kd_ce_loss",
        "textbrewer",
        2,
        "textbrewer.losses:kd_ce_loss",
        f"{OURS}.textbrewer:kd_ce_loss",
        _textbrewer,
        _divergence("soft_cross_entropy", 4.0),
        labelled=False,
    ),
    Host(
        "ModelOpt LogitsDistillationLoss",
        "nvidia-modelopt",
        2,
        "modelopt.torch.distill.losses:LogitsDistillationLoss",
        f"{OURS}.modelopt:LogitsDistillationLoss",
        _modelopt,
        _divergence("forward_kl", 2.0, t_squared=True),
        labelled=False,
    ),
    Host(
        "original DistilBERT",
        "transformers",
        2,
        "distil_fast.bench.original_losses:step_losses",
        f"{OURS}.distilbert:step_losses",
        _distilbert,
        _distilbert_means,
        labelled=False,
    ),
)

CASES = tuple(
    Case(
        host.name,
        ROWS,
        VOCABULARY,
        dtype,
        contenders=(BEFORE, AFTER),
        width=WIDTH if host.hidden else 0,
        quick=dtype == FP32,
    )
    for host in HOSTS
    for dtype in (FP32, BF16)
)
