"""The losses under the modes that torch has: inference, no_grad, autocast, checkpoints, subclasses, torch.func.

Tracing is test_compile.py's. It knows no formula but the reference's. Next: test_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import distil_fast
from distil_fast import reference
from tests.batch import CALLS, Batch, assert_identical, error, first, make_batch, run, student_field


@pytest.mark.parametrize("name", CALLS)
def test_everything_but_the_student_may_come_from_inference_mode(name: str) -> None:
    b = make_batch(3, 5)
    with torch.inference_mode():
        frozen = b._replace(**{f: t.clone() for f, t in b._asdict().items() if not f.startswith("student")})
    assert frozen.teacher_logits.is_inference()

    def result(b: Batch) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (b.student_logits, b.student_hidden)]
        first(CALLS[name](distil_fast, b._replace(student_logits=leaves[0], student_hidden=leaves[1]))).sum().backward()
        return tuple(t.grad for t in leaves if t.grad is not None)

    expected = result(b)
    assert expected
    assert all(torch.equal(x, y) for x, y in zip(result(frozen), expected, strict=True))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same(name: str, mode: Callable[[], Any]) -> None:
    b = make_batch(3, 5)
    with mode():
        out = CALLS[name](distil_fast, b)
        students = b._replace(student_logits=b.student_logits.clone(), student_hidden=b.student_hidden.clone())
        again = CALLS[name](distil_fast, students)
    for made in (out, again, CALLS[name](distil_fast, students)):  # the last one: inference tensors outside of the mode
        assert not first(made).requires_grad
        for value, expected in zip(_all(made), _all(CALLS[name](distil_fast, b)), strict=True):
            assert torch.equal(value, expected)


def _all(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def test_enable_grad_inside_no_grad() -> None:
    b = make_batch(3, 5)
    with torch.no_grad(), torch.enable_grad():
        assert CALLS["triple"](distil_fast, b).loss.requires_grad


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name: str) -> None:
    """The kernels convert on load: no cast, no copy, and losses are float32."""
    b = make_batch(3, 5)
    expected = run(lambda b: CALLS[name](distil_fast, b), b)
    with torch.autocast("cpu", torch.bfloat16):
        assert_identical(run(lambda b: CALLS[name](distil_fast, b), b), expected)


def test_a_model_under_autocast() -> None:
    b = make_batch(3, 5)
    head = nn.Linear(24, 37)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(b.student_hidden)
        assert logits.dtype == torch.bfloat16
        loss = distil_fast.distillation_loss(logits, b.teacher_logits, b.labels).loss
    logits.retain_grad()
    loss.backward()
    assert loss.dtype == torch.float32
    exact_logits = logits.detach().double().requires_grad_()
    exact = reference.distillation_loss(exact_logits, b.teacher_logits.double(), b.labels).loss
    (exact_grad,) = torch.autograd.grad(exact, exact_logits)
    assert error(loss, exact) <= 2e-6
    assert logits.grad is not None
    assert error(logits.grad, exact_grad) <= 2.0**-8
    assert head.weight.grad is not None
    assert head.weight.grad.any()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["distillation-mean", "distillation-none", "triple", "softmax"])
def test_inside_a_checkpoint(name: str, reentrant: bool) -> None:
    b = make_batch(3, 5)
    names = [n for n, t in b._asdict().items() if t.requires_grad]

    def inside(*students: Tensor) -> Tensor:
        return first(CALLS[name](distil_fast, b._replace(**dict(zip(names, students, strict=True)))))

    def loss(leaves: list[Tensor], wrap: bool) -> Tensor:
        students = [2.0 * t for t in leaves]
        out = checkpoint(inside, *students, use_reentrant=reentrant) if wrap else inside(*students)
        return out.square().sum()

    results = []
    for wrap in (False, True):
        leaves = [getattr(b, n).detach().clone().requires_grad_() for n in names]
        loss(leaves, wrap).backward()
        results.append([t.grad for t in leaves if t.grad is not None])
    assert results[0]
    for mine, expected in zip(results[1], results[0], strict=True):
        assert torch.equal(mine, expected)


def test_a_tensor_subclass_is_a_tensor() -> None:
    class Marked(Tensor):
        pass

    b = make_batch(3, 5)
    expected = run(lambda b: CALLS["distillation-mean"](distil_fast, b), b)
    student = b.student_logits.detach().clone().as_subclass(Marked).requires_grad_()
    terms = distil_fast.distillation_loss(student, b.teacher_logits, b.labels)
    assert float(terms.loss.detach()) == pytest.approx(float(expected.values[0]), rel=1e-6)
    terms.loss.backward()
    assert student.grad is not None
    assert student.grad.any()


# ------------------------------------------------------------------------------------------------ torch.func


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda f, x: torch.func.vmap(f)(x.unsqueeze(0)),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in jvp
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "name", ["distillation-mean", "divergence-sum", "cross_entropy-none", "cosine-mean", "softmax"]
)
def test_torch_func_transforms_are_refused_and_the_reference_is_named(name: str, transform: str) -> None:
    b = make_batch(3)
    student = getattr(b, student_field(name)).detach()

    def call(api: Any, student: Tensor) -> Tensor:
        return first(CALLS[name](api, b._replace(**{student_field(name): student})))

    with pytest.raises(NotImplementedError, match=r"torch\.func.*distil_fast\.reference\."):
        TRANSFORMS[transform](lambda x: call(distil_fast, x), student)
    TRANSFORMS[transform](lambda x: call(reference, x), student)  # the remedy works


def test_triple_loss_refuses_transforms() -> None:
    b = make_batch(3)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda x: distil_fast.triple_loss(x, *b[1:6]).loss)(b.student_logits.detach())


@pytest.mark.parametrize("name", ["distillation-mean", "distillation-none", "cosine-mean", "softmax"])
def test_forward_mode_derivatives_are_refused_not_dropped(name: str) -> None:
    b = make_batch(3)
    student = getattr(b, student_field(name))
    for primal in (student, student.detach()):
        with forward_ad.dual_level():
            dual = b._replace(**{student_field(name): forward_ad.make_dual(primal, torch.ones_like(primal))})
            with pytest.raises((NotImplementedError, RuntimeError), match=r"forward|jvp"):
                CALLS[name](distil_fast, dual)
