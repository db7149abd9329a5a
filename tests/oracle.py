"""What the kernels are held to: the fp64 truth of a call, and the bounds on loss and gradient of docs/math.md.

The truth is distil_fast.reference in float64, fed with exactly the numbers that the kernel gets. No bound has an
absolute part that a zero gradient could pass. It knows nothing of kernels. Next: calls.py,
which makes the calls that are judged here; test_row_loss.py.
"""

from __future__ import annotations

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
KINDS = ("plain", "close", "far", "offset", "sharp", "ascending")

LOSS_BOUND = {torch.float32: 2e-6, torch.float64: 1e-13}  # by the dtype of the arithmetic
GRAD_BOUND = {torch.float32: 3e-6, torch.float64: 1e-12}
HALF_ULP = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
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
    slack: Tensor  # w_soft T ||(p + q) min(1, |r|)||, and w_hard smoothing ||q||: q - 1 / V cancels as p e^r - p does
    mass: Tensor  # w_soft T ||p + q|| + w_hard


def exact(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None = None,
    upstream: Tensor | None = None,
    **settings: Any,
) -> Truth:
    """distillation_loss of the same numbers in float64; `upstream` is the gradient of a loss with reduction "none"."""
    s = student.detach().double().requires_grad_()
    t = None if teacher is None else teacher.detach().double()
    terms = reference.distillation_loss(s, t, labels, **settings)
    (grad,) = torch.autograd.grad(terms.loss, s, None if upstream is None else upstream.double())
    if s.shape[-1] == 1:
        grad = torch.zeros_like(grad)  # a distribution over one column cannot change
    soft, hard, soft_weight, hard_weight = _shares(s, t, labels, settings)
    jumps = reference.as_divergence(settings.get("divergence", "forward_kl")).name == "total_variation"
    temperature = torch.as_tensor(settings.get("temperature", 2.0)).double()
    of_rows = 1.0 if upstream is None else upstream.double().abs()
    slack, mass = (torch.zeros_like(soft),) * 2 if t is None else _scales(s.detach(), t, temperature)
    slack = mass if jumps else slack  # its gradient does not vanish with r
    scales = {"soft": soft, "hard": hard, "loss": soft_weight * soft + hard_weight * hard}
    if settings.get("reduction", "mean") == "none":
        scales = {name: scale.clamp(min=1.0) for name, scale in scales.items()}
    else:
        scales = {name: torch.maximum(scale.sum(), torch.ones(())) for name, scale in scales.items()}
    of_soft, of_hard = of_rows * soft_weight * soft / temperature, of_rows * hard_weight * hard
    smooth = settings.get("label_smoothing", 0.0) * s.detach().softmax(-1).norm(dim=-1)
    return Truth(
        {name: getattr(terms, name).detach() for name in scales},
        scales,
        grad,
        of_soft * slack + of_hard * smooth,
        of_soft * mass + of_hard,
    )


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
            soft = soft * torch.as_tensor(settings.get("temperature", 2.0)).double() ** 2
    if labels is not None:
        valid = labels != settings.get("ignore_index", -100)
        hard = reference._share(valid.double(), settings.get("hard_count"), reduction)
    hard_weight = settings.get("hard_weight")
    return (
        soft,
        hard,
        abs(float(settings.get("soft_weight", 1.0))),
        1.0 if hard_weight is None else abs(float(hard_weight)),
    )


def _scales(student: Tensor, teacher: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """||(p + q) min(1, |r|)|| and ||p + q|| of each row; rows without a distribution count 0."""
    by = temperature.unsqueeze(-1) if temperature.dim() else temperature
    log_p, log_q = (teacher / by).log_softmax(-1), (student / by).log_softmax(-1)
    both = (log_p.exp() + log_q.exp()).nan_to_num(0.0)
    r = torch.where(both == 0, 0.0, (log_q - log_p).abs().clamp(max=1.0)).nan_to_num(0.0)
    return (both * r).norm(dim=-1), both.norm(dim=-1)


def closed_form(
    divergence: str | reference.Divergence, student: Tensor, teacher: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """D of each row and its gradient at the student's logits, float64, written from p and q with 0 log 0 = 0.

    An independent second truth: for the reference itself, and where logits are -inf and autograd gives up.
    """
    divergence = reference.as_divergence(divergence)
    p, q = ((x.double() / temperature).softmax(-1) for x in (teacher, student))
    if isinstance(divergence, reference.ForwardKL):
        return _kl(p, q), (q - p) / temperature
    if isinstance(divergence, reference.ReverseKL):
        value = _kl(q, p)
        return value, (_entropy_term(q, p) - q * value.unsqueeze(-1)) / temperature
    assert isinstance(divergence, reference.JSD)
    beta = divergence.beta
    m = beta * p + (1 - beta) * q
    gradient = (1 - beta) * (_entropy_term(q, m) - q * _kl(q, m).unsqueeze(-1)) / temperature
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m), gradient


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
        bound = LOSS_BOUND[value.dtype] * (expected.abs() + 0.1 * truth.scales[name])
        _check(name, str(value.dtype), (value.double() - expected).abs(), bound, where)


def check_gradient(actual: Tensor, truth: Truth, where: str, unit: float = 1.0) -> None:
    """A gradient stored in units of `unit`, row by row: see `gradient_bound`. Its zeros are where the truth's are."""
    assert actual.shape == truth.grad.shape, f"gradient: shape {tuple(actual.shape)}, {where}"
    bound = gradient_bound(truth, actual.dtype, unit)
    _check("gradient", str(actual.dtype), (actual.double() * unit - truth.grad).norm(dim=-1), bound, where)
    unused = (truth.grad == 0).all(-1)
    assert (actual[unused] == 0).all(), f"gradient: a row that is exactly zero is not, {where}"


def gradient_bound(truth: Truth, dtype: torch.dtype, unit: float = 1.0) -> Tensor:
    """Per row, on the norm of the error: 3e-6 ||g|| + 4 2^-24 slack, and what rounding to a half precision costs.

    SECOND_ORDER is the rounding of a rounding, which is all there is where two models agree to the last digit; in
    float64 it is what the oracle itself may be wrong by.
    """
    real = torch.float64 if dtype == torch.float64 else torch.float32
    bound = GRAD_BOUND[real] * truth.grad.norm(dim=-1) + 4 * HALF_ULP[real] * truth.slack
    bound = bound + SECOND_ORDER[real] * truth.mass
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
