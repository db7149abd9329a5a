"""Two gloo processes that train the toy: each runs the functions that a test names, and results return.

The environment is what torchrun sets, so that accelerate finds its way as it does there. Next: test_distributed.py.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

PATIENCE = 100.0  # seconds for one answer


class Ranks:
    """`size` processes that live until `close`."""

    def __init__(self, size: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(there, rank, size, port), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What function(*args) returns on each rank; a test fails where one raises or hangs."""
        for pipe in self.pipes:
            pipe.send((function.__name__, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(PATIENCE), f"rank {rank} hangs in {function.__name__}"
            succeeded, answer = pipe.recv()
            assert succeeded, answer
            answers.append(answer)
        return answers

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5.0)
            process.kill()


def _serve(pipe: Any, rank: int, size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            break
        try:
            answer = True, globals()[name](*args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
    os._exit(0)  # the process group has nothing left to say


# ------------------------------------------------------------------------------------------------ on the ranks


def train(output: Path, parallel: str, batches: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Train the toy on this rank's share of masked batches; weights and losses, and what was printed."""
    from distil_fast.training.trainer import Trainer
    from tests.training.toy import AsItIs, Given, ToyObjective, toy_config

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    objective = ToyObjective(seed=rank)  # the first rank's weights count
    reports: list[Any] = []
    saved: list[Path] = []
    words = io.StringIO()
    with redirect_stdout(words), redirect_stderr(words):
        trainer = Trainer(
            objective,
            Given(batches[rank::size]),
            AsItIs(),
            toy_config(output, parallel=parallel, dropout=False, **changes),
            evaluate=lambda o: {"norm": o.student(*batches[0][:2]).norm().item()},
            report=reports.append,
            save_student=lambda path: (saved.append(path), torch.save(objective.student.state_dict(), path))[0],
        )
        reductions = _counted(trainer.model)
        sharded = {type(p).__name__ for p in objective.parameters()}
        history = trainer.fit()
    return {
        "weights": {name: t.detach().clone() for name, t in objective.state_dict().items()},
        "tied": objective.student.decoder.weight is objective.student.embedding.weight,
        "rows": history.rows,
        "evaluations": history.evaluations,
        "reports": len(reports),
        "saved": len(saved),
        "words": words.getvalue(),
        "sharded": sharded,
        "reductions": reductions[0],
    }


def _counted(model: Any) -> list[int]:
    """A count, to come, of the buckets of gradients that the ranks exchange."""
    count = [0]
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):

        def hook(group, bucket):  # type: ignore[no-untyped-def]  # DDP looks at annotations
            count[0] += 1
            return allreduce_hook(group, bucket)

        model.register_comm_hook(None, hook)
    else:

        def reduced(gradients: torch.Tensor) -> None:  # called after the reduce-scatter
            count[0] += 1

        model.set_all_reduce_hook(reduced)
    return count


def train_to_a_fault(output: Path, parallel: str, batches: Any, changes: dict[str, Any], bad: int) -> Any:
    """As `train`, where the second rank's loss is nan in one micro-batch."""
    from distil_fast.training import health
    from tests.training import toy

    plain = toy.ToyObjective.forward
    calls = 0

    def broken(self: Any, batch: Any, counts: Any) -> Any:
        nonlocal calls
        calls += 1
        loss, terms = plain(self, batch, counts)
        return (loss, terms * float("nan")) if calls == bad and os.environ["RANK"] == "1" else (loss, terms)

    toy.ToyObjective.forward = broken  # type: ignore[method-assign]
    try:
        return train(output, parallel, batches, changes)
    except health.NonFiniteLoss as error:
        return str(error)
    finally:
        toy.ToyObjective.forward = plain  # type: ignore[method-assign]


def train_until_told(output: Path, parallel: str, batches: Any, changes: dict[str, Any], when: int) -> Any:
    """As `train`, where only the second rank gets a SIGTERM."""
    from distil_fast.training import interrupt
    from tests.training import toy

    plain = toy.Given.__next__
    calls = 0

    def signalled(self: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == when and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)
        return plain(self)

    toy.Given.__next__ = signalled  # type: ignore[method-assign]
    try:
        return train(output, parallel, batches, changes)
    except interrupt.Interrupted as stopped:
        return stopped.step, str(stopped.checkpoint)
    finally:
        toy.Given.__next__ = plain  # type: ignore[method-assign]


def complaint(output: Path, parallel: str, batches: Any, changes: dict[str, Any]) -> str:
    """What `train` says against its input."""
    from distil_fast.training.settings import InputError

    try:
        train(output, parallel, batches, changes)
    except InputError as error:
        return str(error)
    return ""


def call(module: str, function: str, *args: Any) -> Any:
    """A function of any module, such as a test's own file."""
    return getattr(importlib.import_module(module), function)(*args)
