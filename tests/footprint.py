"""Run as a script: prints by how much a call raises the process's peak memory, in bytes beyond its gradient.

    footprint.py THREADS COLS LAYOUT:ROWS:(inplace|fresh)...

With one thread each case runs in a process of its own, because a thread's scratch memory stays for the next call.
Knows Linux's counters in /proc; test_row_loss_memory.py runs it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import Tensor

import distil_fast


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def pair(layout: str, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Student and teacher, every page of them touched."""
    if layout == "contiguous":
        return torch.ones(rows, cols), torch.ones(rows, cols)
    if layout == "all but the last token":
        return torch.ones(2, rows // 2 + 1, cols)[:, :-1], torch.ones(2, rows // 2 + 1, cols)[:, :-1]
    if layout == "a chunk of the sequence":
        return torch.ones(2, rows, cols)[:, 1 : rows // 2 + 1], torch.ones(2, rows, cols)[:, 1 : rows // 2 + 1]
    assert layout == "padded rows", layout
    return torch.ones(rows, cols + 64)[:, :cols], torch.ones(rows, cols + 64)[:, :cols]


def call(student: Tensor, teacher: Tensor, inplace: bool) -> int:
    """Bytes that loss and backward add to the peak beyond the gradient."""
    labels = torch.zeros(student.shape[:-1], dtype=torch.int64)
    student.requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = resident("VmRSS")
    loss = distil_fast.distillation_loss(student, teacher, labels, temperature=3.7, inplace=inplace).loss
    torch.autograd.grad(loss, student)  # not backward(), whose `.grad` is dense: torch copies rows with gaps
    gradient = 0 if inplace else student.numel() * student.element_size()
    return resident("VmHWM") - before - gradient


def measure(case: str, cols: int) -> int:
    layout, rows, how = case.split(":")
    call(*pair("contiguous", 100, 1000), how == "inplace")  # touches all code, and starts the threads
    return call(*pair(layout, int(rows), cols), how == "inplace")


def in_child(case: str, cols: int) -> int:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, str(measure(case, cols)).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return int(os.read(reader, 100))


if __name__ == "__main__":
    threads, cols = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    for case in sys.argv[3:]:
        print(case, in_child(case, cols) if threads == 1 else measure(case, cols))
