"""What the kernels are held to: the fp64 truth of a call, and the bounds on loss and gradient of docs/math.md.

The truth is distil_fast.reference in float64, fed with exactly the numbers that the kernel gets. No bound has an
absolute part that a zero gradient could pass. It knows nothing of kernels. Next: calls.py,
which makes the calls that are judged here; test_row_loss.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distil_fast import reference

INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "portable")
DIVERGENCES: dict[str, str | reference.Divergence] = {
    **{name: name for name in reference.DIVERGENCES},
    "jsd_0.1": reference.JSD(0.1),
    "jsd_0.9": reference.JSD(0.9),
}
EXTREMES: dict[str, reference.Divergence] = {  # parameters near the ends of their ranges
    "jsd_0.001": reference.JSD(0.001),
    "skewed_kl_0.001": reference.SkewedKL(0.001),
    "skewed_kl_0.999": reference.SkewedKL(0.999),
    "skewed_reverse_kl_0.001": reference.SkewedReverseKL(0.001),
    "skewed_reverse_kl_0.999": reference.SkewedReverseKL(0.999),
    "alpha_beta_1_0.01": reference.AlphaBeta(1.0, 0.01),
    "alpha_beta_0.3_2": reference.AlphaBeta(0.3, 2.0),
}
KINDS = ("plain", "close", "far", "offset", "sharp", "ascending")

LOSS_BOUND = {torch.float32: 2e-6, torch.float64: 1e-13}  # by the dtype of the arithmetic
GRAD_BOUND = {torch.float32: 3e-6, torch.float64: 1e-12}
MODELS = ("student", "teacher")
HALF_ULP = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
UNSURE = 16  # half ulps of 1 and of the logits that an r may be off
PREPARED = 8  # half ulps that a logit may be off after a logit scale, a softcap, or as T log p
ROUNDING_FACTOR = 1.1  # bf16 and fp16: this times what rounding the exact gradient costs
SECOND_ORDER = {torch.float32: 2.0**-44, torch.float64: 2.0**-40}  # relative to probabilities: see gradient_bound

# The worst error, as a part of its bound, that this session has seen: (quantity, dtype) -> (part, where).
worst: dict[tuple[str, str], tuple[float, str]] = {}


# ------------------------------------------------------------------------------------------------ inputs


def generator(*seed: object) -> torch.Generator:
    """A generator that depends on the case alone, so that a failure repeats itself in isolation."""
    value = 0
    for byte in "|".join(map(str, seed)).encode():
        value = (31 * value + byte) % 2**63
    return torch.Generator().manual_seed(value)


def logit_pair(kind: str, rows: int, cols: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Student and teacher, float64 [rows, cols], of one of the KINDS of pairs that training meets."""
    student = torch.randn(rows, cols, generator=g, dtype=torch.float64)
    teacher = torch.randn(rows, cols, generator=g, dtype=torch.float64)
    if kind == "plain":
        return 2 * student, 2 * teacher
    if kind == "close":  # p -> q
        return 3 * teacher + 1e-2 * student, 3 * teacher
    if kind == "far":
        return 25 * student, 25 * teacher
    if kind == "offset":  # p -> q up to a constant, which softmax does not see
        return 3 * teacher + 1e-2 * student + 100.0, 3 * teacher - 37.3
    if kind == "sharp":  # both sure of the same column
        student[:, cols // 2] += 12.0
        teacher[:, cols // 2] += 12.0
        return student, teacher
    assert kind == "ascending", kind  # each block of columns outweighs all before it
    ramp = torch.linspace(-150.0, 150.0, cols, dtype=torch.float64)
    return student + ramp, teacher + ramp


# ------------------------------------------------------------------------------------------------ the truth


@dataclass(frozen=True)
class Truth:
    """A call's exact result in float64, and what its bounds are made of, per row or reduced as the values are."""

    values: dict[str, Tensor]  # loss, soft and hard
    scales: dict[str, Tensor]  # of each: the error is measured against |value| + 0.1 scale
    grad: Tensor
    slack: Tensor  # what cancels in the gradient, which half an ulp of is an error: see `_soft_slack`, `_hard_slack`
    mass: Tensor  # w_soft T ||p + q|| + w_hard
    extra: Tensor  # what a gradient may be off beyond that: see `_rounding`, `_slope_rounding`, `_jumps`
    extra_values: dict[str, Tensor]


def exact(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None = None,
    upstream: Tensor | None = None,
    **settings: Any,
) -> Truth:
    """distillation_loss of the same numbers in float64; `upstream` is the gradient of a loss with reduction "none".

    `settings` are distillation_loss's, and teacher_form, which says what the teacher's tensor holds.
    """
    s = student.detach().double()
    t = None if teacher is None else teacher.detach().double()
    above = None if upstream is None else upstream.double()
    bare_s, bare_t, slope, bare = _bare(s, t, settings)
    terms, bare_grad = _terms(bare_s, bare_t, labels, above, bare)
    if bare_s.shape[-1] == 1 and not settings.get("z_loss"):
        bare_grad = torch.zeros_like(bare_grad)  # one column has one distribution
    grad = torch.nn.functional.pad(bare_grad * slope, (0, s.shape[-1] - bare_s.shape[-1]))
    soft, hard, soft_weight, hard_weight = _shares(bare_s, bare_t, labels, bare)
    temperature = _temperature(bare)
    of_rows = 1.0 if above is None else above.abs()
    scales = {"soft": soft, "hard": hard, "loss": soft_weight * soft + hard_weight * hard}
    if settings.get("reduction", "mean") == "none":
        scales = {name: scale.clamp(min=1.0) for name, scale in scales.items()}
    else:
        scales = {name: torch.maximum(scale.sum(), torch.ones(())) for name, scale in scales.items()}
    of_soft, of_hard = of_rows * soft_weight * soft / temperature, of_rows * hard_weight * hard
    half_ulp = HALF_ULP[torch.float64 if student.dtype == torch.float64 else torch.float32]
    slack = mass = jumps = torch.zeros_like(soft)
    if bare_t is not None:
        slack, mass, jumps = _soft_slack(bare_s, bare_t, slope, bare, half_ulp)
    extra_values, extra = _rounding((bare_s, bare_t), labels, above, slope, bare, settings, half_ulp)
    if bare_t is not None and reference.as_divergence(bare.get("divergence", "forward_kl")).name == "total_variation":
        # |p - q| of a peak is off by what p and q are
        extra_values = {name: extra_values[name] + 4 * half_ulp * scales[name] for name in scales}
    return Truth(
        {name: getattr(terms, name).detach() for name in scales},
        scales,
        grad,
        of_soft * slack + of_hard * _hard_slack(bare_s, slope, bare),
        of_soft * mass + of_hard * slope.amax(-1),
        extra + of_soft * jumps + half_ulp * _slope_rounding(s, grad, settings),
        extra_values,
    )


def _terms(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, upstream: Tensor | None, settings: dict[str, Any]
) -> tuple[reference.LossTerms, Tensor]:
    """The reference's terms, and the student's gradient."""
    x = student.detach().requires_grad_()
    terms = reference.distillation_loss(x, teacher, labels, **settings)
    return terms, torch.autograd.grad(terms.loss, x, upstream)[0]


def _bare(
    student: Tensor, teacher: Tensor | None, settings: dict[str, Any]
) -> tuple[Tensor, Tensor | None, Tensor, dict[str, Any]]:
    """The logits that the losses see, the student's slope at what is given, and the settings that are left for them."""
    width, bare = settings.get("vocab_size") or student.shape[-1], dict(settings)
    for name in ("vocab_size", "teacher_form", *(f"{m}_{t}" for m in MODELS for t in ("logit_scale", "softcap"))):
        bare.pop(name, None)
    transform = {m: (settings.get(f"{m}_logit_scale", 1.0), settings.get(f"{m}_softcap") or 0.0) for m in MODELS}
    scale, cap = transform["student"]
    # not 1 - tanh^2, of which nothing is left where the cap is reached
    u = (-2.0 * (student[..., :width] * (scale / cap)).abs()).exp() if cap else torch.ones_like(student[..., :width])
    if teacher is not None:
        temperature = _temperature(settings).expand(teacher.shape[:-1])
        teacher = reference._transformed(teacher[..., :width], *transform["teacher"])
        teacher = reference._as_logits(teacher, settings.get("teacher_form", "logits"), temperature)
    student = reference._transformed(student[..., :width], scale, cap)
    return student, teacher, scale * 4.0 * u / (1.0 + u).square(), bare


def _rounding(
    logits: tuple[Tensor, Tensor | None],
    labels: Tensor | None,
    upstream: Tensor | None,
    slope: Tensor,
    bare: dict[str, Any],
    settings: dict[str, Any],
    half_ulp: float,
) -> tuple[dict[str, Tensor], Tensor]:
    """How far values and gradient move if each prepared logit is PREPARED half ulps off: the most of four trials.

    A kernel keeps a prepared logit (after a logit scale, a softcap, or as T log p) in the precision of its sums; of r
    it then knows no more. docs/math.md, "Prepared rows".
    """
    changed = [_is_prepared(model, settings) for model in MODELS]
    terms, grad = _terms(*logits, labels, upstream, bare)
    values = {name: torch.zeros_like(value.detach()) for name, value in terms._asdict().items()}
    moved = torch.zeros_like(slope[..., 0])
    g = generator("rounding")
    for _ in range(4 if any(changed) else 0):
        off = [
            x * (1.0 + PREPARED * half_ulp * (2.0 * torch.randint(0, 2, x.shape, generator=g) - 1.0)) if prepared else x
            for x, prepared in zip(logits, changed, strict=True)
            if x is not None
        ]
        off_terms, off_grad = _terms(off[0], off[1] if len(off) > 1 else None, labels, upstream, bare)
        moved = torch.maximum(moved, ((off_grad - grad) * slope).norm(dim=-1))
        for name, value in off_terms._asdict().items():
            values[name] = torch.maximum(values[name], (value - getattr(terms, name)).detach().abs())
    return values, moved


def _is_prepared(model: str, settings: dict[str, Any]) -> bool:
    form = settings.get("teacher_form", "logits") if model == "teacher" else "logits"
    return (
        form != "logits" or settings.get(f"{model}_logit_scale", 1.0) != 1.0 or bool(settings.get(f"{model}_softcap"))
    )


def _slope_rounding(student: Tensor, grad: Tensor, settings: dict[str, Any]) -> Tensor:
    """The slope of a softcap is 1 - tanh(z)^2, which turns a relative error of z into 2 z times as much; z has two."""
    if not (cap := settings.get("student_softcap")):
        return torch.zeros_like(grad[..., 0])
    z = student.abs() * (settings.get("student_logit_scale", 1.0) / cap)
    return torch.where(grad == 0, 0.0, 4.0 * z * grad).norm(dim=-1)


def _temperature(settings: dict[str, Any]) -> Tensor:
    return torch.as_tensor(settings.get("temperature", 2.0), dtype=torch.float64)


def _shares(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, settings: dict[str, Any]
) -> tuple[Tensor, Tensor, float, float]:
    """Each row's share in the soft term (T^2 included) and in the hard one, and the sizes of the terms' weights."""
    reduction = settings.get("reduction", "mean")
    soft = hard = torch.zeros(student.shape[:-1], dtype=torch.float64)
    if teacher is not None:
        mask = settings.get("soft_mask")
        rows = soft + 1.0 if mask is None else mask.double()
        soft = reference._share(rows, settings.get("soft_count"), reduction)
        if settings.get("t_squared", True):
            soft = soft * _temperature(settings) ** 2
    if labels is not None:
        valid = labels != settings.get("ignore_index", -100)
        weights = settings.get("class_weights")
        rows = valid.double()
        if weights is not None:
            rows = torch.where(valid, weights.double()[torch.where(valid, labels, 0).long()], 0.0)
        hard = reference._share(rows, settings.get("hard_count"), reduction)
    hard_weight = settings.get("hard_weight")
    return (
        soft,
        hard,
        abs(float(settings.get("soft_weight", 1.0))),
        1.0 if hard_weight is None else abs(float(hard_weight)),
    )


def _soft_slack(
    student: Tensor, teacher: Tensor, slope: Tensor, settings: dict[str, Any], half_ulp: float
) -> tuple[Tensor, Tensor, Tensor]:
    """||(p + q) min(1, |r|)|| and ||p + q|| of each row (without a distribution: 0), and total variation's jumps.

    Some divergences have bounds of their own, for the reasons in docs/math.md, "Bounds":
    total variation's gradient, +-q / 2, does not shrink with r, and jumps where r is as small as its own rounding;
    alpha-beta's is r times a power of p, and an error of the partition sums no multiple of q, which the projection
    would remove; the skewed ones' roundings are more, and the reverse one's g grows to q log(1 / alpha).
    """
    divergence = reference.as_divergence(settings.get("divergence", "forward_kl"))
    temperature = _temperature(settings)
    by = temperature.unsqueeze(-1) if temperature.dim() else temperature
    log_p, log_q = (teacher / by).log_softmax(-1), (student / by).log_softmax(-1)
    both = (log_p.exp() + log_q.exp()).nan_to_num(0.0)
    r = torch.where(both == 0, 0.0, (log_q - log_p).abs()).nan_to_num(0.0)
    slack, mass = (both * r.clamp(max=1.0) * slope).norm(dim=-1), (both * slope).norm(dim=-1)
    jumps = torch.zeros_like(slack)
    if isinstance(divergence, reference.TotalVariation):
        q = log_q.exp().nan_to_num(0.0)
        size = (student.nan_to_num(neginf=0.0).abs() + teacher.nan_to_num(neginf=0.0).abs()) / by
        either = torch.where(r < UNSURE * half_ulp * (1.0 + size), q, 0.0)
        slack, jumps = 2 * mass, (either * slope).norm(dim=-1) + either.sum(-1) * (q * slope).norm(dim=-1)
    if isinstance(divergence, reference.AlphaBeta):
        power = divergence.alpha + divergence.beta
        powers = ((power * log_p).exp() + (power * log_q).exp()).nan_to_num(0.0)
        slack = 2 * (powers * (1.0 + power / divergence.alpha * r.clamp(max=1.0)) * slope).norm(dim=-1)
    if isinstance(divergence, reference.SkewedKL):
        slack = 2 * slack
    if isinstance(divergence, reference.SkewedReverseKL):
        slack = 2 * (both * r.clamp(max=max(1.0, -math.log(divergence.alpha))) * slope).norm(dim=-1)
    return slack, mass, jumps


def _hard_slack(student: Tensor, slope: Tensor, settings: dict[str, Any]) -> Tensor:
    """(smoothing + 2 z |lse|) ||q||: q - 1 / V, and q - 1 beside 2 z lse q, cancel as p e^r - p does."""
    lse = student.logsumexp(-1).abs().nan_to_num(0.0)
    size = settings.get("label_smoothing", 0.0) + 2.0 * settings.get("z_loss", 0.0) * lse
    return size * (student.softmax(-1) * slope).norm(dim=-1)


def closed_form(
    divergence: str | reference.Divergence, student: Tensor, teacher: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """D of each row and its gradient at the student's logits, float64, written from p and q with 0 log 0 = 0.

    An independent second truth: for the reference itself, and where logits are -inf and autograd gives up.
    """
    divergence = reference.as_divergence(divergence)
    p, q = ((x.double() / temperature).softmax(-1) for x in (teacher, student))
    value, g = _value_and_slope(divergence, p, q)
    return value, (g - q * g.sum(-1, keepdim=True)) / temperature


def _value_and_slope(divergence: reference.Divergence, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """D, and its derivative by each log q as if they were free (up to a multiple of q)."""
    if isinstance(divergence, reference.ForwardKL):
        return _kl(p, q), q - p
    if isinstance(divergence, reference.SoftCrossEntropy):
        return _kl(p, q) - _entropy_term(p, torch.ones_like(p)).sum(-1), q - p
    if isinstance(divergence, reference.ReverseKL):
        return _kl(q, p), _entropy_term(q, p)
    if isinstance(divergence, reference.JSD):
        beta = divergence.beta
        m = beta * p + (1 - beta) * q
        return beta * _kl(p, m) + (1 - beta) * _kl(q, m), (1 - beta) * _entropy_term(q, m)
    if isinstance(divergence, reference.TotalVariation):
        return (p - q).abs().sum(-1) / 2, q * (q - p).sign() / 2
    if isinstance(divergence, reference.Hellinger):
        return (p.sqrt() - q.sqrt()).square().sum(-1) / 2, (q - (p * q).sqrt()) / 2
    if isinstance(divergence, reference.AlphaBeta):
        a, b = divergence.alpha, divergence.beta
        mixed, of_q = p**a * q**b, q ** (a + b)
        return ((a * p ** (a + b) + b * of_q) / (a + b) - mixed).sum(-1) / (a * b), (of_q - mixed) / a
    alpha = divergence.parameters[0]
    if isinstance(divergence, reference.SkewedKL):
        m = alpha * p + (1 - alpha) * q
        return _kl(p, m), -(1 - alpha) * p * torch.where(q == 0, 0.0, q / m)
    assert isinstance(divergence, reference.SkewedReverseKL)
    m = alpha * q + (1 - alpha) * p
    return _kl(q, m), _entropy_term(q, m) - alpha * q * torch.where(q == 0, 0.0, q / m)


def _entropy_term(a: Tensor, b: Tensor) -> Tensor:
    """a log(a / b), 0 where a is."""
    return torch.where(a == 0, 0.0, a * (a.log() - b.log()))


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return _entropy_term(a, b).sum(-1)


# ------------------------------------------------------------------------------------------------ the bounds


def check_values(actual: dict[str, Tensor], truth: Truth, where: str) -> None:
    """Loss and terms: |error| <= 2e-6 (|value| + 0.1 max(1, weight T^2))."""
    for name, value in actual.items():
        expected = truth.values[name]
        assert value.shape == expected.shape, f"{name}: shape {tuple(value.shape)}, {where}"
        bound = LOSS_BOUND[value.dtype] * (expected.abs() + 0.1 * truth.scales[name]) + truth.extra_values[name]
        _check(name, str(value.dtype), (value.double() - expected).abs(), bound, where)


def check_gradient(actual: Tensor, truth: Truth, where: str, unit: float = 1.0) -> None:
    """A gradient stored in units of `unit`, row by row: see `gradient_bound`. Its zeros are where the truth's are."""
    assert actual.shape == truth.grad.shape, f"gradient: shape {tuple(actual.shape)}, {where}"
    bound = gradient_bound(truth, actual.dtype, unit)
    _check("gradient", str(actual.dtype), (actual.double() * unit - truth.grad).norm(dim=-1), bound, where)
    unused = (truth.grad == 0).all(-1)
    assert (actual[unused] == 0).all(), f"gradient: a row that is exactly zero is not, {where}"


def gradient_bound(truth: Truth, dtype: torch.dtype, unit: float = 1.0) -> Tensor:
    """Per row, on the norm of the error: 3e-6 ||g|| + 4 2^-24 slack + extra, and what rounding to 16 bits costs.

    SECOND_ORDER is the rounding of a rounding, which is all there is where two models agree to the last digit; in
    float64 it is what the oracle itself may be wrong by.
    """
    real = torch.float64 if dtype == torch.float64 else torch.float32
    bound = GRAD_BOUND[real] * truth.grad.norm(dim=-1) + 4 * HALF_ULP[real] * truth.slack
    bound = bound + SECOND_ORDER[real] * truth.mass + truth.extra
    if dtype in (torch.bfloat16, torch.float16):
        rounded = (truth.grad / unit).to(dtype).double() * unit
        bound = bound + ROUNDING_FACTOR * (rounded - truth.grad).norm(dim=-1)
    return bound


def _check(quantity: str, dtype: str, error: Tensor, bound: Tensor, where: str) -> None:
    """error <= bound, elementwise; nan is an error, and 0 <= 0 is none."""
    if error.numel() == 0:
        return
    part = torch.where(error == 0, 0.0, error / bound).flatten()
    index = int(part.nan_to_num(nan=float("inf")).argmax())
    high = part[index].item()
    assert high <= 1.0, (
        f"{quantity} ({dtype}): error {error.flatten()[index].item():.3g} is {high:.3g} times the bound "
        f"{bound.flatten()[index].item():.3g} in row {index}, {where}"
    )
    key = (quantity, dtype.removeprefix("torch."))
    if high > worst.get(key, (-1.0, ""))[0]:
        worst[key] = high, where
