"""Tokens a second with distil_fast's losses and with plain PyTorch's, on the demo's own batches.

Contenders take turns in one process and medians are compared; before any timing their values must agree.
Next: objective.py for the step that these losses are a part of; distil-fast bench train times whole steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from distil_fast import TripleTerms, triple_loss
from distil_fast.training.masked_lm import MaskedLM, apply_head, encode
from distil_fast.training.masking import MaskedBatch
from distil_fast.training.precision import autocast
from distil_fast.training.settings import LossConfig

LossFunction: TypeAlias = Callable[..., TripleTerms]

DISTIL_FAST, PYTORCH = "distil_fast", "plain PyTorch"
REPEATS = 7
TOLERANCE = 1e-3  # relative, between the contenders' losses


def plain_triple_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    attention_mask: Tensor,
    *,
    temperature: float,
    alpha_ce: float,
    alpha_mlm: float,
    alpha_cos: float,
    ce_count: Tensor,
    mlm_count: Tensor,
    cos_count: Tensor,
) -> TripleTerms:
    """`distil_fast.triple_loss` as one writes it with torch.nn.functional: the contender.

    In float32, as autocast on a GPU would run these functions; rows are selected only where there is padding.
    """
    s, t = student_logits.float(), teacher_logits.float()
    s_hidden, t_hidden = student_hidden.float(), teacher_hidden.float()
    real = attention_mask.bool()
    everywhere = bool(real.all())
    s_real, t_real, s_hidden, t_hidden = (
        x.flatten(0, 1) if everywhere else x[real] for x in (s, t, s_hidden, t_hidden)
    )
    ce = F.kl_div(F.log_softmax(s_real / temperature, -1), F.softmax(t_real / temperature, -1), reduction="sum") * (
        temperature**2 / ce_count
    )
    mlm = F.cross_entropy(s.flatten(0, 1), labels.flatten(), reduction="sum") / mlm_count
    cos = F.cosine_embedding_loss(s_hidden, t_hidden, s_hidden.new_ones(len(s_hidden)), reduction="sum") / cos_count
    return TripleTerms(alpha_ce * ce + alpha_mlm * mlm + alpha_cos * cos, ce.detach(), mlm.detach(), cos.detach())


LOSSES: dict[str, LossFunction] = {DISTIL_FAST: triple_loss, PYTORCH: plain_triple_loss}


def loss_throughput(
    student: MaskedLM, teacher: MaskedLM, batch: MaskedBatch, config: LossConfig, precision: str
) -> dict[str, float]:
    """Real tokens a second of the loss and its gradient alone, on the logits that the models give for a batch."""
    with torch.no_grad(), autocast(student.device, precision):
        hidden = [encode(model, batch.input_ids, batch.attention_mask) for model in (student, teacher)]
        logits = [apply_head(model, h) for model, h in zip((student, teacher), hidden, strict=True)]
    tokens = batch.attention_mask.sum()
    student_logits, student_hidden = logits[0].requires_grad_(), hidden[0].requires_grad_()

    def run(loss_function: LossFunction) -> float:
        student_logits.grad = student_hidden.grad = None
        terms = loss_function(
            student_logits,
            logits[1],
            batch.labels,
            student_hidden,
            hidden[1],
            batch.attention_mask,
            temperature=config.temperature,
            alpha_ce=config.alpha_ce,
            alpha_mlm=config.alpha_mlm,
            alpha_cos=config.alpha_cos,
            ce_count=tokens,
            mlm_count=(batch.labels >= 0).sum(),
            cos_count=tokens,
        )
        terms.loss.backward()
        return terms.loss.item()

    return _tokens_per_second(int(tokens), {name: partial(run, loss) for name, loss in LOSSES.items()})


def _tokens_per_second(tokens: int, contenders: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    values = [contender() for contender in contenders.values()]  # also warms up
    if max(values) - min(values) > TOLERANCE * max(map(abs, values)):
        raise RuntimeError(f"The contenders disagree and are not timed: {dict(zip(contenders, values, strict=True))}.")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(REPEATS):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - start)
    return {name: tokens / statistics.median(times) for name, times in seconds.items()}
