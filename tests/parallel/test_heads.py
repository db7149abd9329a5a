"""Fused heads whose weights are sharded along the vocabulary, against whole logits in float64.

The hidden states' gradient is whole on every rank, a weight's is its rank's own. Next: test_losses.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distil_fast import reference
from tests import oracle, world
from tests.parallel.sharded import COLS, WIDTHS, some_labels

# of a gradient, relative: what its own dtype is rounded to, and products in float32
BOUND = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def heads(rows: int, dtype: torch.dtype, bias: bool = True) -> dict[str, Tensor | None]:
    """Two models that are close, of different hidden sizes."""
    g = oracle.generator("heads", rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = normal(rows, 24), normal(COLS, 24) / 3.0
    return {
        "student_hidden": (hidden + 0.05 * normal(rows, 24)).to(dtype),
        "student_weight": (weight + 0.01 * normal(COLS, 24)).to(dtype),
        "student_bias": (0.1 * normal(COLS)).to(dtype) if bias else None,
        "teacher_hidden": torch.cat([hidden, normal(rows, 8)], -1).to(dtype),
        "teacher_weight": torch.cat([weight, 0.01 * normal(COLS, 8)], -1).to(dtype),
        "teacher_bias": (0.1 * normal(COLS)).to(dtype) if bias else None,
    }


class Whole:
    """The unsharded loss in float64, and its gradients."""

    def __init__(
        self, tensors: dict[str, Tensor | None], labels: Tensor | None, upstream: Tensor | None, **options: Any
    ) -> None:
        double = {name: None if x is None else x.double() for name, x in tensors.items()}
        wanted = {
            name: x.requires_grad_() for name, x in double.items() if x is not None and name.startswith("student")
        }

        def logits(model: str) -> Tensor:
            return torch.nn.functional.linear(*(double[f"{model}_{part}"] for part in ("hidden", "weight", "bias")))

        terms = reference.distillation_loss(logits("student"), logits("teacher").detach(), labels, **options)
        self.values = {name: value.detach() for name, value in terms._asdict().items()}
        upstream = None if upstream is None else upstream.double()
        grads = torch.autograd.grad(terms.loss, list(wanted.values()), upstream)
        self.grads = dict(zip(wanted, grads, strict=True))


def check_linear(
    ranks: world.World, tensors: dict[str, Tensor | None], labels: Tensor | None, upstream: Any = None, **options: Any
) -> tuple[int, int]:
    """Against float64; the hidden states' gradient is whole on every rank. Returns the numbers of all-reduces."""
    exact = Whole(
        tensors, labels, upstream, **{k: v for k, v in options.items() if k not in ("chunk_bytes", "backend")}
    )
    answers = ranks.results(world.linear_loss, WIDTHS[ranks.size], tensors, labels, upstream, options)
    dtype = tensors["student_hidden"].dtype  # type: ignore[union-attr]
    for answer in answers:
        for name, value in answer["values"].items():
            close = {"rtol": 5e-6, "atol": 5e-7} if dtype != torch.float64 else {"rtol": 1e-12, "atol": 1e-13}
            torch.testing.assert_close(value.double(), exact.values[name], **close)
        hidden = answer["grads"]["student_hidden"].double()
        assert (hidden - exact.grads["student_hidden"]).norm() <= BOUND[dtype] * exact.grads["student_hidden"].norm()
    for name in exact.grads.keys() - {"student_hidden"}:
        got = torch.cat([answer["grads"][name] for answer in answers])
        assert (got.double() - exact.grads[name]).norm() <= BOUND[got.dtype] * exact.grads[name].norm(), name
    reduces: tuple[int, int] = answers[0]["reduces"]
    return reduces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_fused_heads(ranks: world.World, dtype: torch.dtype, divergence: str) -> None:
    tensors = heads(12, dtype)
    widest = max(WIDTHS[ranks.size])
    chunk_bytes = 2 * 5 * widest * (8 if dtype == torch.float64 else 4)  # 5 rows: chunks of 5, 5, 2
    sums = 2 if divergence != "jsd" else 3
    options: dict[str, Any] = {"divergence": divergence, "hard_weight": 0.5}
    reduces = check_linear(ranks, tensors, some_labels(12), chunk_bytes=chunk_bytes, **options)
    assert reduces == (1 + 3 * sums + 1, 0)


@pytest.mark.parametrize(
    ("states", "weights"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_weights_of_another_dtype(ranks: world.World, states: torch.dtype, weights: torch.dtype) -> None:
    """Widened by tiles, they give what a copy in float32 would."""
    tensors = heads(6, torch.float64)
    mixed = {name: x if x is None else x.to(states if "hidden" in name else weights) for name, x in tensors.items()}
    check_linear(ranks, mixed, some_labels(6), hard_weight=0.5)
    check_linear(ranks, mixed, some_labels(6), torch.linspace(0.5, 1.0, 6), reduction="none")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_fused_heads_with_options(ranks: world.World, backend: str) -> None:
    tensors = heads(12, torch.float32, bias=False)
    g = oracle.generator("linear options")
    mask = torch.rand(12, generator=g) * torch.tensor([1.0, 0.0, 0.0, 1.0] * 3)
    labels = some_labels(12)
    labels[5:] = -100
    options: dict[str, Any] = {
        "soft_mask": mask,
        "temperature": 1.0 + torch.rand(12, generator=g),
        "label_smoothing": 0.1,
        "backend": backend,
    }
    check_linear(ranks, tensors, labels, **options)
    check_linear(ranks, tensors, labels, z_loss=0.01, student_softcap=3.0, teacher_softcap=3.0, **options)
    upstream = torch.rand(12, generator=g)
    reduces = check_linear(ranks, tensors, labels, upstream, reduction="none", chunk_bytes=1, **options)
    used = int(((mask != 0) | (labels != -100)).sum())
    assert used < 12
    assert reduces == (1 + 2 * used, 1)


def test_fused_heads_without_used_rows(ranks: world.World) -> None:
    tensors = heads(4, torch.float32)
    mask, labels = torch.zeros(4, dtype=torch.bool), torch.full((4,), -100)
    for answer in ranks.results(world.linear_loss, WIDTHS[ranks.size], tensors, labels, None, {"soft_mask": mask}):
        assert answer["values"]["loss"] == 0
        assert all((grad == 0).all() for grad in answer["grads"].values())


@pytest.mark.parametrize(
    ("changed", "kind", "elsewhere"),
    [
        ({"args": (torch.zeros(4, 6), torch.zeros(3, 5), None, None, torch.zeros(4).long())}, "ValueError", "raised"),
        ({"args": (torch.zeros(4, 6), None, None, None, torch.zeros(4).long())}, "TypeError", "raised"),
        ({"chunk_bytes": 0}, "ValueError", "raised"),
        ({"chunk_bytes": 999}, "RuntimeError", "dtypes"),
        ({"student_bias": torch.zeros(4)}, "ValueError", "raised"),
    ],
    ids=["hidden", "no weight", "chunk", "other chunk", "bias"],
)
def test_a_wrong_head_on_one_rank(ranks: world.World, changed: dict[str, Any], kind: str, elsewhere: str) -> None:
    good = {"args": (torch.zeros(4, 6), torch.zeros(3, 6), None, None, torch.zeros(4).long())}
    function = {"function": "vocab_parallel_linear_distillation_loss"}
    per_rank = [{**good, **function, **(changed if rank == 0 else {})} for rank in range(ranks.size)]
    answers = ranks.run(world.call, per_rank=per_rank)
    assert all(isinstance(answer, world.Failure) for answer in answers), answers
    assert answers[0].kind == kind, answers[0].trace
    assert all(elsewhere in answer.message for answer in answers[1:])
