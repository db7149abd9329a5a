"""What the ranks of a process group tell each other: that all is well, that they were called alike, and sums.

The first all-reduce of a call has the same size on every rank whatever was passed, so that a rank whose arguments are
wrong takes part in it too: then all ranks raise, and none waits for another. It knows no formula. Next: rows.py, which
says what is summed.
"""

from __future__ import annotations

import contextlib
import zlib
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

FLOOR = 1 << 13  # doubles of the first all-reduce, at least: ranks with different row counts still meet
LOWEST = float("-inf")


class RankError(RuntimeError):
    """Another rank of the group could not do its part."""


class Place(NamedTuple):
    """A rank's columns in the vocabulary."""

    offset: int
    width: int
    vocabulary: int
    widest: int


class Ranks(NamedTuple):
    """A process group, and this process's rank in it."""

    group: dist.ProcessGroup | None
    rank: int
    size: int


def ranks_of(group: dist.ProcessGroup | None) -> Ranks:
    """The group, by default that of all processes.

    Raises:
        RuntimeError: there is no process group.
        ValueError: this process is not in the group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "expected an initialised process group, got none. Call torch.distributed.init_process_group() first; "
            "without shards use distil_fast.distillation_loss."
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: expected a process group that this process is part of, got one that it is not.")
    return Ranks(group, rank, dist.get_world_size(group))


def checksum(tensor: Tensor | None) -> int:
    """52 bits of a tensor's values, the same on every rank that has the same values; 0 for None."""
    if tensor is None:
        return 0
    values = tensor.detach().flatten()
    bits = values.long() if not values.is_floating_point() else values.double().view(torch.int64)
    bits = (bits ^ (bits >> 31)) * 0x5851F42D4C957F2D
    bits = (bits ^ (bits >> 29)) * (2 * torch.arange(len(bits), device=bits.device) + 1)
    return int(bits.sum()) & ((1 << 52) - 1)


def digest(value: object) -> int:
    """32 bits of a plain value, the same in every process (hash() is not)."""
    return zlib.crc32(repr(value).encode())


def agree(ranks: Ranks, known: dict[str, int], width: int, maxima: Tensor) -> tuple[Place, Tensor]:
    """One all-reduce (MAX): whether every rank is well and was given the same facts; where its columns lie; and the
    largest of all ranks' maxima, shaped as they are.

    Raises:
        RuntimeError: another rank has an error; or facts that differ, named.
    """
    header = [0.0, *(x for fact in known.values() for x in (fact, -fact)), *_widths(ranks, width)]
    agreed, largest = _meet(ranks, header, maxima)
    for index, name in enumerate(known):
        if agreed[2 * index] != -agreed[2 * index + 1]:
            raise RuntimeError(
                f"expected the same {name} on every rank of the group, got different ones. Pass each rank its own "
                "shard of the logits or weights, and all else alike."
            )
    widths = [int(x) for x in agreed[2 * len(known) :]]
    return Place(sum(widths[: ranks.rank]), width, sum(widths), max(widths)), largest


def withdraw(ranks: Ranks, error: Exception, rows: int, device: torch.device) -> NoReturn:
    """Take part in the others' `agree` with an error, and raise it; rows: those of the maxima that they may have."""
    header = [ranks.rank + 1.0, *(LOWEST for _ in range(2 * len(FACTS))), *_widths(ranks, 0)]
    with contextlib.suppress(RankError):
        _meet(ranks, header, torch.full((rows, 2), LOWEST, dtype=torch.float64, device=device))
    raise error


def _widths(ranks: Ranks, width: int) -> list[float]:
    return [float(width) if rank == ranks.rank else 0.0 for rank in range(ranks.size)]


def _meet(ranks: Ranks, header: list[float], maxima: Tensor) -> tuple[list[float], Tensor]:
    """The all-reduce: behind a header, whose first entry is a rank at fault + 1, come maxima [rows, 2]."""
    start, end = len(header), len(header) + maxima.numel()
    size = max(FLOOR, 1 << (end - 1).bit_length())
    message = torch.full((size,), LOWEST, dtype=torch.float64, device=maxima.device)
    message[:start] = torch.tensor(header, dtype=torch.float64)
    message[start:end] = maxima.flatten()
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=ranks.group)
    faulty, *agreed = message[:start].tolist()
    _check(int(faulty))
    return agreed, message[start:end].view_as(maxima)


FACTS = ("leading shapes", "dtypes and devices", "options", "labels", "masks", "temperatures")


def facts(*values: int) -> dict[str, int]:
    """The facts of a call, in the order of FACTS."""
    return dict(zip(FACTS, values, strict=True))


def largest(ranks: Ranks, maxima: Tensor) -> Tensor:
    """One all-reduce (MAX) of maxima whose shape the ranks agree on.

    Raises:
        RankError: another rank has failed.
    """
    return _largest(ranks, maxima, 0.0)


def give_up(ranks: Ranks, error: Exception, maxima: Tensor) -> NoReturn:
    """Take part in the others' `largest` with an error, and raise it; of the maxima only the shape matters."""
    with contextlib.suppress(RankError):
        _largest(ranks, maxima, ranks.rank + 1.0)
    raise error


def _largest(ranks: Ranks, maxima: Tensor, fault: float) -> Tensor:
    message = torch.cat([maxima.new_tensor([fault]), maxima.flatten()])
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=ranks.group)
    _check(int(message[0].item()))
    return message[1:].view_as(maxima)


def _check(faulty: int) -> None:
    if faulty:
        raise RankError(f"rank {faulty - 1} of the group raised an error, which it reports itself; no loss was made.")


def total(ranks: Ranks, values: Tensor) -> Tensor:
    """One all-reduce (SUM), in place; none where there is nothing to sum."""
    if values.numel():
        dist.all_reduce(values, op=dist.ReduceOp.SUM, group=ranks.group)
    return values
