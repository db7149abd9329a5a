"""Tracing: torch.library's opcheck, fakes and meta tensors, torch.compile, torch.export.

The ops are those that the public functions are seen to call, so nothing here knows a schema. Next: test_ops.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import distil_fast
from tests.batch import CALLS, Batch, Call, Result, assert_close, assert_identical, error, first, make_batch, run
from tests.wrong_arguments import WRONG, Wrong, arguments, label_rows

# torch's own, while it traces and generates code
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

TRACED: dict[str, Call] = {
    **CALLS,
    "inplace": lambda f, b: f.distillation_loss(2.0 * b.student_logits, b.teacher_logits, b.labels, inplace=True),
    "chunk": lambda f, b: f.distillation_loss(b.student_logits[:, 1:], b.teacher_logits[:, 1:], b.labels[:, 1:]),
}
FEW = [
    "distillation-mean",
    "everything-mean",
    "everything-none",
    "topk-mean",
    "topk-none",
    "cosine-mean",
    "cosine-none",
    "softmax",
    "triple",
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def compiled(call: Call, backend: Any = "aot_eager", **how: Any) -> Callable[[Batch], Any]:
    """aot_eager traces exactly what inductor does, and runs the graphs as they are: fast to compile."""
    return torch.compile(lambda b: call(distil_fast, b), fullgraph=True, backend=backend, **how)


# ------------------------------------------------------------------------------------------------ the ops


class Recorder(TorchDispatchMode):
    """Notes each of our ops that runs, with copies of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "distil_fast":
            copies = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
            self.calls.append((func, copies))
        return func(*args, **(kwargs or {}))


def recorded(name: str, dtype: torch.dtype = torch.float32) -> list[tuple[Any, tuple[Any, ...]]]:
    """The ops of a call's forward and backward, where a dispatch mode looks on and where torch.compile traces."""
    recorder = Recorder()

    def recording(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run_graph(inputs: list[Any]) -> Any:
            with recorder:
                return graph(*inputs)

        run_graph._boxed_call = True  # type: ignore[attr-defined]
        return run_graph

    batch = make_batch(3, 5, dtype=dtype)
    with recorder:
        run(lambda b: TRACED[name](distil_fast, b), batch)
    run(compiled(TRACED[name], aot_autograd(fw_compiler=recording)), batch)
    return recorder.calls


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in (*FEW, "log_softmax", "inplace")]
    + [("distillation-mean", torch.bfloat16), ("inplace", torch.float16), ("triple", torch.float64)],
    ids=str,
)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """Schemas, fakes and aot_dispatch of every op, with the arguments that it gets."""
    calls = recorded(name, dtype)
    assert calls
    checked = set()
    for op, args in calls:
        if op not in checked:
            torch.library.opcheck(op, args)
            checked.add(op)


def test_no_op_goes_unchecked() -> None:
    registered = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("distil_fast::")}
    names = ("distillation-mean", "topk-none", "cosine-mean", "cosine-none", "softmax", "inplace")
    heads = {"distil_fast::chunked_loss"}  # test_linear_use.py checks it
    assert {op.name() for name in names for op, _ in recorded(name)} | heads == registered


# ------------------------------------------------------------------------------------------------ fakes


def traits(tensors: tuple[Tensor, ...]) -> list[tuple[Any, ...]]:
    return [(t.shape, t.dtype, t.stride()) for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", TRACED)
def test_fake_results_look_like_real_ones(name: str, dtype: torch.dtype) -> None:
    batch = make_batch(3, 5, dtype=dtype)
    real = run(lambda b: TRACED[name](distil_fast, b), batch)
    mode = FakeTensorMode()
    copies = Batch(*(mode.from_tensor(t.detach()).requires_grad_(t.requires_grad) for t in batch))
    with mode:
        out = TRACED[name](distil_fast, copies)
        values = out if isinstance(out, tuple) else (out,)
        values[0].backward(torch.ones_like(values[0]))
        grads = tuple(t.grad for t in copies if t.grad is not None)
    assert traits(values) == traits(real.values)
    assert traits(grads) == traits(real.grads)


META = """
import torch, distil_fast
from tests.batch import CALLS, Batch, first, make_batch
from tests.test_compile import TRACED
for name, call in TRACED.items():
    batch = Batch(*(t.detach().to("meta").requires_grad_(t.requires_grad) for t in make_batch(3, 5)))
    out = call(distil_fast, batch)
    loss = first(out)
    loss.backward(torch.ones_like(loss))
    grads = [t.grad for t in batch if t.grad is not None]
    assert grads and all(t.device.type == "meta" for t in (*grads, loss)), (name, loss)
    print(name, tuple(loss.shape))
"""


def test_meta_tensors_have_shapes_and_touch_no_memory() -> None:
    """In a process of its own, which a null pointer may kill."""
    done = subprocess.run([sys.executable, "-c", META], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit status {done.returncode} after {done.stdout!r}: {done.stderr[-2000:]}"
    assert len(done.stdout.splitlines()) == len(TRACED)


# ------------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("name", TRACED)
def test_compiled_is_eager(name: str) -> None:
    batch = make_batch(3, 5)
    assert_same(run(compiled(TRACED[name]), batch), run(lambda b: TRACED[name](distil_fast, b), batch))


def assert_same(traced: Result, eager: Result) -> None:
    """Values bit for bit; gradients but for rounding once or twice: grad_output is applied before it or after it."""
    assert_identical(traced._replace(grads=()), eager._replace(grads=()))
    assert_close(traced, eager, 2e-7)


@pytest.mark.parametrize("name", ["distillation-mean", "everything-sum", "divergence-sum", "cosine-mean", "triple"])
def test_compiled_is_eager_bit_for_bit_where_grad_output_is_1(name: str) -> None:
    batch = make_batch(3, 5)
    grads = []
    for call in (lambda b: TRACED[name](distil_fast, b), compiled(TRACED[name])):
        copy = Batch(*(t.detach().clone().requires_grad_(t.requires_grad) for t in batch))
        first(call(copy)).backward()
        grads.append([t.grad for t in copy if t.grad is not None])
    assert grads[0]
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize("name", [*FEW, "inplace", "chunk"])
def test_dynamic_shapes_compile_once(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    call = compiled(TRACED[name], counter, dynamic=True)
    for leading, cols, hidden in (((3, 5), 37, 24), ((4, 7), 41, 25), ((2, 3), 60, 7)):
        batch = make_batch(*leading, cols=cols, hidden=hidden)
        expected = run(lambda b: TRACED[name](distil_fast, b), batch)
        assert_same(run(call, batch), expected)
    assert counter.frame_count <= 2  # the second time with its numbers as constants; never for a shape


@pytest.mark.parametrize("how", [{"dynamic": True}, {}], ids=["dynamic", "automatic"])
@pytest.mark.parametrize("setting", ["temperature", "soft_weight", "hard_weight", "soft_count"])
def test_a_setting_that_changes_every_step(setting: str, how: dict[str, Any]) -> None:
    """Annealed temperatures and weights as 0-d tensors: right every time, and not compiled each time."""
    counter = CompileCounterWithBackend("aot_eager")
    batch = make_batch(3, 5)

    def loss(b: Batch, value: float | Tensor) -> tuple[Tensor, ...]:
        return distil_fast.distillation_loss(b.student_logits, b.teacher_logits, b.labels, **{setting: value})

    traced = torch.compile(loss, fullgraph=True, backend=counter, **how)
    values = [0.5 + 0.1 * i for i in range(10)]
    for value in map(torch.tensor, values):
        expected = run(lambda b, v=value: loss(b, v), batch)
        assert_same(run(lambda b, v=value: traced(b, v), batch), expected)
    assert counter.frame_count <= 2  # as above


@pytest.mark.parametrize("setting", ["temperature", "soft_weight", "hard_weight", "soft_count", "label_smoothing"])
def test_a_setting_that_is_another_number(setting: str) -> None:
    """Compiled anew, never silently the number before."""
    batch = make_batch(3, 5)

    def loss(b: Batch, value: float) -> tuple[Tensor, ...]:
        return distil_fast.distillation_loss(b.student_logits, b.teacher_logits, b.labels, **{setting: value})

    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for value in (0.5, 0.7, 0.9, 0.5):
        expected = run(lambda b, v=value: loss(b, v), batch)
        assert_same(run(lambda b, v=value: traced(b, v), batch), expected)


def head_loss(hidden: Tensor, weight: Tensor, teacher: Tensor, labels: Tensor, inplace: bool) -> Tensor:
    return distil_fast.distillation_loss(hidden @ weight.t(), teacher, labels, temperature=3.0, inplace=inplace).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_together_with_the_matmul_that_makes_the_logits(inplace: bool, dtype: torch.dtype) -> None:
    b = make_batch(3, 5, dtype=dtype)
    weight = torch.randn(37, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for function in (head_loss, torch.compile(head_loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().clone().requires_grad_() for t in (b.student_hidden, weight)]
        loss = function(*leaves, b.teacher_logits, b.labels, inplace)
        loss.backward()
        results.append([loss.detach(), *(t.grad for t in leaves)])
    assert torch.equal(results[0][0], results[1][0])
    for mine, theirs in zip(results[1][1:], results[0][1:], strict=True):
        assert error(mine, theirs) <= 2 * torch.finfo(dtype).eps


def test_compiled_without_gradients() -> None:
    batch = make_batch(3, 5)
    for mode in (torch.no_grad, torch.inference_mode):
        torch._dynamo.reset()
        with mode():
            out = compiled(CALLS["triple"])(batch)
            assert not out.loss.requires_grad
            assert torch.equal(out.loss, CALLS["triple"](distil_fast, batch).loss)


@pytest.mark.parametrize("name", ["distillation-mean", "distillation-none", "everything-none", "cosine-none", "triple"])
def test_compiled_with_an_inference_mode_teacher(name: str) -> None:
    """Traced code can only save, and torch refuses with a remedy; eager code holds them (test_gradients.py)."""
    batch = make_batch(3, 5)
    with torch.inference_mode():
        frozen = {f: t.clone() for f, t in batch._asdict().items() if not f.startswith("student")}
    with pytest.raises(RuntimeError, match=r"Inference tensors cannot be saved for backward.*clone"):
        run(lambda b: compiled(CALLS[name])(b._replace(**frozen)), batch)


def test_a_compiled_module() -> None:
    batch = make_batch(3, 5)
    module = distil_fast.DistillationLoss(temperature=3.0, divergence=distil_fast.JSD(0.3))
    traced = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(traced(*batch[:3]).loss, module(*batch[:3]).loss)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACED)
def test_inductor(name: str) -> None:
    check_inductor(name)


@pytest.mark.parametrize("name", ["distillation-mean", "inplace"])
def test_inductor_in_brief(name: str) -> None:
    check_inductor(name)


def check_inductor(name: str) -> None:
    """Between two ops that inductor generates code for."""
    batch = make_batch(3, 5)

    def call(b: Batch) -> Tensor:
        b = b._replace(student_logits=1.5 * b.student_logits, student_hidden=1.5 * b.student_hidden)
        return 2.0 * first(TRACED[name](distil_fast, b))

    assert_close(run(torch.compile(call, fullgraph=True), batch), run(call, batch), 1e-6)


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "name", ["teacher-padded", "labels-float", "temperature=0", "soft_mask-int", "soft_count=-1", "reduction='avg'"]
)
def test_wrong_arguments_while_tracing(name: str) -> None:
    check_traced_error(WRONG[name])


TRACEABLE = {name: case for name, case in WRONG.items() if case.traceable}


@pytest.mark.slow
@pytest.mark.parametrize("case", TRACEABLE.values(), ids=TRACEABLE)
def test_every_wrong_argument_while_tracing(case: Wrong) -> None:
    check_traced_error(case)


def check_traced_error(case: Wrong) -> None:
    traced = torch.compile(distil_fast.distillation_loss, backend="aot_eager")
    with pytest.raises(case.error) as info:
        traced(**{**arguments(), **case.spoil()})
    assert re.search(case.says[0], str(info.value))


@pytest.mark.parametrize(("reduction", "inplace"), [("mean", False), ("mean", True), ("none", False)])
def test_a_label_out_of_range_in_compiled_code(reduction: str, inplace: bool) -> None:
    """The graph is compiled with labels that are fine; only the kernel can see the others."""
    a = arguments()
    traced = torch.compile(
        lambda s, t, y: distil_fast.distillation_loss(s, t, y, reduction=reduction, inplace=inplace).loss.sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    assert traced(2.0 * a["student_logits"], a["teacher_logits"], a["labels"]).isfinite()
    for label in (-1, 11, 2**40):
        logits = 2.0 * a["student_logits"]
        before = logits.detach().clone()
        with pytest.raises(ValueError, match=rf"0 <= label < 11 .*got {label} in row 2"):
            traced(logits, a["teacher_logits"], label_rows(2, label))
        assert torch.equal(logits.detach(), before)


# ------------------------------------------------------------------------------------------------ torch.export


class Evaluation(torch.nn.Module):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return distil_fast.distillation_loss(student, teacher, labels)


def test_export() -> None:
    b = make_batch(6)
    rows = {0: torch.export.Dim("rows")}
    program = torch.export.export(
        Evaluation(), (b.student_logits.detach(), *b[1:3]), dynamic_shapes=(rows, rows, rows)
    ).module()
    other = make_batch(11)
    expected = distil_fast.distillation_loss(other.student_logits.detach(), *other[1:3])
    actual = program(other.student_logits.detach(), *other[1:3])
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
