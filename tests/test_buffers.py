"""Memory of large gradients: used again from step to step, never by two, and an ordinary tensor's in every respect.

It knows no formula, and where memory comes from only by addresses. Next: distil_fast/backends/buffers.py.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import distil_fast

ROWS, V = 512, 32768  # 64 MiB of float32
CHUNK = 64

Pair = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def pair() -> Pair:
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(CHUNK, V, generator=g).repeat(ROWS // CHUNK, 1) for _ in range(2))
    return student, teacher


def gradient(student: Tensor, teacher: Tensor, scale: float = 1.0) -> Tensor:
    leaf = student.detach().requires_grad_()
    loss = distil_fast.divergence_loss(leaf, teacher, reduction="sum")
    return torch.autograd.grad(loss, leaf, torch.tensor(scale))[0]


@pytest.fixture(scope="module")
def expected(pair: Pair) -> Tensor:
    """The gradient of the first rows, which all others repeat: a gradient too small for memory of its own kind."""
    return gradient(pair[0][:CHUNK], pair[1][:CHUNK]).clone()


def is_right(grad: Tensor, expected: Tensor, scale: float = 1.0) -> bool:
    return all(torch.equal(part, scale * expected[: len(part)]) for part in grad.split(CHUNK))


def overlap(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def test_a_freed_gradients_memory_is_used_again(pair: Pair, expected: Tensor) -> None:
    addresses = set()
    for _ in range(4):
        grad = gradient(*pair)
        assert is_right(grad, expected)
        addresses.add(grad.data_ptr())
        del grad
    assert len(addresses) == 1


def test_in_a_training_loop(pair: Pair, expected: Tensor) -> None:
    leaf = pair[0].clone().requires_grad_()
    addresses = set()
    for _ in range(3):
        leaf.grad = None
        distil_fast.divergence_loss(leaf, pair[1], reduction="sum").backward()
        assert leaf.grad is not None
        addresses.add(leaf.grad.data_ptr())
        assert is_right(leaf.grad, expected)
    assert len(addresses) == 1


def test_two_live_gradients_never_share(pair: Pair, expected: Tensor) -> None:
    grads = [gradient(*pair, scale) for scale in (1.0, 2.0, 4.0)]
    assert not any(overlap(grads[i], grads[j]) for i in range(3) for j in range(i))
    for grad, scale in zip(grads, (1.0, 2.0, 4.0), strict=True):
        assert is_right(grad, expected, scale)
    grads[1].fill_(float("nan"))
    assert is_right(grads[0], expected)
    assert is_right(grads[2], expected, 4.0)
    del grads[1]
    assert is_right(gradient(*pair, 8.0), expected, 8.0)
    assert is_right(grads[0], expected)


def test_a_gradient_outlives_everything_else(pair: Pair, expected: Tensor) -> None:
    students = [pair[0].clone(), pair[1].clone()]
    grad = gradient(*students)
    del students
    gc.collect()
    view, array = grad[3:5], grad.numpy()
    del grad
    gc.collect()
    others = [gradient(*pair, 2.0) for _ in range(2)]
    assert torch.equal(view, expected[3:5])
    assert (array[:CHUNK] == expected.numpy()).all()
    assert is_right(others[0], expected, 2.0)


OUTPUTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "row loss": lambda s, t, mask: torch.autograd.grad(distil_fast.divergence_loss(s, t, mask=mask), s)[0],
    "row loss, none": lambda s, t, mask: torch.autograd.grad(
        distil_fast.divergence_loss(s, t, mask=mask, reduction="none"), s, torch.ones(len(s))
    )[0],
    "logit mse": lambda s, t, mask: torch.autograd.grad(distil_fast.logit_mse(s, t, mask), s)[0],
    "cosine": lambda s, t, mask: torch.autograd.grad(distil_fast.cosine_loss(s, t, mask), s)[0],
    "softmax": lambda s, t, mask: distil_fast.softmax(s).detach(),
    "softmax backward": lambda s, t, mask: torch.autograd.grad(distil_fast.log_softmax(s), s, t)[0],
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_what_was_in_the_memory_before_shows_nowhere(output: Callable[..., Tensor], pair: Pair) -> None:
    """Every element is written, the zeros of unused rows too."""
    mask = torch.arange(ROWS) % 3 != 0
    leaf = pair[0].detach().requires_grad_()
    many = [output(leaf, pair[1], mask) for _ in range(4)]  # as many as earlier tests may have freed
    kept, addresses = many[0].clone(), {one.data_ptr() for one in many}
    for one in many:
        one.fill_(float("nan"))
    del many, one
    again = output(leaf, pair[1], mask)
    assert again.data_ptr() in addresses
    assert torch.equal(again, kept)


def test_sizes_that_grow_and_shrink(pair: Pair, expected: Tensor) -> None:
    """Small gradients take turns with huge ones, and each is right."""
    for rows in (512, 8, 300, 1, 512, 400, 512, 256, 64):
        grad = gradient(pair[0][:rows], pair[1][:rows])
        assert grad.shape == (rows, V)
        assert is_right(grad, expected)


def test_memory_does_not_pile_up_as_sizes_change(pair: Pair) -> None:
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * 4096

    gradient(*pair)
    before = mapped()
    for rows in range(260, ROWS + 1, 12):
        gradient(pair[0][:rows], pair[1][:rows])
    for rows in range(ROWS, 260, -12):
        gradient(pair[0][:rows], pair[1][:rows])
    assert mapped() - before <= 1.25 * pair[0].nbytes


def test_dtypes_take_turns(pair: Pair) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.float16):
        student = pair[0].to(dtype)
        grad = gradient(student, pair[1])
        assert grad.dtype == dtype
        assert torch.equal(grad[:CHUNK], gradient(student[:CHUNK], pair[1][:CHUNK]))


def test_it_is_an_ordinary_tensor(pair: Pair, expected: Tensor) -> None:
    grad = gradient(*pair)
    assert grad.is_contiguous()
    assert grad.untyped_storage().nbytes() >= grad.nbytes
    assert grad.storage_offset() == 0
    assert grad.mul_(2.0)[0, 0] == 2.0 * expected[0, 0]
    assert torch.equal(grad.view(-1)[: V * CHUNK].view(CHUNK, V), 2.0 * expected)
    file = io.BytesIO()
    torch.save(grad[:2].clone(), file)
    file.seek(0)
    assert torch.equal(torch.load(file), grad[:2])
    parameter = torch.nn.Parameter(pair[0].clone())
    parameter.grad = grad
    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    torch.optim.SGD([parameter], lr=1.0).step()
    assert torch.equal(parameter.detach(), pair[0] - grad)


def test_several_threads_at_once(pair: Pair, expected: Tensor) -> None:
    def steps(scale: float) -> bool:
        right = True
        for rows in (512, 300, 512, 64):
            grad = gradient(pair[0][:rows], pair[1][:rows], scale)
            right &= is_right(grad, expected, scale)
        return right

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(steps, [1.0, 2.0, 0.5]))


def test_a_gradient_may_die_on_another_thread(pair: Pair, expected: Tensor) -> None:
    grads = [gradient(*pair)]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(grads.clear).result()
    assert is_right(gradient(*pair), expected)
