"""Run as a script: prints by how much one call raises the process's peak memory, in bytes beyond its gradient.

Knows the kernel's counters in /proc; test_row_loss_memory.py runs it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import distil_fast


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def views(layout: str, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher, every page of them touched."""
    if layout == "contiguous":
        return torch.ones(rows, cols), torch.ones(rows, cols)
    if layout == "all but the last token":
        return torch.ones(2, rows // 2 + 1, cols)[:, :-1], torch.ones(2, rows // 2 + 1, cols)[:, :-1]
    if layout == "a chunk of the sequence":
        return torch.ones(2, rows, cols)[:, 1 : rows // 2 + 1], torch.ones(2, rows, cols)[:, 1 : rows // 2 + 1]
    assert layout == "padded rows", layout
    return torch.ones(rows, cols + 64)[:, :cols], torch.ones(rows, cols + 64)[:, :cols]


def main(layout: str, rows: int, cols: int, threads: int, inplace: bool) -> None:
    torch.set_num_threads(threads)
    small = torch.ones(2 * threads, 40000, requires_grad=True)  # all threads, all code
    distil_fast.distillation_loss(small, small.detach(), torch.zeros(2 * threads, dtype=torch.int64)).loss.backward()
    student, teacher = views(layout, rows, cols)
    student.requires_grad_()
    labels = torch.zeros(student.shape[:-1], dtype=torch.int64)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = resident("VmRSS")
    loss = distil_fast.distillation_loss(student, teacher, labels, temperature=3.7, inplace=inplace).loss
    loss.backward()
    gradient = 0 if inplace else student.numel() * student.element_size()
    print(resident("VmHWM") - before - gradient)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5] == "inplace")
