"""What the row losses read and write, and in what memory: layouts, threads, canaries, unused rows, 2^31 elements.

Two scripts run in processes of their own: guarded.py (pages that cannot be touched), footprint.py (peak memory).
Next: test_softmax.py and test_cosine.py, the other kernels.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distil_fast
from distil_fast.backends import native
from distil_fast.backends.buffers import WORTH_KEEPING
from distil_fast.backends.layout import real_dtype
from tests import calls, oracle

HERE = Path(__file__).parent
BATCH, TOKENS, SIZE = 3, 4, 77
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def run_script(name: str, *arguments: object) -> str:
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode == 1 and "this processor lacks" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, f"{name} {arguments}: exit status {done.returncode}\n{done.stderr}"
    return done.stdout


# ------------------------------------------------------------------------------------------------ layouts
# Each makes, in a larger tensor full of canaries, a view of shape [BATCH, TOKENS, SIZE] (or what it says).


def canaries(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "one element off": lambda d: canaries(BATCH * TOKENS * SIZE + 2, dtype=d)[1:-1].view(BATCH, TOKENS, SIZE),
    "padded rows": lambda d: canaries(BATCH, TOKENS, SIZE + 5, dtype=d)[..., :SIZE],
    "padded rows, odd start": lambda d: canaries(BATCH, TOKENS, SIZE + 5, dtype=d)[..., 3 : SIZE + 3],
    "all but the last token": lambda d: canaries(BATCH, TOKENS + 1, SIZE, dtype=d)[:, :-1],
    "all but the first token": lambda d: canaries(BATCH, TOKENS + 1, SIZE, dtype=d)[:, 1:],
    "a chunk of the sequence": lambda d: canaries(BATCH, TOKENS + 7, SIZE + 2, dtype=d)[:, 3 : TOKENS + 3, :SIZE],
    "every second token": lambda d: canaries(BATCH, 2 * TOKENS, SIZE, dtype=d)[:, ::2],
    "tokens before batch": lambda d: canaries(TOKENS, BATCH, SIZE + 1, dtype=d)[..., 1:].transpose(0, 1),
    "rows alone": lambda d: canaries(BATCH * TOKENS, SIZE + 3, dtype=d)[:, :SIZE],
    "four dimensions": lambda d: canaries(BATCH, 2, TOKENS // 2, SIZE + 3, dtype=d)[..., :SIZE],
    "five dimensions": lambda d: canaries(1, BATCH, 2, TOKENS // 2 + 1, SIZE, dtype=d)[:, :, :, :-1],
    "one row": lambda d: canaries(SIZE + 9, dtype=d)[4 : SIZE + 4],
}


def bits(tensor: Tensor) -> Tensor:
    """All of a tensor's storage, so that nan equals nan."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def outside(view: Tensor) -> Tensor:
    """A copy of the bytes of the view's storage that do not belong to the view."""
    whole = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())
    mine = torch.zeros(whole.shape, dtype=torch.bool)
    mine.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return whole[~mine].view(torch.uint8).clone()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits_and_nothing_else_is_touched(
    instruction_set: str, layout: str, dtype: torch.dtype
) -> None:
    student, teacher = LAYOUTS[layout](dtype), LAYOUTS[layout](torch.bfloat16 if dtype != torch.float64 else dtype)
    g = oracle.generator(layout)
    student.copy_(torch.randn(student.shape, generator=g, dtype=torch.float64))
    teacher.copy_(torch.randn(teacher.shape, generator=g, dtype=torch.float64))
    labels = torch.randint(0, SIZE, student.shape[:-1], generator=g)
    settings: dict[str, Any] = {"divergence": "jsd", "temperature": 3.7, "label_smoothing": 0.1}
    expected = calls.by_backend(student.contiguous(), teacher.contiguous(), labels, **settings)
    before = [bits(x).clone() for x in (student, teacher)]
    fresh = calls.by_backend(student, teacher, labels, **settings)
    assert all(torch.equal(bits(x), b) for x, b in zip((student, teacher), before, strict=True)), "inputs changed"
    surroundings = outside(student)
    inplace = calls.by_backend(student, teacher, labels, gradient="inplace", **settings)
    for result in (fresh, inplace):
        assert result.values == expected.values
        assert torch.equal(result.grad, expected.grad)
        assert result.unit == expected.unit
    assert torch.equal(outside(student), surroundings), "in place wrote beside the rows"
    assert torch.equal(bits(teacher), before[1]), "the teacher changed"
    assert inplace.grad.data_ptr() == student.data_ptr()


def test_expanded_tensors(instruction_set: str) -> None:
    """Stride 0, along either leading dimension: one teacher row for all tokens, one student for all batches."""
    g = oracle.generator("expanded")
    whole = torch.randn(BATCH, TOKENS, SIZE, generator=g)
    for one in (
        torch.randn(SIZE, generator=g).expand(BATCH, TOKENS, SIZE),
        torch.randn(BATCH, 1, SIZE, generator=g).expand(BATCH, TOKENS, SIZE),
        torch.randn(TOKENS, SIZE, generator=g).expand(BATCH, TOKENS, SIZE),
    ):
        for student, teacher in ((whole, one), (one, whole)):
            expected = calls.by_backend(student.contiguous(), teacher.contiguous())
            result = calls.by_backend(student, teacher)
            assert result.values == expected.values
            assert torch.equal(result.grad, expected.grad)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 3, 50000)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(shape: tuple[int, ...], reduction: str) -> None:
    student = torch.randn(shape, requires_grad=True)
    labels = torch.zeros(shape[:-1], dtype=torch.int64)
    terms = distil_fast.distillation_loss(student, student.detach(), labels, reduction=reduction)
    for value in terms:
        assert value.shape == (shape[:-1] if reduction == "none" else ())
        assert value.sum() == 0
    (grad,) = torch.autograd.grad(terms.loss.sum(), student)
    assert grad.shape == shape


# ------------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("shape", [(1, 100003), (2, 50257), (7, 9001), (40, 1000)])
def test_threads_do_not_change_a_bit(instruction_set: str, shape: tuple[int, int]) -> None:
    """Rows over threads; with fewer rows than threads, the columns of each row over threads."""
    g = oracle.generator(shape)
    student, teacher = oracle.logit_pair("plain", *shape, g)
    student[:, shape[1] // 2 :] += 90.0  # some blocks take a reference of their own
    student, teacher = student.bfloat16(), teacher.float()
    labels = torch.randint(0, shape[1], shape[:1], generator=g)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            [
                calls.by_backend(student.clone(), teacher, labels, gradient=gradient, label_smoothing=0.1)
                for gradient in ("fresh", "inplace")
            ]
        )
        results[-1].append(calls.by_backend(student, None, labels, soft_weight=0.0, reduction="none"))
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert torch.equal(one.grad, other.grad)
            assert all(torch.equal(one.values[name], other.values[name]) for name in one.values)


# ------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("isa", oracle.INSTRUCTION_SETS)
def test_forbidden_pages_are_not_touched(isa: str) -> None:
    """Not one byte before or behind a tensor, no row that no term uses, nothing of a term without weight."""
    assert "untouched" in run_script("guarded.py", isa)


@pytest.mark.parametrize("filler", [float("nan"), float("inf")])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_what_no_term_uses_reaches_nothing(instruction_set: str, reduction: str, filler: float) -> None:
    """As if the row were not there, to the bit; and a row that only one term uses has that term alone."""
    g = oracle.generator("unused")
    for dtype in DTYPES:
        student, teacher = (torch.randn(5, 300, generator=g).to(dtype) for _ in range(2))
        labels = torch.tensor([1, -100, 2, -100, 299])
        mask = torch.tensor([1.0, 0.5, 0.0, 0.0, 2.0]).to(real_dtype(student))
        temperature = torch.tensor([1.0, 2.0, float("nan"), -1.0, 3.7]).to(mask.dtype)  # of unused rows: anything
        settings: dict[str, Any] = {"soft_mask": mask, "temperature": temperature, "reduction": reduction}
        good = calls.by_backend(student, teacher, labels, **settings)
        student[3], teacher[2:4] = filler, filler
        result = calls.by_backend(student, teacher, labels, **settings)
        assert torch.equal(result.grad, good.grad)
        assert not result.grad[3].any()
        assert all(torch.equal(result.values[name], good.values[name]) for name in good.values)
        assert all(value.isfinite().all() for value in result.values.values())


def test_gradients_that_live_together_share_no_memory() -> None:
    """Large gradients come from a pool: two steps' are apart, and a block that returns brings nothing with it."""
    rows = WORTH_KEEPING // (4 * 30522) + 1
    gc.collect()  # what earlier tests left in cycles must not return to the pool in between
    student, teacher = (torch.randn(rows, 30522, generator=oracle.generator(i)) for i in range(2))
    labels = torch.arange(rows)
    first = calls.by_autograd(student, teacher, labels).grad
    copy = first.clone()
    second = calls.by_autograd(teacher, student, labels).grad
    assert torch.equal(first, copy)
    second.fill_(float("nan"))
    address = second.data_ptr()
    del second
    unused = torch.where(labels % 2 == 0, labels, -100)
    third = calls.by_autograd(student, teacher, unused, soft_mask=unused >= 0).grad
    assert third.data_ptr() == address, "the block was not used again, so this test shows nothing"
    assert not third[1::2].any()
    assert third.isfinite().all()


# ------------------------------------------------------------------------------------------------ how much memory


def footprints(threads: int, *cases: str) -> dict[str, int]:
    lines = run_script("footprint.py", threads, 151936, *cases).splitlines()
    return {case: int(number) for case, number in (line.rsplit(" ", 1) for line in lines)}


def test_memory_beyond_the_gradient() -> None:
    """Under 2 MiB a thread at V = 151936, where a copy of the rows is 19 MB, and the same for any number of rows."""
    layouts = ["contiguous", "all but the last token", "a chunk of the sequence", "padded rows"]
    cases = [f"{layout}:{rows}:{how}" for layout in layouts for rows in (4, 32) for how in ("inplace", "fresh")]
    for case, beyond in footprints(1, *cases).items():
        assert beyond <= 2**21, f"{case}: {beyond / 2**20:.2f} MiB beyond the gradient"


@pytest.mark.parametrize("how", ["inplace", "fresh"])
def test_memory_beyond_the_gradient_of_two_threads(how: str) -> None:
    (beyond,) = footprints(2, f"contiguous:32:{how}").values()
    assert beyond <= 2 * 2**21, f"{beyond / 2**20:.2f} MiB beyond the gradient"


# ------------------------------------------------------------------------------------------------ beyond 2^31

FAR = 2**31 + 12345  # elements; memory that is never touched costs nothing


def far_apart(values: Tensor) -> Tensor:
    """A copy of two rows (or of two batches) that lie more than 2^31 elements apart."""
    memory = torch.empty(FAR + values[0].numel(), dtype=values.dtype)
    view = memory.as_strided(values.shape, (FAR, *values.stride()[1:]))
    view.copy_(values)
    return view


@pytest.mark.parametrize("shape", [(2, 3001), (2, 3, 3001)])
def test_rows_more_than_two_to_the_31_elements_apart(instruction_set: str, shape: tuple[int, ...]) -> None:
    student, teacher = (torch.randn(shape, generator=oracle.generator(shape, i)) for i in range(2))
    student, labels = student.bfloat16(), torch.full(shape[:-1], 3000)
    expected = calls.by_backend(student, teacher, labels)
    far_student, far_teacher = far_apart(student), far_apart(teacher)
    for gradient in ("fresh", "inplace"):
        result = calls.by_backend(far_student, far_teacher, labels, gradient=gradient)
        assert result.values == expected.values
        assert torch.equal(result.grad, expected.grad)
    native.rescale(far_student, torch.tensor(0.5), 1.0)
    assert torch.equal(far_student, (expected.grad.float() * 0.5).bfloat16())


def test_more_than_two_to_the_31_logits(instruction_set: str) -> None:
    """65540 rows of 32768, of which the last alone is used: no other page is ever touched."""
    rows, cols = 65540, 32768
    student, teacher = (torch.empty(rows, cols, dtype=torch.bfloat16) for _ in range(2))
    last = [torch.randn(cols, generator=oracle.generator("many", i)).bfloat16() for i in range(2)]
    student[-1], teacher[-1] = last
    used = torch.arange(rows) == rows - 1
    labels = torch.where(used, 32767, -100)
    result = distil_fast.distillation_loss(student, teacher, labels, soft_mask=used)
    expected = distil_fast.distillation_loss(last[0], last[1], torch.tensor(32767))
    assert result == expected
