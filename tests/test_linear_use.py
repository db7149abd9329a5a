"""The fused linear losses as they are used: what is computed and kept and what is not, the ways of autograd and of the
compiler around a call, modules, and wrong arguments.

Inputs are heads.py's. Next: test_linear.py, the numbers; test_linear_distributed.py.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import distil_fast
from distil_fast import heads as made_of
from distil_fast import reference
from tests.calls import there
from tests.heads import ROWS, TEACHER_WIDTH, WIDTH, Heads, V, make, off

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_what_needs_no_gradient_gets_none(wanted: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen head costs no product for its weights, and hidden states without gradient none for theirs."""
    made = []
    for name in ("hidden_gradient", "WeightGradient"):
        original = getattr(made_of, name)
        monkeypatch.setattr(made_of, name, lambda *a, name=name, original=original: made.append(name) or original(*a))
    heads = make(torch.float32)
    heads = Heads(*(x.detach().requires_grad_(w) for x, w in zip(heads[:3], wanted, strict=True)), *heads[3:])
    heads.loss().loss.backward()
    assert [x.grad is not None for x in heads[:3]] == list(wanted)
    assert set(made) == {("hidden_gradient", "WeightGradient", "")[wanted.index(True)]} - {""}


def test_without_gradient_none_is_made() -> None:
    heads = make(torch.float32)
    with torch.no_grad():
        value = heads.loss().loss
    assert not value.requires_grad
    assert off(value, heads.exact().loss(reference).loss) < 2e-6


def test_unused_rows_are_left_out_whatever_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = made_of.logits
    monkeypatch.setattr(made_of, "logits", lambda hidden, *a: seen.append(hidden.shape[0]) or original(hidden, *a))
    heads = make(torch.float32)
    used = heads.mask | (heads.labels != -100)
    hidden, teacher = heads.student_hidden.detach().clone(), heads.teacher_hidden.clone()
    expected = torch.autograd.grad(heads.loss().loss, heads.leaves())
    seen.clear()
    hidden[~used], teacher[~used] = float("nan"), float("inf")
    bad = heads._replace(student_hidden=hidden, teacher_hidden=teacher).wanting()
    grads = torch.autograd.grad(bad.loss().loss, bad.leaves())
    assert sum(seen) == 2 * int(used.sum()) < 2 * ROWS  # both models' products
    for mine, theirs in zip(grads, expected, strict=True):
        assert torch.equal(mine, theirs)
    assert (grads[0][~used] == 0).all()


def test_nothing_to_do() -> None:
    heads = make(torch.float32)
    none = heads._replace(mask=torch.zeros_like(heads.mask), labels=torch.full_like(heads.labels, -100))
    loss = none.loss()
    assert loss.loss == loss.soft == loss.hard == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss.loss, none.leaves()))
    empty = make(torch.float32, 0, 4)
    assert torch.autograd.grad(empty.loss().loss, empty.leaves())[0].shape == (0, 4, WIDTH)


def test_autocast_as_a_linear_layer_has_it() -> None:
    heads = make(torch.float32)
    with torch.autocast(heads.student_hidden.device.type, dtype=torch.bfloat16):
        loss = heads.loss().loss
    half = Heads(*(x.bfloat16() if x.is_floating_point() else x for x in heads)).wanting()
    assert off(loss, half.loss().loss.cpu()) < 1e-6
    grads = torch.autograd.grad(loss, heads.leaves())
    assert [g.dtype for g in grads] == [torch.float32] * 3
    for mine, theirs in zip(grads, torch.autograd.grad(half.loss().loss, half.leaves()), strict=True):
        assert off(mine, theirs.cpu()) < 6e-3


def test_activation_checkpointing_around_it() -> None:
    heads = make(torch.float32)
    expected = torch.autograd.grad(heads.loss().loss, heads.leaves())
    loss = checkpoint(lambda *leaves: Heads(*leaves, *heads[3:]).loss().loss, *heads.leaves(), use_reentrant=False)
    for mine, theirs in zip(torch.autograd.grad(loss, heads.leaves()), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_code_computes_the_same(reduction: str) -> None:
    heads = make(torch.float32)
    eager = heads.loss(reduction=reduction).loss
    expected = torch.autograd.grad(eager.sum(), heads.leaves())
    torch._dynamo.reset()
    compiled = torch.compile(lambda *leaves: Heads(*leaves, *heads[3:]).loss(reduction=reduction).loss, fullgraph=True)
    loss = compiled(*heads.leaves())
    assert off(loss, eager.detach().cpu()) < 1e-6
    for mine, theirs in zip(torch.autograd.grad(loss.sum(), heads.leaves()), expected, strict=True):
        assert off(mine, theirs.cpu()) < 1e-6


def test_opcheck() -> None:
    heads = make(torch.float32, 6)
    settings = (-100, "forward_kl", [0.0, 0.0], True, 0.0, 0.0, "logits", [1.0, 0.0, 1.0, 0.0], 0, "mean", "native")
    if heads.mask.is_cuda:
        pytest.skip("names the CPU's backend")
    vectors = None, heads.labels, heads.mask, None
    numbers = [2.0, 1.0, 1.0, -1.0, -1.0]
    tensors = (x.detach() for x in heads[:6])
    args = (
        None,
        *tensors,
        *vectors,
        *(None,) * 5,
        numbers,
        *settings,
        "",
        1.0,
        True,
        8 * V * 2,
        True,
        [True, True, True],
    )
    torch.library.opcheck(torch.ops.distil_fast.chunked_loss.default, args)


def test_second_backward_and_second_derivative_are_refused() -> None:
    heads = make(torch.float32)
    loss = heads.loss().loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed over"):
        loss.backward()
    (grad,) = torch.autograd.grad(heads.loss().loss, heads.student_hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        grad.sum().backward()


FACES = {
    distil_fast.LinearDistillationLoss: distil_fast.linear_distillation_loss,
    distil_fast.LinearDivergenceLoss: distil_fast.linear_divergence_loss,
    distil_fast.LinearCrossEntropyLoss: distil_fast.linear_cross_entropy,
}


@pytest.mark.parametrize("face", FACES)
def test_modules_take_every_setting_and_default_of_their_functions(face: type[torch.nn.Module]) -> None:
    function = inspect.signature(FACES[face]).parameters
    taken = {**inspect.signature(face).parameters, **inspect.signature(face.forward).parameters}
    del taken["self"]
    assert taken.keys() == function.keys()
    assert all(taken[name].default == function[name].default for name in function)


def test_modules_are_their_functions() -> None:
    heads = make(torch.float32)
    settings: dict[str, Any] = {"temperature": 3.0, "divergence": "jsd", "student_softcap": 5.0, "precision": "fast"}
    biases = {"student_bias": heads.student_bias, "teacher_bias": heads.teacher_bias}
    both = heads.student_hidden, heads.student_weight, heads.teacher_hidden, heads.teacher_weight
    whole = distil_fast.LinearDistillationLoss(**settings, hard_weight=0.5, z_loss=0.01)
    expected = heads.loss(**settings, hard_weight=0.5, z_loss=0.01)
    assert torch.equal(whole(*both, heads.labels, soft_mask=heads.mask, **biases).loss, expected.loss)
    soft = distil_fast.LinearDivergenceLoss(**settings)(*both, mask=heads.mask, count=7.0, **biases)
    assert torch.equal(
        soft, distil_fast.linear_divergence_loss(*both, mask=heads.mask, count=7.0, **biases, **settings)
    )
    weights = torch.linspace(0.0, 2.0, V)
    hard = distil_fast.LinearCrossEntropyLoss(class_weights=there(weights), softcap=4.0)
    assert "class_weights" in hard.state_dict()
    value = hard(*both[:2], heads.labels, bias=heads.student_bias)
    exact = heads.exact()
    logits = reference.head_logits(*exact.leaves())
    truth = reference.cross_entropy(4.0 * torch.tanh(logits / 4.0), exact.labels, class_weights=weights)
    assert off(value, truth) < 2e-6


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "weight's width": ({"student_weight": torch.zeros(V, 7)}, ValueError, r"student_weight: expected shape \(V, 24\)"),
    "weight's rank": ({"student_weight": torch.zeros(WIDTH)}, ValueError, "student_weight: expected shape"),
    "weight's type": ({"student_weight": None}, TypeError, "student_weight: expected a tensor"),
    "bias' size": ({"student_bias": torch.zeros(3)}, ValueError, "student_bias: expected shape"),
    "other vocabulary": (
        {"teacher_weight": torch.zeros(V + 9, TEACHER_WIDTH), "teacher_bias": None},
        ValueError,
        "vocab_size",
    ),
    "other rows": ({"teacher_hidden": torch.zeros(3, TEACHER_WIDTH)}, ValueError, "leading shape"),
    "teacher with gradient": (
        {"teacher_hidden": torch.zeros(ROWS, TEACHER_WIDTH, requires_grad=True)},
        ValueError,
        "teacher_hidden requires grad",
    ),
    "no head": ({"teacher_weight": None, "teacher_bias": None}, ValueError, "teacher_logits: expected"),
    "half a head": ({"teacher_weight": None}, ValueError, "teacher_weight and teacher_bias: expected None"),
    "double beside single": ({"student_weight": torch.zeros(V, WIDTH).double()}, TypeError, "float64"),
    "no term": (
        {"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None, "labels": None},
        ValueError,
        "teacher_hidden and labels: expected at least one",
    ),
    "label": ({"labels": torch.full((ROWS,), V)}, ValueError, rf"0 <= label < {V} .* got {V} in row 0"),
    "mask": ({"soft_mask": torch.full((ROWS,), -1.0)}, ValueError, "token weights"),
    "temperature": ({"temperature": torch.zeros(ROWS)}, ValueError, "temperature"),
    "precision": ({"precision": "bf16"}, ValueError, "precision: expected one of exact, fast"),
    "chunk": ({"chunk_bytes": 0}, ValueError, "chunk_bytes"),
    "chunk's type": ({"chunk_bytes": 1.5}, TypeError, "chunk_bytes"),
    "gather": ({"gather": 1}, TypeError, "gather: expected True or False"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    """Expected, got, remedy; before any product is made."""
    changed, error, message = WRONG[name]
    arguments = {**make(torch.float32)._asdict(), **changed}
    mask = arguments.pop("mask")
    with pytest.raises(error, match=message):
        distil_fast.linear_distillation_loss(**{"soft_mask": mask, **{k: there(v) for k, v in arguments.items()}})


PEAK = """
from pathlib import Path
import torch, distil_fast
from tests.footprint import resident
rows, cols, width = 1024, 16384, 64
hidden, weight = (torch.randn(n, width, requires_grad=True) for n in (rows, cols))
teacher, head = torch.randn(rows, width), torch.randn(cols, width)
labels = torch.randint(0, cols, (rows,))
def step(n):
    loss = distil_fast.linear_distillation_loss(hidden[:n], weight, teacher[:n], head, labels[:n], chunk_bytes=4 << 20)
    loss.loss.backward()
step(8)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = resident("VmRSS")
step(rows)
print(resident("VmHWM") - before)
"""


def test_a_chunk_is_all_the_memory_there_is() -> None:
    """The peak above inputs and gradients stays far below the logits', which are 64 MB a model here."""
    ran = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 32 << 20
