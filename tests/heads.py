"""Both models' heads for the tests of the fused losses: drawn, put through a loss, and compared with the fp64 truth.

The truth is reference.py's in float64 on the same numbers; bounds follow from what the products and the gradients are
rounded to. It knows nothing of single kernels. Next: test_linear.py; oracle.py, which judges the rows themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import distil_fast
from distil_fast import reference
from tests.calls import there

ROWS, WIDTH, TEACHER_WIDTH, V = 37, 24, 40, 503
# of each gradient, relative: products in float32 and, in a half precision, the rounding of gradients on their way
BOUND = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
DTYPES = list(BOUND)


class Heads(NamedTuple):
    """Both models' hidden states, weights and biases, with labels and masks."""

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor
    labels: Tensor
    mask: Tensor

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.student_hidden, self.student_weight, self.student_bias

    def loss(self, module: Any = distil_fast, **how: Any) -> Any:
        """The loss of everything; `how` replaces or adds arguments."""
        labels = how.pop("labels", self.labels)
        heads = self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight
        biases = {"student_bias": self.student_bias, "teacher_bias": self.teacher_bias}
        return module.linear_distillation_loss(*heads, labels, **{"soft_mask": self.mask, **biases, **how})

    def exact(self) -> Heads:
        """The same numbers in float64, as leaves."""
        return Heads(*(x.detach().double().cpu() if x.is_floating_point() else x.cpu() for x in self)).wanting()

    def wanting(self) -> Heads:
        """The same, with gradients wanted."""
        return Heads(*(x.detach().requires_grad_() for x in self[:3]), *self[3:])


def make(dtype: torch.dtype, *leading: int, seed: int = 0) -> Heads:
    leading = leading or (ROWS,)
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return there((scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype))

    labels = torch.randint(0, V, leading, generator=g)
    mask = torch.rand(leading, generator=g) < 0.6
    labels = labels.masked_fill(torch.rand(leading, generator=g) < 0.6, -100)
    mask.flatten()[5:6], labels.flatten()[5:6] = False, -100  # a row that nothing uses
    mask.flatten()[4:5], labels.flatten()[3:4] = True, 3
    return Heads(
        normal(*leading, WIDTH),
        normal(V, WIDTH, scale=0.4),
        normal(V, scale=0.5),
        normal(*leading, TEACHER_WIDTH),
        normal(V, TEACHER_WIDTH, scale=0.3),
        normal(V, scale=0.5),
        there(labels),
        there(mask),
    ).wanting()


def off(actual: Tensor, expected: Tensor) -> float:
    """The error relative to what is expected, infinite where anything is nan or 0 was due."""
    assert actual.shape == expected.shape
    error = (actual.detach().cpu().double() - expected.double()).norm().item()
    size = expected.double().norm().item()
    return 0.0 if error == 0.0 else error / size if size and error < float("inf") else float("inf")


def check(heads: Heads, bound: float, **how: Any) -> Any:
    """Values and gradients against the truth; chunk_bytes, precision and gather are ours alone."""
    ours = heads.loss(**how)
    settings = {k: v for k, v in how.items() if k not in ("chunk_bytes", "precision", "gather", "backend")}
    exact = heads.exact()
    truth = exact.loss(reference, **{"labels": exact.labels, **settings})
    for name in ("loss", "soft", "hard"):
        assert off(getattr(ours, name), getattr(truth, name)) <= max(2e-6, bound * 1e-3), name
    upstream = torch.rand(truth.loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    grads = torch.autograd.grad(ours.loss, heads.leaves(), there(upstream.to(ours.loss.dtype)))
    for mine, theirs, leaf in zip(
        grads, torch.autograd.grad(truth.loss, exact.leaves(), upstream), heads.leaves(), strict=True
    ):
        assert mine.dtype == leaf.dtype
        assert off(mine, theirs) <= bound
    return ours
