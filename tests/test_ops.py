"""How a gradient reaches autograd: upstream gradients, second backwards, modes, hooks, memory.

In place is test_inplace.py's, tracing is test_compile.py's. It knows no formula but the reference's. Next: batch.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import distil_fast
from distil_fast import reference
from tests.batch import CALLS, Batch, as_double, assert_close, error, first, make_batch, run, student_field

STORED = [  # the gradient is computed in forward
    "distillation-mean",
    "everything-sum",
    "topk-mean",
    "cosine-mean",
    "mse-mean",
    "logit_mse",
]
RECOMPUTED = [
    "distillation-none",
    "everything-none",
    "topk-none",
    "cosine-none",
    "mse-none",
    "softmax",
    "log_softmax",
]  # in backward

INF, NAN = float("inf"), float("nan")


def gradient(api: Any, name: str, b: Batch, upstream: Tensor | None = None, **how: Any) -> Tensor:
    return torch.autograd.grad(first(CALLS[name](api, b)), getattr(b, student_field(name)), upstream, **how)[0]


# ------------------------------------------------------------------------------------------------ upstream gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25, -3.0, 1024.0])
@pytest.mark.parametrize("name", STORED)
def test_grad_output_scales_a_stored_gradient(name: str, scale: float, dtype: torch.dtype) -> None:
    b = make_batch(3, 5, dtype=dtype)
    exact = gradient(reference, name, as_double(b), torch.tensor(scale).double())
    rounding = error(exact.to(dtype), exact)
    assert error(gradient(distil_fast, name, b, torch.tensor(scale)), exact) <= 2.1 * rounding + 3e-6


@pytest.mark.parametrize("name", STORED + RECOMPUTED)
def test_grad_output_0_is_a_zero_gradient_and_nan_a_nan_one(name: str) -> None:
    b = make_batch(3, 5)
    shape = first(CALLS[name](distil_fast, b)).shape
    assert not gradient(distil_fast, name, b, torch.zeros(shape)).any()
    spoilt = gradient(distil_fast, name, b, torch.full(shape, NAN))
    used = gradient(distil_fast, name, b, torch.ones(shape)).ne(0).any(-1)
    assert used.any()
    assert spoilt[used].isnan().all()


UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "stride 0": lambda g: g[0, 0].expand(3, 5),
    "stride 0 in one dimension": lambda g: g[:, :1].expand(3, 5),
    "transposed": lambda g: g.t().contiguous().t(),
    "with gaps": lambda g: torch.stack([g, g], -1)[..., 0],
    "negative": lambda g: -g,
    "mixed": lambda g: g - 1.0,
}


@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("name", ["distillation-none", "everything-none", "divergence-none", "cosine-none"])
def test_each_row_has_an_upstream_gradient_of_its_own(name: str, upstream: Callable[[Tensor], Tensor]) -> None:
    b = make_batch(3, 5)
    given = upstream(0.5 + torch.rand(3, 5, generator=torch.Generator().manual_seed(3)))
    exact = gradient(reference, name, as_double(b), given.double())
    assert error(gradient(distil_fast, name, b, given), exact) <= 3e-6


def test_upstream_gradients_of_softmax_may_have_any_strides() -> None:
    b = make_batch(3, 5)
    dense = torch.randn(b.student_logits.shape, generator=torch.Generator().manual_seed(3))
    for given in (dense, dense.transpose(0, 2).contiguous().transpose(0, 2), dense[:1].expand_as(dense)):
        for name in ("softmax", "log_softmax"):
            exact = gradient(reference, name, as_double(b), given.double())
            assert error(gradient(distil_fast, name, b, given), exact) <= 3e-6


def test_sum_of_rows_is_the_reduction_sum() -> None:
    """loss.sum() hands an expanded gradient down."""
    b = make_batch(3, 5)
    whole = run(lambda b: CALLS["everything-sum"](distil_fast, b).loss, b)
    rows = run(lambda b: CALLS["everything-none"](distil_fast, b).loss.sum(), b)
    assert_close(rows, whole, 1e-6)


def test_a_loss_used_twice_gets_the_sum_of_its_upstream_gradients() -> None:
    b = make_batch(3, 5)
    loss = CALLS["distillation-mean"](distil_fast, b).loss
    (grad,) = torch.autograd.grad(2.0 * loss + loss.square(), b.student_logits)
    exact = gradient(reference, "distillation-mean", as_double(b), (2.0 + 2.0 * loss).detach().double())
    assert error(grad, exact) <= 3e-6


def test_fp16_does_not_underflow_before_a_loss_scaler_acts() -> None:
    """In the mean over a million tokens p / N is below fp16's smallest number; times the scaler's 65536 it is not."""
    b = make_batch(16, cols=300)
    student, scale = b.student_logits.detach().half().requires_grad_(), torch.tensor(65536.0)
    loss = distil_fast.distillation_loss(student, b.teacher_logits, soft_count=1e6).loss
    (grad,) = torch.autograd.grad(loss, student, scale)
    exact_student = student.detach().double().requires_grad_()
    exact_loss = reference.distillation_loss(exact_student, b.teacher_logits.double(), soft_count=1e6).loss
    (exact,) = torch.autograd.grad(exact_loss, exact_student, scale.double())
    assert (exact / 65536).half().eq(0).double().mean() > 0.9, "the test must be able to fail"
    assert grad.dtype == torch.float16
    assert (grad == 0).sum() <= 1.1 * exact.half().eq(0).sum()
    assert error(grad, exact) <= 2.1 * error(exact.half(), exact)


def test_with_torchs_grad_scaler() -> None:
    b = make_batch(64)
    weight = torch.eye(37, requires_grad=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    logits = (b.student_logits.detach() @ weight).half()
    scaler.scale(distil_fast.distillation_loss(logits, b.teacher_logits, b.labels).loss).backward()
    scaler.unscale_(torch.optim.SGD([weight], lr=1.0))
    exact = logits.detach().double().requires_grad_()
    reference.distillation_loss(exact, b.teacher_logits.double(), b.labels).loss.backward()
    assert weight.grad is not None
    assert exact.grad is not None
    assert error(weight.grad, b.student_logits.detach().double().t() @ exact.grad) <= 1e-3


# ------------------------------------------------------------------------------------------------ a second time


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("name", STORED)
def test_a_second_backward_names_the_remedy(name: str, retain: bool) -> None:
    b = make_batch(3, 5)
    loss = first(CALLS[name](distil_fast, b))
    loss.backward(retain_graph=retain)
    grad = getattr(b, student_field(name)).grad
    assert grad is not None
    kept = grad.clone()
    with pytest.raises(RuntimeError, match=r"distil_fast: .*first backward.*Call the loss again.*reduction='none'"):
        loss.backward()
    assert torch.equal(grad, kept), "the first gradient must survive the error"


@pytest.mark.parametrize("name", RECOMPUTED)
def test_where_the_gradient_is_recomputed_a_graph_may_be_retained(name: str) -> None:
    b = make_batch(3, 5)
    loss = first(CALLS[name](distil_fast, b))
    upstream = torch.rand(loss.shape)
    student = getattr(b, student_field(name))
    grads = [torch.autograd.grad(loss, student, upstream, retain_graph=True)[0] for _ in range(3)]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("name", STORED + RECOMPUTED)
def test_create_graph_gives_the_gradient_and_a_second_derivative_a_clear_error(name: str) -> None:
    b = make_batch(3, 5)
    shape = first(CALLS[name](distil_fast, b)).shape
    upstream = 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(3))
    grad = gradient(distil_fast, name, b, upstream, create_graph=True)
    assert torch.equal(grad, gradient(distil_fast, name, b, upstream))
    with pytest.raises(RuntimeError, match=r"distil_fast: .*first derivative only.*distil_fast\.reference"):
        grad.square().sum().backward()


@pytest.mark.parametrize("name", RECOMPUTED)
def test_gradcheck(name: str) -> None:
    """Against finite differences, independent of the reference."""
    b = as_double(make_batch(2, 2, cols=5, hidden=4))

    def call(student: Tensor) -> Tensor:
        return first(CALLS[name](distil_fast, b._replace(**{student_field(name): student})))

    assert torch.autograd.gradcheck(call, getattr(b, student_field(name)))


@pytest.mark.parametrize("name", ["distillation-mean", "everything-sum", "cosine-mean", "hidden", "triple"])
def test_a_reduced_loss_against_finite_differences(name: str) -> None:
    """gradcheck itself asks for a second backward."""
    b = as_double(make_batch(2, 2, cols=5, hidden=4))
    student = getattr(b, student_field(name))
    grad = gradient(distil_fast, name, b)
    direction = torch.randn(student.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        ahead, behind = (
            first(CALLS[name](distil_fast, b._replace(**{student_field(name): student + step * direction})))
            for step in (1e-5, -1e-5)
        )
    assert ((ahead - behind) / 2e-5).item() == pytest.approx((grad * direction).sum().item(), rel=1e-7)


# ------------------------------------------------------------------------------------------------ graphs and memory


@pytest.mark.parametrize("name", STORED + RECOMPUTED)
def test_hooks_see_the_final_gradient_and_may_change_it(name: str) -> None:
    b = make_batch(3, 5)
    student = getattr(b, student_field(name))
    inner = student * 1.0
    inner.retain_grad()
    seen: list[Tensor] = []
    inner.register_hook(lambda g: seen.append(g.clone()) or 2.0 * g)
    first(CALLS[name](distil_fast, b._replace(**{student_field(name): inner}))).sum().backward()
    expected = gradient(distil_fast, name, b, torch.ones(first(CALLS[name](distil_fast, b)).shape))
    assert torch.equal(seen[0], expected)
    assert student.grad is not None
    assert torch.equal(student.grad, 2.0 * expected)


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("cols", [37, 40000])  # of the C library's memory, and of the kept kind
@pytest.mark.parametrize("name", ["distillation-mean", "distillation-none", "cosine-mean"])
def test_no_gradient_is_kept_alive_after_backward(name: str, cols: int, retain: bool) -> None:
    b = make_batch(32, cols=cols, hidden=cols)
    student = getattr(b, student_field(name))
    inner = student * 1.0
    stored: list[StorageWeakRef] = []
    inner.register_hook(lambda g: stored.append(StorageWeakRef(g.untyped_storage())))
    loss = first(CALLS[name](distil_fast, b._replace(**{student_field(name): inner})))
    loss.sum().backward(retain_graph=retain)
    assert loss.grad_fn is not None
    assert stored
    assert stored[0].expired()


def test_changing_the_logits_before_backward() -> None:
    """A stored gradient does not mind; where backward reads the logits again, autograd notices."""
    b = make_batch(3, 5)
    expected = gradient(distil_fast, "distillation-mean", b)
    inner = b.student_logits * 1.0
    teacher = b.teacher_logits.clone()
    stored = distil_fast.distillation_loss(inner, teacher, b.labels).loss
    recomputed = distil_fast.distillation_loss(inner, teacher, b.labels, reduction="none").loss.sum()
    with torch.no_grad():
        inner.zero_()
        teacher.zero_()
    assert torch.equal(torch.autograd.grad(stored, b.student_logits)[0], expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        recomputed.backward()


def test_a_loss_of_a_view_reaches_the_whole_tensor() -> None:
    logits = torch.randn(2, 6, 11, requires_grad=True)
    labels = torch.randint(0, 11, (2, 5))
    distil_fast.cross_entropy(logits[:, :-1], labels).backward()
    exact = logits.detach().double().requires_grad_()
    reference.cross_entropy(exact[:, :-1], labels).backward()
    assert logits.grad is not None
    assert exact.grad is not None
    assert not logits.grad[:, -1].any()
    assert error(logits.grad, exact.grad) <= 3e-6


def test_only_what_requires_grad_gets_one() -> None:
    for which in ("student_logits", "student_hidden"):
        b = make_batch(3, 5)
        b = b._replace(**{which: getattr(b, which).detach()})
        values, grads = run(lambda b: distil_fast.triple_loss(*b[:6]), b)
        exact = run(lambda b: reference.triple_loss(*b[:6]), as_double(b))
        assert len(grads) == 1
        assert_close(type(exact)(values, grads), exact, 3e-6)
