"""The fused linear losses under data parallelism, in one world of two gloo processes: DDP, FSDP2, and a stray DTensor.

It knows no formula: what one process computes from the whole batch is the truth. Next: test_linear.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distil_fast import linear_distillation_loss

ROOT = Path(__file__).parent.parent
WORLD, ROWS, WIDTH, V = 2, 12, 8, 101


class Model(nn.Module):
    """A body, a head, and the loss inside the forward: where the wrapper sees it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, V)

    def forward(self, x: Tensor, teacher: tuple[Tensor, Tensor], labels: Tensor, counts: float) -> Tensor:
        return linear_distillation_loss(
            self.body(x),
            self.head.weight,
            *teacher,
            labels,
            student_bias=self.head.bias,
            soft_count=counts,
            hard_count=counts,
        ).loss


def batch() -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, WIDTH, generator=g)
    teacher = torch.randn(ROWS, WIDTH, generator=g), torch.randn(V, WIDTH, generator=g)
    return x, teacher, torch.randint(0, V, (ROWS,), generator=g)


def check(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Averaged over ranks, the gradients are the whole batch's; counts: the global ones over the world's size."""
    x, (hidden, head), labels = batch()
    mine = slice(dist.get_rank(), None, WORLD)
    model(x[mine], (hidden[mine], head), labels[mine], ROWS / WORLD).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        torch.testing.assert_close(grad, expected[name.removeprefix("module.")], rtol=1e-5, atol=1e-7)


def work() -> None:
    """What each of the processes does."""
    dist.init_process_group("gloo")
    whole = Model()
    whole(*batch(), float(ROWS)).backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.grad is not None}
    check(nn.parallel.DistributedDataParallel(Model()), expected)

    from torch.distributed.fsdp import fully_shard

    sharded = Model()
    fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (WORLD,)))
    check(sharded, expected)
    x, teacher, labels = batch()
    with pytest.raises(TypeError, match=r"student_weight: expected a plain tensor, got a DTensor.*full_tensor"):
        linear_distillation_loss(x, sharded.head.weight, *teacher, labels)
    dist.destroy_process_group()
    print("all is well")


def test_ddp_and_fsdp2() -> None:
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "WORLD_SIZE": str(WORLD)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.test_linear_distributed"]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert all("all is well" in text for text in said), said


if __name__ == "__main__":
    work()
