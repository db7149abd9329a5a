"""A call over shards, and the fp64 truth that it is held to: what the tests of this folder share.

It knows no process. Next: conftest.py, the worlds; test_losses.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests import oracle, world

WIDTHS = {2: (2101, 37), 3: (1, 1500, 637)}  # more than one block, less than a vector, one column
COLS = 2138


def pair(kind: str, rows: int, *seed: object, cols: int = COLS) -> tuple[Tensor, Tensor]:
    return oracle.logit_pair(kind, rows, cols, oracle.generator(kind, rows, cols, *seed))


def some_labels(rows: int, cols: int = COLS) -> Tensor:
    """On every shard, and one row without."""
    g = oracle.generator("labels", rows, cols)
    labels = torch.randint(0, cols, (rows,), generator=g)
    labels[:4] = torch.tensor([0, cols - 1, -100, cols // 2])[:rows]
    return labels


class Sharded:
    """A call's values, alike on every rank, and the whole gradient."""

    def __init__(self, ranks: world.World, student: Tensor, teacher: Tensor | None, *args: Any, **options: Any) -> None:
        labels, upstream = (*args, None, None)[:2]
        widths = options.pop("widths", WIDTHS[ranks.size])
        answers = ranks.results(world.logits_loss, widths, student, teacher, labels, upstream, options)
        self.values, self.reduces = answers[0]["values"], answers[0]["reduces"]
        for answer in answers[1:]:
            for name, value in self.values.items():
                assert torch.equal(value.nan_to_num(7.0), answer["values"][name].nan_to_num(7.0)), name
        self.grad = torch.cat([answer["grad"] for answer in answers], -1)


def check(ranks: world.World, student: Tensor, teacher: Tensor | None, *args: Any, **options: Any) -> Sharded:
    """Against the oracle's bounds."""
    exact = {name: x for name, x in options.items() if name not in ("backend", "widths")}
    truth = oracle.exact(student, teacher, *args, **exact)
    got = Sharded(ranks, student, teacher, *args, **options)
    where = f"{student.dtype} {tuple(student.shape)} {options}"
    oracle.check_values(got.values, truth, where)
    oracle.check_gradient(got.grad, truth, where)
    return got
