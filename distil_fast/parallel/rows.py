"""A row's value and totals from the sums of its shards: float64 vectors with one entry per row.

Shards come together as a row's blocks do in the core: each shard's sums are relative to its own maxima, and are brought
to the largest ones. Differences of the models are never those of two sums (docs/math.md, "Sharded vocabularies"). It
knows no process and no logit but a row's label's. Next: conduct.py, which calls it between the all-reduces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distil_fast.backends.layout import real_dtype
from distil_fast.backends.shards import SUMS, TOTALS, Shard, distance

Columns = dict[str, Tensor]


def _tail(x: Tensor) -> Tensor:
    return torch.expm1(x) - x


def _nearly(missed: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a distance stands for its references', and the factor of the student's exponentials that makes it so."""
    exact = missed.abs() < 0.5
    return exact, torch.where(exact, missed, 0.0).exp()


def to_largest(shard: Shard, sums: Tensor, maxima: Tensor, largest: Tensor) -> Columns:
    """This shard's sums relative to the largest maxima [rows, 2] of all shards; to be added to the other shards'."""
    x = dict(zip(SUMS, sums.unbind(-1), strict=True))
    fall_s, fall_t = torch.where(maxima == largest, 0.0, maxima - largest).unbind(-1)
    t = shard.temperatures
    fade_s, fade_t, fade_h = (fall_s / t).exp(), (fall_t / t).exp(), fall_s.exp()
    z_s, z_t = fade_s * x["z_s"], fade_t * x["z_t"]
    out = {"z_s": z_s, "z_t": z_t, "z_h": fade_h * x["z_h"], "rest": fade_h * x["rest"]}
    own, own_missed = distance(shard, *maxima.unbind(-1))
    common, missed = distance(shard, *largest.unbind(-1))
    own_exact, own_factor = _nearly(own_missed)
    exact, factor = _nearly(missed)
    # d grows by c. Because es = et exp(d) before and after, all changes are made of small numbers where c is small.
    c = (own - common) / t
    close = (c.abs() < 0.5) & own_exact & exact
    near = torch.where(close, c, 0.0)
    gap = fade_t * (near.exp() * x["gap"] + torch.expm1(near) * x["z_t"])
    out["gap"] = gap = torch.where(close, gap, z_s * factor - z_t)
    if shard.of_teacher:
        out["lean"] = torch.where(z_t == 0, 0.0, fade_t * (x["lean"] + c * x["z_t"]))
        tail = fade_t * (x["tail"] + torch.expm1(near) * x["gap"] + _tail(near) * x["z_t"])
        out["tail"] = torch.where(close, tail, gap - out["lean"])
    else:
        out["lean"] = torch.where(z_s == 0, 0.0, fade_s * (x["lean"] / own_factor + c * x["z_s"]))
        tail = fade_t * near.exp() * (x["tail"] + near * x["gap"] + (near + torch.expm1(-near)) * x["z_t"])
        out["tail"] = torch.where(close, tail / factor, out["lean"] - gap / factor)
    if shard.settings.label_smoothing:
        out["shifted"] = x["shifted"] + shard.student.shape[-1] * fall_s
    return out


def soft_totals(shard: Shard, sums: Columns, largest: Tensor) -> tuple[Columns, Tensor]:
    """References, rho and centre for the gradient, and the KL divergence (either one) that follows from the sums."""
    ref_s, ref_t = largest.unbind(-1)
    z_s, z_t, gap = sums["z_s"], sums["z_t"], sums["gap"]
    _, missed = distance(shard, ref_s, ref_t)
    exact, factor = _nearly(missed)
    part = gap / z_t
    together = exact & (part.abs() < 0.5)
    rho = torch.where(together, torch.log1p(torch.where(together, part, 0.0)), z_s.log() - z_t.log() + missed)
    weight = z_t if shard.of_teacher else z_s
    mean, tail = sums["lean"] / weight, sums["tail"] / weight  # mean: of d
    step = part if shard.of_teacher else -gap / (factor * z_s)
    near = exact & (tail.abs() < 0.5)
    by_tail = tail + (torch.log1p(torch.where(near, step, 0.0)) - step)
    value = torch.where(near, by_tail, rho - mean if shard.of_teacher else mean - rho)
    found = {"ref_s": ref_s, "ref_t": ref_t, "rho": rho, "centre": torch.zeros_like(rho)}
    if not shard.of_teacher:
        found["centre"] = torch.where(mean.isnan(), 0.0, mean - rho)
    if shard.settings.divergence == "reverse_kl":
        found.update(_around_mean(shard, found, mean))
    return found, value


def _around_mean(shard: Shard, found: Columns, mean: Tensor) -> Columns:
    """For g = q (r - D) without its sum: differences relative to their mean, so that no rounding of r or D is left.

    The distance is that of the references; the teacher's is moved, because g has no p.
    """
    real = real_dtype(shard.student)
    own, _ = distance(shard, found["ref_s"], found["ref_t"])
    ref_t = (found["ref_s"] - own - mean * shard.temperatures).to(real).double()
    moved, _ = distance(shard, found["ref_s"], ref_t)
    rho = mean + (own - moved) / shard.temperatures
    fine = rho.isfinite()
    return {
        "ref_t": torch.where(fine, ref_t, found["ref_t"]),
        "rho": torch.where(fine, rho, found["rho"]),
        "centre": torch.where(fine, 0.0, found["centre"]),
    }


def hard_values(shard: Shard, sums: Columns, label: Tensor, ref_s: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """H of each row, and the hard term's slope in the logsumexp beside the cross-entropy's 1.

    label: the label's logit relative to the largest.
    """
    settings = shard.settings
    log_z, rest, own = sums["z_h"].log(), sums["rest"], label.exp()
    value = torch.where(own > rest, torch.log1p(rest / own), log_z - label)
    if settings.label_smoothing:
        uniform = log_z - sums["shifted"] / vocabulary
        value = (1.0 - settings.label_smoothing) * value + settings.label_smoothing * uniform
    lse = ref_s + log_z
    if settings.z_loss:
        value = value + settings.z_loss * lse.square()
    return value, 2.0 * settings.z_loss * lse if settings.z_loss else torch.zeros_like(lse)


def rest_of(columns: Columns, maxima: Tensor, label: Tensor, logit: Tensor, own: Tensor) -> Tensor:
    """This shard's part in the sum of all exponentials but the label's: exact where the label is the likeliest.

    label: whether it is in this shard; logit: its own; own: its exponential relative to the largest maximum.
    """
    likeliest = label & (logit >= maxima[:, 0] - 1e-12 * maxima[:, 0].abs())
    other = torch.where(label, columns["z_h"] - own, columns["z_h"])
    return torch.where(likeliest, columns["rest"], other)


def as_totals(**columns: Tensor) -> Tensor:
    """[rows, TOTALS], zeros where a column is not given."""
    some = next(iter(columns.values()))
    return torch.stack([columns.get(name, torch.zeros_like(some)) for name in TOTALS], -1).contiguous()
