"""Run as a script: the kernels on memory between pages that cannot be touched. Reading or writing one byte too many,
or a row that no term uses, ends the process with SIGSEGV. Knows mmap and mprotect; test_row_loss_memory.py runs it.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys

import torch  # before distil_fast, as in every program
from torch import Tensor

import distil_fast
from distil_fast import _C
from distil_fast.backends.layout import real_dtype
from distil_fast.backends.settings import TAILS

PAGE = mmap.PAGESIZE
PROT_NONE, PROT_READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
libc = ctypes.CDLL(None, use_errno=True)
kept: list[mmap.mmap] = []  # for as long as the tensors on them


def protect(address: int, size: int, access: int = PROT_NONE) -> None:
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), access):
        raise OSError(ctypes.get_errno(), "mprotect")


def pages(size: int) -> tuple[mmap.mmap, int]:
    """Anonymous memory of whole pages between two that cannot be touched, and where it begins."""
    whole = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, whole + 2 * PAGE)
    kept.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + PAGE
    protect(start - PAGE, PAGE)
    protect(start + whole, PAGE)
    return memory, start


def guarded(values: Tensor, at_end: bool) -> Tensor:
    """A copy that touches the forbidden page at its end or at its beginning."""
    size = values.numel() * values.element_size()
    memory, _ = pages(size)
    offset = PAGE + (-size % PAGE if at_end else 0)
    copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset).view(values.shape)
    copy.copy_(values)
    return copy


def forbid_rows(values: Tensor, rows: list[int]) -> Tensor:
    """A copy whose rows lie on pages of their own, some of which can then not be touched."""
    cols = values.shape[-1]
    stride = -(-cols * values.element_size() // PAGE) * PAGE
    memory, start = pages(stride * values.shape[0])
    flat = torch.frombuffer(
        memory, dtype=values.dtype, count=stride // values.element_size() * values.shape[0], offset=PAGE
    )
    copy = flat.view(values.shape[0], -1)[:, :cols]
    copy.copy_(values)
    for row in rows:
        protect(start + row * stride, stride)
    return copy


def edges() -> None:
    """Every sweep of every instruction set on rows that end, and on rows that begin, at a forbidden page."""
    mixes = [*itertools.product((torch.float32, torch.bfloat16, torch.float16), repeat=2), (torch.float64,) * 2]
    for (s_dtype, t_dtype), cols, at_end in itertools.product(mixes, (1, 7, 15, 16, 33, 2049), (True, False)):
        student, teacher = (guarded(torch.randn(2, cols, dtype=d), at_end) for d in (s_dtype, t_dtype))
        labels = guarded(torch.tensor([0, cols - 1]), at_end)
        mask, temperature = (guarded(torch.tensor([1.0, 0.5], dtype=real_dtype(student)), at_end) for _ in range(2))
        for kind in (temperature, 2.0, 1.0):
            x = student.clone().requires_grad_()
            distil_fast.distillation_loss(
                x, teacher, labels, soft_mask=mask, temperature=kind, label_smoothing=0.1
            ).loss.backward()
            target = guarded(student, at_end).requires_grad_()  # the gradient's memory, too
            distil_fast.distillation_loss(
                target, teacher, labels, soft_mask=mask, temperature=kind, label_smoothing=0.1, inplace=True
            ).loss.backward(torch.tensor(0.5, dtype=mask.dtype))
            distil_fast.cross_entropy(guarded(student, at_end), labels)
        for function in (distil_fast.softmax, distil_fast.log_softmax):
            function(student, temperature)
        for function in (distil_fast.cosine_loss, distil_fast.mse_loss, distil_fast.logit_mse):
            function(guarded(student, at_end).requires_grad_(), teacher, mask).backward()
        kept.clear()


def unused() -> None:
    """Row 1 has no label and row 2 no soft term; row 3 has neither, and its logits cannot be touched."""
    torch.manual_seed(0)
    for cols, reduction in itertools.product((700, 5000, 40000), ("mean", "sum", "none")):
        values = torch.randn(5, cols)
        student, teacher = forbid_rows(values, [3]), forbid_rows(values, [2, 3])
        labels = torch.tensor([1, -100, 2, -100, 3])
        for mask in (torch.tensor([True, True, False, False, True]), torch.tensor([0.5, 1.0, 0.0, 0.0, 2.0])):
            x = student.requires_grad_()
            loss = distil_fast.distillation_loss(x, teacher, labels, soft_mask=mask, reduction=reduction).loss
            (grad,) = torch.autograd.grad(loss.sum(), x)
            assert loss.isfinite().all()
            assert grad.isfinite().all()
            assert not grad[3].any()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        hidden, target = (forbid_rows(torch.randn(5, 700).to(dtype), [3]) for _ in range(2))
        for function in (distil_fast.cosine_loss, distil_fast.mse_loss):
            loss = function(hidden.requires_grad_(), target, torch.tensor([True, True, True, False, True]))
            assert not torch.autograd.grad(loss, hidden)[0][3].any()
    kept.clear()


def top_k() -> None:
    """Rows of logits, ids and log-probabilities between forbidden pages; unused rows, and all but k logits, unread."""
    for dtype, cols, at_end in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16, torch.float64), (1, 7, 16, 33, 2049), (True, False)
    ):
        k = min(cols, 5)
        ids = guarded(torch.stack([torch.randperm(cols)[:k] for _ in range(2)]), at_end)
        log_probs = guarded(torch.full((2, k), 0.9 / k, dtype=real_dtype(torch.empty(0, dtype=dtype))).log(), at_end)
        labels = guarded(torch.tensor([0, cols - 1]), at_end)
        for tail, temperature, hard in itertools.product(TAILS, (1.0, 2.0, 3.7), (None, labels)):
            student = guarded(torch.randn(2, cols, dtype=dtype), at_end).requires_grad_()
            teacher = distil_fast.TopK(ids, log_probs, tail)
            terms = distil_fast.distillation_loss(student, teacher, hard, temperature=temperature, inplace=True)
            torch.autograd.grad(terms.loss, student)
    ids, log_probs = torch.tensor([[3, 1], [9, 9], [0, 2]]), torch.tensor([[0.5, 0.2]] * 3).log()
    mask, labels = torch.tensor([True, False, True]), torch.tensor([-100, 699, -100])
    for tail in TAILS:
        student = forbid_rows(torch.randn(3, 700), [1]).requires_grad_()
        teacher = distil_fast.TopK(ids, log_probs, tail)
        assert not torch.autograd.grad(distil_fast.divergence_loss(student, teacher, mask=mask), student)[0][1].any()
        only_hard = forbid_rows(torch.randn(3, 700), [0, 2]).requires_grad_()
        terms = distil_fast.distillation_loss(only_hard, teacher, labels, soft_weight=0.0)
        assert torch.autograd.grad(terms.loss, only_hard)[0][1].any()
    far = forbid_rows(torch.randn(1, 4 * PAGE), [])
    columns = torch.tensor([[5, 4 * PAGE - 2]])
    protect(far.data_ptr() + PAGE * 4, PAGE * 4)  # between the two columns
    teacher = distil_fast.TopK(columns, torch.tensor([[0.5, 0.2]]).log(), "renormalise")
    assert distil_fast.divergence_loss(far, teacher).isfinite()
    kept.clear()


def weightless() -> None:
    """A term of weight 0 reads nothing: neither its logits, nor its labels, nor its mask."""
    rows, cols = 3, 700
    student = torch.randn(rows, cols).requires_grad_()
    teacher = forbid_rows(torch.randn(rows, cols), [0, 1, 2])
    labels, mask = (forbid_rows(x[None], [0])[0] for x in (torch.zeros(rows, dtype=torch.int64), torch.ones(rows)))
    hard = distil_fast.distillation_loss(student, teacher, torch.tensor([1, 2, 3]), soft_weight=0.0, soft_mask=mask)
    soft = distil_fast.distillation_loss(student, torch.randn(rows, cols), labels, hard_weight=torch.tensor(0.0))
    assert torch.autograd.grad(hard.loss + soft.loss, student)[0].isfinite().all()
    for settings in ({"soft_count": 0, "hard_count": 0}, {"soft_weight": 0.0, "hard_weight": 0.0}):
        nothing = distil_fast.distillation_loss(
            teacher.requires_grad_(), teacher.detach(), torch.zeros(3).long(), **settings
        )
        assert nothing.loss == 0
        assert not torch.autograd.grad(nothing.loss, teacher)[0].any()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if not _C.use_instruction_set(sys.argv[1]):
        sys.exit(f"this processor lacks {sys.argv[1]}")
    edges()
    unused()
    weightless()
    top_k()
    print("untouched")
