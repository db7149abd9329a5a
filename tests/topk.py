"""Top-k teachers for tests: cases, their fp64 truth with its bounds, and the call of a backend.

The bounds are oracle.py's, over the outcomes (the ids, and the bucket) in the place of columns. It knows nothing of
kernels. Next: test_topk.py.
"""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distil_fast import LossTerms, TopK, backends, reference
from distil_fast.backends.settings import TAILS
from distil_fast.reference_topk import topk_loss
from tests import calls, oracle

TAIL_ROUNDING = 2.0  # half ulps of r_tail that a sum of exponentials costs: docs/math.md, "A top-k teacher"
SIZES = ((7, 3), (17, 17), (100, 64), (5000, 64), (300, 300), (2049, 1))  # V, k
TEMPERATURES = (2.0, 1.0, 3.7, 0.5)
TERMS: tuple[dict[str, Any], ...] = ({}, {"soft_weight": 0.7, "hard_weight": 1.3, "label_smoothing": 0.1})
ROWS = 6


class Case(NamedTuple):
    """Arguments of one call, and their truth."""

    where: str
    student: Tensor
    teacher: TopK
    labels: Tensor | None
    settings: dict[str, Any]
    truth: oracle.Truth


def entries(
    teacher: Tensor, k: int, temperature: float, dtype: torch.dtype, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The top k of logits in any order; the rows after the first are ragged, the last one is empty.

    Rows with columns outside miss at least 5 % of the mass: of a difference 1 - P that is almost 0, the oracle has as
    few digits as the kernel. What stands beside an id of -1 is nan: nobody may look at it.
    """
    log_probs, ids = (teacher / temperature).log_softmax(-1).topk(k)
    order = torch.rand(ids.shape, generator=g).argsort(-1)
    ids, log_probs = ids.gather(-1, order), log_probs.gather(-1, order)
    padding = torch.rand(ids.shape, generator=g) < 0.3
    padding[0], padding[-1] = False, True
    whole = ~padding.any(-1, keepdim=True) & (k == teacher.shape[-1])
    log_probs = torch.where(whole, log_probs, log_probs + math.log(0.95)).to(dtype)
    return ids.masked_fill(padding, -1), log_probs.masked_fill(padding, math.nan)


def cases(divergence: str | reference.Divergence, dtypes: tuple[torch.dtype, ...], **more: Any) -> list[Case]:
    """Every kind of logits with every tail; sizes, temperatures, terms and dtypes take turns."""
    made = []
    for i, (kind, tail) in enumerate(itertools.product(oracle.KINDS, TAILS)):
        (cols, k), temperature = SIZES[(i + i // 6) % len(SIZES)], TEMPERATURES[i % 4]
        g = oracle.generator("topk", kind, tail, cols)
        student, teacher = oracle.logit_pair(kind, ROWS, cols, g)
        student = student.to(dtypes[i % len(dtypes)])
        held = torch.float64 if student.dtype == torch.float64 else (torch.float32, torch.float16)[i % 2]
        given = TopK(*entries(teacher, k, temperature, held, g), tail)
        terms = TERMS[(i // 2) % 2]
        labels = torch.randint(0, cols, (ROWS,), generator=g) if terms else None
        if labels is not None:
            labels[0], labels[1] = given.ids[0, 0], -100
        settings = {"divergence": divergence, "temperature": temperature, **terms, **more}
        where = f"{kind} {tail} V={cols} k={k} {student.dtype} {held} {settings}"
        made.append(Case(where, student, given, labels, settings, exact(student, given, labels, **settings)))
    return made


def exact(
    student: Tensor, teacher: TopK, labels: Tensor | None = None, upstream: Tensor | None = None, **settings: Any
) -> oracle.Truth:
    """distillation_loss of the same numbers in float64, as `oracle.exact`."""
    x = student.detach().double().requires_grad_()
    terms = topk_loss(x, teacher.ids, teacher.log_probs.double(), labels, tail=teacher.tail, **settings)
    (grad,) = torch.autograd.grad(terms.loss, x, None if upstream is None else upstream.double())
    s = x.detach()[..., : settings.get("vocab_size")]
    half_ulp = oracle.HALF_ULP[torch.float64 if student.dtype == torch.float64 else torch.float32]
    soft, hard, soft_weight, hard_weight = oracle._shares(s, s, labels, settings)
    temperature = torch.as_tensor(settings.get("temperature", 2.0)).double()
    slack, mass, extra = _slack(s, teacher, temperature.expand(soft.shape), settings, half_ulp)
    scales = {"soft": soft, "hard": hard, "loss": soft_weight * soft + hard_weight * hard}
    if settings.get("reduction", "mean") == "none":
        scales = {name: scale.clamp(min=1.0) for name, scale in scales.items()}
    else:
        scales = {name: torch.maximum(scale.sum(), torch.ones(())) for name, scale in scales.items()}
    of_rows = 1.0 if upstream is None else upstream.double().abs()
    of_soft, of_hard = of_rows * soft_weight * soft / temperature, of_rows * hard_weight * hard
    return oracle.Truth(
        {name: getattr(terms, name).detach() for name in scales},
        scales,
        grad,
        of_soft * slack + of_hard * oracle._hard_slack(s, torch.ones_like(s), settings),
        of_soft * mass + of_hard,
        of_soft * extra,
        {name: 4 * half_ulp * scale for name, scale in scales.items()},
    )


def _slack(
    student: Tensor, teacher: TopK, temperature: Tensor, settings: dict[str, Any], half_ulp: float
) -> tuple[Tensor, Tensor, Tensor]:
    """oracle._soft_slack over the outcomes, and what the bucket's rounding adds."""
    by = temperature.unsqueeze(-1)
    given = teacher.ids >= 0
    index = torch.where(given, teacher.ids, 0).long()
    of_ids = torch.where(given, student.gather(-1, index), -math.inf)
    log_p = torch.where(given, teacher.log_probs.double(), -math.inf)
    outside = torch.zeros_like(student).scatter_add(-1, index, given.double()) == 0
    rest = by * torch.where(outside, student / by, -math.inf).logsumexp(-1, keepdim=True)
    missing = (1.0 - log_p.exp().sum(-1, keepdim=True)).clamp(min=0.0).log()
    whole_s, whole_t = torch.cat([of_ids, rest], -1), by * torch.cat([log_p, missing], -1)
    if teacher.tail == "renormalise":
        whole_s, whole_t = of_ids, by * log_p
    ones, bare = torch.ones_like(whole_s), {**settings, "temperature": temperature}
    slack, mass, extra = oracle._soft_slack(whole_s, whole_t, ones, bare, half_ulp)
    if teacher.tail == "renormalise":
        return slack, mass, extra
    powers = reference.as_divergence(settings["divergence"]) if "divergence" in settings else reference.ForwardKL()
    power = min(1.0, sum(powers.parameters)) if isinstance(powers, reference.AlphaBeta) else 1.0
    q_tail = (rest / by).squeeze(-1) - (student / by).logsumexp(-1)
    of_bucket = (power * q_tail).exp() + (power * missing.squeeze(-1)).exp()
    return slack, mass, extra + TAIL_ROUNDING * half_ulp * of_bucket.nan_to_num(0.0)


def by_backend(
    student: Tensor,
    teacher: TopK,
    labels: Tensor | None = None,
    *,
    gradient: str = "fresh",
    upstream: Tensor | None = None,
    backend: ModuleType | None = None,
    **settings: Any,
) -> calls.Result:
    """The call of a backend (by default the one that serves), with the gradient as the kernel stores it."""
    calls._skip_float64(student)
    if backend is None:
        backend = backends.module(backends.serving(calls.DEVICE, student.dtype).name)
    settings = {name: calls.there(value) for name, value in settings.items()}
    shift = reference.as_divergence(settings.get("divergence", "forward_kl")).shift
    loss, soft, hard, grad, unit = backend.topk_loss(
        *map(calls.there, (student, teacher.ids, teacher.log_probs, labels)),
        *calls.after_labels(labels, settings),
        shift,
        teacher.tail,
        gradient=gradient,
        upstream=calls.there(upstream),
    )
    return calls.Result(calls._values(LossTerms(loss, soft, hard)), grad if grad is None else grad.cpu(), float(unit))
