"""One small batch with every public function's arguments, a table of calls on it, and how two results are compared.

It knows no formula and no kernel: a call is the same for `distil_fast` and for `distil_fast.reference`.
Next: test_functional.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distil_fast import JSD, AlphaBeta, LogProbs, Probs, TopK, reference, reference_topk


class Batch(NamedTuple):
    """Arguments of the public functions; of the student's two tensors the gradient is wanted."""

    student_logits: Tensor  # [..., V]
    teacher_logits: Tensor
    labels: Tensor  # [...], -100 where there is none
    student_hidden: Tensor  # [..., H]
    teacher_hidden: Tensor
    attention_mask: Tensor  # [...] bool
    token_weights: Tensor  # [...] >= 0, some of them 0
    temperatures: Tensor  # [...] > 0


def make_batch(*leading: int, cols: int = 37, hidden: int = 24, dtype: torch.dtype = torch.float32) -> Batch:
    """A batch that every part of a call makes a difference to; the same one each time."""
    g = torch.Generator().manual_seed(20261123)

    def uniform() -> Tensor:
        return torch.rand(leading, generator=g)

    def normal(size: int, scale: float) -> Tensor:
        return (scale * torch.randn(*leading, size, generator=g, dtype=torch.float64)).to(dtype)

    labels = torch.randint(0, cols, leading, generator=g)
    return Batch(
        student_logits=normal(cols, 2.0).requires_grad_(),
        teacher_logits=normal(cols, 2.0),
        labels=labels.masked_fill(uniform() < 0.4, -100),
        student_hidden=normal(hidden, 1.0).requires_grad_(),
        teacher_hidden=normal(hidden, 1.0),
        attention_mask=uniform() < 0.8,
        token_weights=(uniform() - 0.2).clamp(min=0.0),
        temperatures=1.0 + 3.0 * uniform(),
    )


def as_double(batch: Batch) -> Batch:
    """The same numbers in float64, the gradients wanted anew."""
    return Batch(*(t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in batch))


Call = Callable[[Any, Batch], Any]  # of the package or its reference, and a batch


def topk_loss(f: Any, b: Batch, tail: str = "bucket", **settings: Any) -> Any:
    """distillation_loss with the teacher's top 5, ragged; of the reference, the function that defines it."""
    teacher = TopK.from_logits(b.teacher_logits, 5, settings.get("temperature", 2.0), tail)
    ids = teacher.ids.masked_fill((teacher.ids % 3 == 1) & (teacher.log_probs < -2.0), -1)
    if f is reference:
        return reference_topk.topk_loss(b.student_logits, ids, teacher.log_probs, b.labels, tail=tail, **settings)
    return f.distillation_loss(b.student_logits, TopK(ids, teacher.log_probs, tail), b.labels, **settings)


def _by_form(f: Any, form: type[LogProbs] | type[Probs], b: Batch, **settings: Any) -> Any:
    """A teacher that gives (log-)probabilities: an object, for the reference a name."""
    given = b.teacher_logits.log_softmax(-1) if form is LogProbs else b.teacher_logits.softmax(-1)
    if f is reference:
        name = "log_probs" if form is LogProbs else "probs"
        return f.distillation_loss(b.student_logits, given, b.labels, teacher_form=name, **settings)
    return f.distillation_loss(b.student_logits, form(given), b.labels, **settings)


def _class_weights(b: Batch, cols: int) -> Tensor:
    return torch.linspace(0.0, 2.0, cols, device=b.labels.device)


def _row_calls(reduction: str) -> dict[str, Call]:
    return {
        "distillation": lambda f, b: f.distillation_loss(
            b.student_logits, b.teacher_logits, b.labels, reduction=reduction
        ),
        "soft_alone": lambda f, b: f.distillation_loss(b.student_logits, b.teacher_logits, reduction=reduction),
        "everything": lambda f, b: f.distillation_loss(
            b.student_logits,
            b.teacher_logits,
            b.labels,
            temperature=b.temperatures,
            soft_weight=b.token_weights.new_tensor(0.25),
            hard_weight=1.7,
            soft_mask=b.token_weights,
            divergence=JSD(0.2),
            t_squared=False,
            label_smoothing=0.1,
            reduction=reduction,
        ),
        "options": lambda f, b: f.distillation_loss(
            b.student_logits,
            b.teacher_logits,
            b.labels.clamp(max=30),
            divergence=AlphaBeta(0.4, 0.5),
            class_weights=_class_weights(b, 31),
            z_loss=0.01,
            student_logit_scale=0.8,
            student_softcap=4.0,
            teacher_logit_scale=1.2,
            teacher_softcap=6.0,
            vocab_size=31,
            reduction=reduction,
        ),
        "log_probs": lambda f, b: _by_form(f, LogProbs, b, soft_mask=b.token_weights, reduction=reduction),
        "divergence": lambda f, b: f.divergence_loss(
            b.student_logits, b.teacher_logits, divergence="reverse_kl", mask=b.attention_mask, reduction=reduction
        ),
        "cross_entropy": lambda f, b: f.cross_entropy(b.student_logits, b.labels, reduction=reduction),
        "topk": lambda f, b: topk_loss(
            f,
            b,
            temperature=b.temperatures,
            soft_weight=b.token_weights.new_tensor(0.25),
            soft_mask=b.token_weights,
            label_smoothing=0.1,
            reduction=reduction,
        ),
        "cosine": lambda f, b: f.cosine_loss(b.student_hidden, b.teacher_hidden, b.attention_mask, reduction=reduction),
        "mse": lambda f, b: f.mse_loss(b.student_hidden, b.teacher_hidden, b.token_weights, reduction=reduction),
    }


CALLS: dict[str, Call] = {
    **{f"{name}-{reduction}": c for reduction in ("mean", "sum", "none") for name, c in _row_calls(reduction).items()},
    "topk-renormalise": lambda f, b: topk_loss(f, b, "renormalise", divergence="reverse_kl", hard_weight=0.5),
    "topk-ignore": lambda f, b: topk_loss(f, b, "ignore", divergence=JSD(0.2), temperature=1.0),
    "counts": lambda f, b: f.distillation_loss(
        b.student_logits, b.teacher_logits, b.labels, soft_count=11.0, hard_count=b.token_weights.new_tensor(7.0)
    ),
    "divergence-count": lambda f, b: f.divergence_loss(
        b.student_logits, b.teacher_logits, temperature=b.temperatures, mask=b.token_weights, count=3.5, t_squared=True
    ),
    "divergence-options": lambda f, b: f.divergence_loss(
        b.student_logits,
        b.teacher_logits[..., :35],
        divergence="skewed_kl",
        student_softcap=5.0,
        teacher_logit_scale=0.7,
        vocab_size=33,
    ),
    "probs": lambda f, b: _by_form(
        f, Probs, b, temperature=b.temperatures, divergence="hellinger", student_softcap=9.0
    ),
    "cross_entropy-options": lambda f, b: f.cross_entropy(
        b.student_logits,
        b.labels,
        class_weights=_class_weights(b, b.student_logits.shape[-1]),
        z_loss=0.02,
        logit_scale=1.3,
        softcap=3.0,
    ),
    "cross_entropy-smooth": lambda f, b: f.cross_entropy(b.student_logits, b.labels, count=5, label_smoothing=0.2),
    "cosine-weights": lambda f, b: f.cosine_loss(b.student_hidden, b.teacher_hidden, b.token_weights, 4.0),
    "logit_mse": lambda f, b: f.logit_mse(b.student_logits, b.teacher_logits, b.attention_mask, 4.0),
    "hidden": lambda f, b: f.hidden_loss(
        (b.student_hidden, 0.5 * b.student_hidden),
        (b.teacher_hidden, -b.teacher_hidden, b.teacher_hidden + 1.0),
        b.attention_mask,
        layer_map=[(0, 2), (1, 0), (-1, 1)],
        kind="mse",
        layer_weights=[1.0, b.token_weights.new_tensor(0.25), 2.0],
        count=7.0,
    ),
    "softmax": lambda f, b: f.softmax(b.student_logits, b.temperatures),
    "log_softmax": lambda f, b: f.log_softmax(b.student_logits, 2.5),
    "triple": lambda f, b: f.triple_loss(*b[:6]),
    "triple-everything": lambda f, b: f.triple_loss(
        *b[:6],
        temperature=b.temperatures,
        alpha_ce=0.5,
        alpha_mlm=b.token_weights.new_tensor(3.0),
        alpha_cos=b.token_weights.new_tensor(0.25),
        ce_count=13.0,
        mlm_count=b.token_weights.new_tensor(5.0),
        cos_count=17,
        restrict_ce_to_mask=True,
    ),
}


def first(out: Any) -> Tensor:
    """The loss of a loss and its terms, or what a function returns."""
    return out[0] if isinstance(out, tuple) else out


def student_field(call: str) -> str:
    """The field of a batch that a call of the table (but not triple) has its gradient in."""
    of_hidden = call.startswith(("cosine", "mse", "hidden"))
    return "student_hidden" if of_hidden else "student_logits"


class Result(NamedTuple):
    """What a call returns, and what its backward leaves behind."""

    values: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]


def run(call: Callable[[Batch], Any], batch: Batch) -> Result:
    """The values of a call on a copy of the batch, and the gradients that a generic upstream gradient gives."""
    batch = Batch(*(t.detach().clone().requires_grad_(t.requires_grad) for t in batch))
    out = call(batch)
    values = out if isinstance(out, tuple) else (out,)
    g = torch.Generator().manual_seed(1)
    values[0].backward(0.5 + torch.rand(values[0].shape, generator=g).to(values[0].dtype))
    return Result(tuple(v.detach() for v in values), tuple(t.grad for t in batch if t.grad is not None))


def error(actual: Tensor, expected: Tensor) -> float:
    """Root-mean-square error relative to `expected`; infinite where shapes differ, anything is nan, or 0 was due."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().double(), expected.detach().double()
    off, size = (actual - expected).norm().item(), expected.norm().item()
    if off == 0.0:
        return 0.0
    return off / size if off < float("inf") and size > 0.0 else float("inf")


def assert_close(actual: Result | Tensor, expected: Result | Tensor, bound: float) -> None:
    """Every value and every gradient within a relative error."""
    if isinstance(actual, Tensor):
        assert isinstance(expected, Tensor)
        assert error(actual, expected) <= bound, (actual, expected)
        return
    for mine, theirs in zip(actual, expected, strict=True):
        assert len(mine) == len(theirs)
        for a, e in zip(mine, theirs, strict=True):
            assert error(a, e) <= bound, f"relative error {error(a, e):.3g}: {a} instead of {e}"


def assert_identical(actual: Result, expected: Result) -> None:
    """Bit for bit."""
    for mine, theirs in zip(actual, expected, strict=True):
        assert len(mine) == len(theirs)
        for a, e in zip(mine, theirs, strict=True):
            assert a.dtype == e.dtype
            assert torch.equal(a, e), f"{a} instead of {e}"
