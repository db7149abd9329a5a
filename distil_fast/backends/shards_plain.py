"""The three steps of shards.py in plain torch: any device, with logit scales and softcaps, in float64 a block of rows
at a time. The kernels' twins state g; here autograd derives it from a divergence's f, which makes this an oracle too.

It knows neither processes nor reductions. Next: shards.py for what goes in and out; reference.py for the divergences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from distil_fast import reference
from distil_fast.backends.layout import real_dtype
from distil_fast.backends.shards import SUMS, TOTALS, Shard, distance
from distil_fast.reference_pairs import times

BLOCK = 1 << 22  # elements of a block of rows: 32 MB a temporary


class _Rows(NamedTuple):
    """A block of rows in float64, what no term uses replaced by zeros; scalars are [n, 1]."""

    at: slice
    student: Tensor  # [n, V_r], transformed
    teacher: Tensor
    raw: Tensor  # the student as given
    temperature: Tensor
    soft: Tensor  # weights
    hard: Tensor


def _blocks(shard: Shard) -> Iterator[_Rows]:
    rows, cols = shard.temperatures.shape[0], shard.student.shape[-1]
    student = shard.student.reshape(rows, cols)
    teacher = None if shard.teacher is None else shard.teacher.reshape(rows, cols)
    scale_s, cap_s, scale_t, cap_t = shard.settings.transforms
    step = max(1, BLOCK // cols)
    for at in (slice(start, start + step) for start in range(0, rows, step)):
        temperature, soft, hard = (x[at].unsqueeze(-1) for x in shard[2:5])
        raw = torch.where((soft != 0) | (hard != 0), student[at].double(), 0.0)
        of_teacher = torch.zeros_like(raw) if teacher is None else torch.where(soft != 0, teacher[at].double(), 0.0)
        yield _Rows(
            at,
            reference._transformed(raw, scale_s, cap_s),
            reference._transformed(of_teacher, scale_t, cap_t),
            raw,
            torch.where(soft != 0, temperature, 1.0),
            soft,
            hard,
        )


def _difference(rows: _Rows, apart: Tensor) -> Tensor:
    """(s - t - apart) / T, and 0 where both are -inf, which has no weight."""
    masked = (rows.student == -math.inf) & (rows.teacher == -math.inf)
    return torch.where(masked, 0.0, (rows.student - rows.teacher - apart) / rows.temperature)


def statistics(shard: Shard) -> tuple[Tensor, Tensor]:
    """As shards.statistics."""
    lowest = torch.finfo(real_dtype(shard.student)).min
    rows = shard.temperatures.shape[0]
    maxima = shard.temperatures.new_empty(rows, 2)
    sums = shard.temperatures.new_zeros(rows, len(SUMS))
    for block in _blocks(shard):
        tops = [torch.nan_to_num(x.amax(-1), nan=lowest, posinf=math.inf, neginf=lowest) for x in block[1:3]]
        used = ((block.soft != 0) | (block.hard != 0)).squeeze(-1), (block.soft != 0).squeeze(-1)
        for column, (top, of_use) in enumerate(zip(tops, used, strict=True)):
            maxima[block.at, column] = torch.where(of_use, top, lowest)
        sums[block.at] = _sums(block, tops[0].unsqueeze(-1), tops[1].unsqueeze(-1), shard)
    return maxima, sums


def _sums(rows: _Rows, top_s: Tensor, top_t: Tensor, shard: Shard) -> Tensor:
    es, et = ((rows.student - top_s) / rows.temperature).exp(), ((rows.teacher - top_t) / rows.temperature).exp()
    apart, missed = distance(shard._replace(temperatures=rows.temperature), top_s, top_t)
    d = _difference(rows, apart)
    q = es * torch.where(missed.abs() < 0.5, missed, 0.0).exp()
    close = d.abs() < 0.5
    gap = torch.where(close, et * torch.expm1(d), q - et)
    of_teacher = shard.of_teacher
    lean = times(et if of_teacher else q, d)
    near = et * (torch.expm1(d) - d) if of_teacher else q * (torch.expm1(-d) + d)
    tail = torch.where(close, near, gap - lean if of_teacher else lean - gap)
    at_one = (rows.student - top_s).exp()
    below = torch.where(rows.student < top_s, at_one, 0.0).sum(-1)
    rest = below + ((rows.student >= top_s).sum(-1) - 1).clamp(min=0)
    soft, hard = (rows.soft != 0).squeeze(-1), (rows.hard != 0).squeeze(-1)
    columns = {
        **{name: torch.where(soft, x.sum(-1), 0.0) for name, x in zip(SUMS[:2], (es, et), strict=True)},
        **{name: torch.where(soft, x.sum(-1), 0.0) for name, x in zip(SUMS[3:6], (gap, tail, lean), strict=True)},
        "z_h": torch.where(hard, at_one.sum(-1), 0.0),
        "rest": torch.where(hard, rest, 0.0),
        "shifted": torch.where(hard, (rows.student - top_s).sum(-1), 0.0) if shard.settings.label_smoothing else rest,
    }
    return torch.stack([columns[name] for name in SUMS], -1)


def _terms(rows: _Rows, totals: Tensor, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
    """f and g of each column, as the kernels' functors return them, and the student's probabilities."""
    total = dict(zip(TOTALS, totals[rows.at].unsqueeze(-1).unbind(1), strict=True))
    apart, _ = distance(shard._replace(temperatures=rows.temperature), total["ref_s"], total["ref_t"])
    log_q = (rows.student - total["ref_s"]) / rows.temperature - total["z_s"].log()
    log_p = (rows.teacher - total["ref_t"]) / rows.temperature - total["z_t"].log()
    r, p, q = _difference(rows, apart) - total["rho"], log_p.exp(), log_q.exp()
    divergence = reference.DIVERGENCES[shard.settings.divergence]
    of = divergence(*shard.settings.parameters[: len(fields(divergence))])
    with torch.enable_grad():
        change = torch.zeros_like(r, requires_grad=True)  # of log q
        f = of.f(log_p, log_q + change, r + change, p, q * change.exp())
        (g,) = torch.autograd.grad(f.sum(), change)
    g = g + of.shift * q
    if shard.settings.divergence == "reverse_kl":
        g = g - total["centre"] * q
    return f.detach() + of.shift * (q - p), g, q


def divergence(shard: Shard, totals: Tensor) -> Tensor:
    """As shards.divergence."""
    f_g = shard.temperatures.new_zeros(totals.shape[0], 2)
    for rows in _blocks(shard):
        f, g, _ = _terms(rows, totals, shard)
        f_g[rows.at] = torch.where(rows.soft != 0, torch.stack([f.sum(-1), g.sum(-1)], -1), 0.0)
    return f_g


def gradient(shard: Shard, totals: Tensor, labels: Tensor | None, vocabulary: int, out: Tensor) -> None:
    """As shards.gradient."""
    flat = out.view(totals.shape[0], -1)
    for rows in _blocks(shard):
        total = dict(zip(TOTALS, totals[rows.at].unsqueeze(-1).unbind(1), strict=True))
        grad = torch.zeros_like(rows.student)
        if shard.teacher is not None:
            _, g, q = _terms(rows, totals, shard)
            grad = torch.where(rows.soft != 0, rows.soft / rows.temperature * (g - q * total["g_sum"]), 0.0)
        if labels is not None:
            hard = _hard_gradient(rows, total, labels[rows.at], shard.settings.label_smoothing, vocabulary)
            grad = grad + torch.where(rows.hard != 0, hard, 0.0)
        flat[rows.at] = _of_raw(grad, rows, *shard.settings.transforms[:2]).to(out.dtype)


def _hard_gradient(rows: _Rows, total: dict[str, Tensor], labels: Tensor, smoothing: float, vocabulary: int) -> Tensor:
    uniform = smoothing / vocabulary
    grad = (1.0 + total["lse_slope"]) * (rows.student - total["ref_s"]).exp() / total["z_h"] - uniform
    missing = total["rest"] / total["z_h"]
    at_label = smoothing - missing + total["lse_slope"] * (1.0 - missing) - uniform
    labels = labels.unsqueeze(-1)
    here = labels >= 0
    place = labels.clamp(min=0)
    return rows.hard * grad.scatter(-1, place, torch.where(here, at_label, grad.gather(-1, place)))


def _of_raw(grad: Tensor, rows: _Rows, scale: float, cap: float) -> Tensor:
    """The gradient of the student as given, from that of scale x, capped: its slope is 1 - tanh(z)^2, without the
    subtraction, of which nothing would be left where the cap is reached."""
    if not cap:
        return grad * scale
    u = (-2.0 * (rows.raw * (scale / cap)).abs()).exp()
    return torch.where(rows.raw == -math.inf, 0.0, grad * (scale * 4.0 * u / (1.0 + u).square()))
