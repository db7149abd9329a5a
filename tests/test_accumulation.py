"""Counts: micro-batches and ranks add up to the big batch, in value and in gradient, however unequal their masks.

It knows no formula. Next: test_triple_loss.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import distil_fast
from tests.batch import Batch, as_double, assert_close, first, make_batch, run

Count = float | Tensor | None
Counted = Callable[[Batch, Count, Count], Any]  # the denominators: tokens and labels

LOSSES: dict[str, Counted] = {
    "distillation": lambda b, tokens, labels: distil_fast.distillation_loss(
        b.student_logits,
        b.teacher_logits,
        b.labels,
        temperature=3.0,
        hard_weight=0.3,
        soft_mask=b.attention_mask,
        soft_count=tokens,
        hard_count=labels,
    ),
    "divergence": lambda b, tokens, labels: distil_fast.divergence_loss(
        b.student_logits, b.teacher_logits, divergence="jsd", mask=b.attention_mask, count=tokens
    ),
    "cross_entropy": lambda b, tokens, labels: distil_fast.cross_entropy(b.student_logits, b.labels, count=labels),
    "cosine": lambda b, tokens, labels: distil_fast.cosine_loss(
        b.student_hidden, b.teacher_hidden, b.attention_mask, tokens
    ),
    "hidden": lambda b, tokens, labels: distil_fast.hidden_loss(
        (b.student_hidden,), (b.teacher_hidden,), b.attention_mask, kind="mse", count=tokens
    ),
    "triple": lambda b, tokens, labels: distil_fast.triple_loss(
        *b[:6], ce_count=tokens, mlm_count=labels, cos_count=tokens
    ),
}


def parts(b: Batch) -> Iterator[Batch]:
    """Micro-batches of unequal sizes and densities, views of the big batch; the last one has nothing valid."""
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6), slice(6, 7)):
        yield Batch(*(t[rows] for t in b))


def big_batch() -> Batch:
    b = as_double(make_batch(7, 5))
    last = torch.arange(7).unsqueeze(-1) == 6
    return b._replace(labels=b.labels.masked_fill(last, -100), attention_mask=b.attention_mask & ~last)


def summed(terms: list[Any]) -> Any:
    """A loss, or a tuple of the loss and its terms, summed over the parts."""
    return tuple(map(sum, zip(*terms, strict=True))) if isinstance(terms[0], tuple) else sum(terms)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_with_the_steps_counts_are_the_big_batch(name: str, as_tensor: bool) -> None:
    loss, b = LOSSES[name], big_batch()
    counts = [b.attention_mask.sum(), (b.labels != -100).sum()]
    if not as_tensor:
        counts = [int(c) for c in counts]
    whole = run(lambda b: loss(b, *counts), b)
    assert_close(run(lambda b: summed([loss(part, *counts) for part in parts(b)]), b), whole, 1e-12)
    # and these are the denominators that the big batch has by itself
    ones = run(lambda b: loss(b, 1.0, 1.0), b)
    assert whole.values[0].isfinite()
    assert not torch.equal(whole.values[0], ones.values[0])


@pytest.mark.parametrize("name", LOSSES)
def test_backward_per_micro_batch_accumulates_in_grad(name: str) -> None:
    loss, b = LOSSES[name], big_batch()
    counts = int(b.attention_mask.sum()), int((b.labels != -100).sum())
    whole, leaves = copy(b), copy(b)
    first(loss(whole, *counts)).backward()
    for part in parts(leaves):
        first(loss(part, *counts)).backward()
    grads = [(t.grad, expected.grad) for t, expected in zip(leaves, whole, strict=True) if expected.grad is not None]
    assert grads
    for grad, expected in grads:
        assert_close(grad, expected, 1e-12)


def copy(b: Batch) -> Batch:
    return Batch(*(t.detach().clone().requires_grad_(t.requires_grad) for t in b))


@pytest.mark.parametrize("name", LOSSES)
def test_ranks_that_average_pass_the_global_count_over_the_world_size(name: str) -> None:
    """DistributedDataParallel averages the ranks' gradients, so each rank's count is the global one / world size."""
    loss, b = LOSSES[name], big_batch()
    ranks = list(parts(b))
    counts = b.attention_mask.sum(), (b.labels != -100).sum()
    world = len(ranks)

    def averaged(b: Batch) -> Any:
        total = summed([loss(rank, counts[0] / world, counts[1] / world) for rank in parts(b)])
        return tuple(t / world for t in total) if isinstance(total, tuple) else total / world

    assert_close(run(averaged, b), run(lambda b: loss(b, *counts), b), 1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_the_default_count_is_the_batchs_own(name: str) -> None:
    loss, b = LOSSES[name], big_batch()
    counts = b.attention_mask.sum(), (b.labels != -100).sum()
    assert_close(run(lambda b: loss(b, None, None), b), run(lambda b: loss(b, *counts), b), 1e-14)
