"""Worlds of gloo processes, started once: each rank runs the function that a test names, and results return.

A rank that neither answers nor fails in time is a hang, which ends the world and fails the test. It knows no loss but
by the functions below, which run on the ranks. Next: parallel/test_losses.py, which says what is right.
"""

from __future__ import annotations

import datetime
import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = 60.0  # seconds for one answer; a machine under load needs a few


def _pack(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


@dataclass
class Failure:
    """What a rank raised."""

    kind: str
    message: str
    trace: str = field(repr=False)


class World:
    """`size` processes in one process group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        spawn = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = spawn.Pipe()
            store = str(Path(self.folder.name) / "store")
            process = spawn.Process(target=_serve, args=(there, rank, size, store), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, per_rank: Sequence[dict[str, Any]] | None = None) -> Any:
        """Each rank's result, or Failure, of function(rank, *args, **its own arguments)."""
        for rank, pipe in enumerate(self.pipes):
            pipe.send_bytes(_pack((function.__name__, args, per_rank[rank] if per_rank else {})))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(PATIENCE):
                self.close()
                raise AssertionError(f"rank {rank} of {self.size} hangs in {function.__name__}")
            answers.append(_unpack(pipe.recv_bytes()))
        return answers

    def results(self, function: Callable[..., Any], *args: Any, per_rank: Any = None) -> list[Any]:
        """As `run`, where every rank must succeed."""
        answers = self.run(function, *args, per_rank=per_rank)
        for answer in answers:
            assert not isinstance(answer, Failure), answer.trace
        return list(answers)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()
        self.folder.cleanup()


_reduces = 0  # all-reduces of this process


def _serve(pipe: Any, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    patience = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=patience)
    plain = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        global _reduces
        _reduces += 1
        return plain(*args, **kwargs)

    dist.all_reduce = counted
    try:
        while True:
            name, args, own = _unpack(pipe.recv_bytes())
            try:
                answer: Any = globals()[name](rank, *args, **own)
            except Exception as error:
                answer = Failure(type(error).__name__, str(error), traceback.format_exc())
            pipe.send_bytes(_pack(answer))
    except EOFError:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ on the ranks


def columns(values: Tensor, widths: Sequence[int], rank: int) -> Tensor:
    """A rank's columns, in memory of their own."""
    return values.split(list(widths), -1)[rank].clone()


def logits_loss(
    rank: int,
    widths: Sequence[int],
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    upstream: Tensor | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Loss, terms, the gradient of this rank's columns, and the all-reduces of forward and backward."""
    from distil_fast import vocab_parallel_distillation_loss

    student = columns(student, widths, rank).requires_grad_()
    teacher = None if teacher is None else columns(teacher, widths, rank)
    before = _reduces
    terms = vocab_parallel_distillation_loss(student, teacher, labels, **options)
    forward = _reduces
    (grad,) = torch.autograd.grad(terms.loss, student, upstream)
    values = {name: value.detach() for name, value in terms._asdict().items()}
    return {"values": values, "grad": grad, "reduces": (forward - before, _reduces - forward)}


def linear_loss(
    rank: int,
    widths: Sequence[int],
    tensors: dict[str, Tensor | None],
    labels: Tensor | None,
    upstream: Tensor | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The same of hidden states and heads; `tensors` are whole ones, by their arguments' names."""
    from distil_fast import vocab_parallel_linear_distillation_loss

    own = {
        name: x if x is None or name.endswith("hidden") else x.split(list(widths), 0)[rank].clone()
        for name, x in tensors.items()
    }
    wanted = {name: x.requires_grad_() for name, x in own.items() if name.startswith("student") and x is not None}
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    biases = {name: own.get(name) for name in ("student_bias", "teacher_bias")}
    before = _reduces
    terms = vocab_parallel_linear_distillation_loss(*(own[name] for name in names), labels, **biases, **options)
    forward = _reduces
    grads = torch.autograd.grad(terms.loss, list(wanted.values()), upstream)
    values = {name: value.detach() for name, value in terms._asdict().items()}
    reduces = forward - before, _reduces - forward
    return {"values": values, "grads": dict(zip(wanted, grads, strict=True)), "reduces": reduces}


def call(
    rank: int, *, function: str = "vocab_parallel_distillation_loss", args: tuple[Any, ...], **options: Any
) -> Any:
    """Any public function with this rank's own arguments; the detached loss."""
    import distil_fast

    out = getattr(distil_fast, function)(*args, **options)
    return (out[0] if isinstance(out, tuple) else out).detach()


def module_loss(rank: int, name: str, settings: dict[str, Any], args: tuple[Any, ...], widths: Sequence[int]) -> Tensor:
    """A module's loss; of `args` the two-dimensional ones are sharded."""
    import distil_fast

    own = [columns(x, widths, rank) if isinstance(x, Tensor) and x.dim() == 2 else x for x in args]
    out = getattr(distil_fast, name)(**settings)(*own)
    return out[0] if isinstance(out, tuple) else out


def twice(rank: int, widths: Sequence[int], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, str]:
    """The gradients of two backwards through one graph, and what a second derivative says."""
    from distil_fast import vocab_parallel_divergence_loss

    student = columns(student, widths, rank).requires_grad_()
    loss = vocab_parallel_divergence_loss(student, columns(teacher, widths, rank))
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(loss, student, create_graph=True)
    try:
        second.sum().backward()
    except RuntimeError as error:
        return first, second.detach(), str(error)
    return first, second.detach(), ""


def compiled(rank: int, widths: Sequence[int], student: Tensor, teacher: Tensor, fullgraph: bool) -> Tensor:
    """The loss of a function that torch.compile has seen."""
    from distil_fast import vocab_parallel_divergence_loss

    def step(s: Tensor, t: Tensor) -> Tensor:
        return 2.0 * vocab_parallel_divergence_loss(s + 1.0, t)

    torch.compiler.reset()
    whole = torch.compile(step, fullgraph=fullgraph, backend="eager")
    out: Tensor = whole(columns(student, widths, rank), columns(teacher, widths, rank))
    return out


def in_a_part(rank: int, student: Tensor, teacher: Tensor) -> Any:
    """The loss in a group of the first two ranks; the others are not part of it."""
    from distil_fast import vocab_parallel_divergence_loss

    group = dist.new_group([0, 1])
    if rank > 1:
        try:
            return vocab_parallel_divergence_loss(student, teacher, group=group)
        except ValueError as error:
            return str(error)
    widths = (1, student.shape[-1] - 1)
    return vocab_parallel_divergence_loss(columns(student, widths, rank), columns(teacher, widths, rank), group=group)
