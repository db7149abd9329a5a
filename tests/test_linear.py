"""The fused linear losses against the fp64 truth of whole logits, and the promises of chunking: memory, rows, dtypes.

The truth is reference.py's in float64 on the same numbers; bounds follow from what the products and the gradients are
rounded to. It knows nothing of single kernels. Next: test_products.py; oracle.py, which judges the rows themselves.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import distil_fast
from distil_fast import Hidden, LogProbs, Probs, reference
from distil_fast import heads as made_of
from tests.calls import there

ROOT = Path(__file__).parent.parent
ROWS, WIDTH, TEACHER_WIDTH, V = 37, 24, 40, 503
# of each gradient, relative: products in float32 and, in a half precision, the rounding of gradients on their way
BOUND = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
DTYPES = list(BOUND)


class Heads(NamedTuple):
    """Both models' hidden states, weights and biases, with labels and masks."""

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor
    labels: Tensor
    mask: Tensor

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.student_hidden, self.student_weight, self.student_bias

    def loss(self, module: Any = distil_fast, **how: Any) -> Any:
        """The loss of everything; `how` replaces or adds arguments."""
        labels = how.pop("labels", self.labels)
        heads = self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight
        biases = {"student_bias": self.student_bias, "teacher_bias": self.teacher_bias}
        return module.linear_distillation_loss(*heads, labels, **{"soft_mask": self.mask, **biases, **how})

    def exact(self) -> Heads:
        """The same numbers in float64, as leaves."""
        return Heads(*(x.detach().double().cpu() if x.is_floating_point() else x.cpu() for x in self)).wanting()

    def wanting(self) -> Heads:
        """The same, with gradients wanted."""
        return Heads(*(x.detach().requires_grad_() for x in self[:3]), *self[3:])


def make(dtype: torch.dtype, *leading: int, seed: int = 0) -> Heads:
    leading = leading or (ROWS,)
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return there((scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype))

    labels = torch.randint(0, V, leading, generator=g)
    mask = torch.rand(leading, generator=g) < 0.6
    labels = labels.masked_fill(torch.rand(leading, generator=g) < 0.6, -100)
    mask.flatten()[5:6], labels.flatten()[5:6] = False, -100  # a row that nothing uses
    mask.flatten()[4:5], labels.flatten()[3:4] = True, 3
    return Heads(
        normal(*leading, WIDTH),
        normal(V, WIDTH, scale=0.4),
        normal(V, scale=0.5),
        normal(*leading, TEACHER_WIDTH),
        normal(V, TEACHER_WIDTH, scale=0.3),
        normal(V, scale=0.5),
        there(labels),
        there(mask),
    ).wanting()


def off(actual: Tensor, expected: Tensor) -> float:
    """The error relative to what is expected, infinite where anything is nan or 0 was due."""
    assert actual.shape == expected.shape
    error = (actual.detach().cpu().double() - expected.double()).norm().item()
    size = expected.double().norm().item()
    return 0.0 if error == 0.0 else error / size if size and error < float("inf") else float("inf")


def check(heads: Heads, bound: float, **how: Any) -> Any:
    """Values and gradients against the truth; chunk_bytes and precision are ours alone."""
    ours = heads.loss(**how)
    settings = {k: v for k, v in how.items() if k not in ("chunk_bytes", "precision", "backend")}
    exact = heads.exact()
    truth = exact.loss(reference, **{"labels": exact.labels, **settings})
    for name in ("loss", "soft", "hard"):
        assert off(getattr(ours, name), getattr(truth, name)) <= max(2e-6, bound * 1e-3), name
    upstream = torch.rand(truth.loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    grads = torch.autograd.grad(ours.loss, heads.leaves(), there(upstream.to(ours.loss.dtype)))
    for mine, theirs, leaf in zip(
        grads, torch.autograd.grad(truth.loss, exact.leaves(), upstream), heads.leaves(), strict=True
    ):
        assert mine.dtype == leaf.dtype
        assert off(mine, theirs) <= bound
    return ours


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature 1": {"temperature": 1.0, "t_squared": False},
    "weights": {"soft_weight": 0.3, "hard_weight": torch.tensor(1.7)},
    "counts": {"soft_count": 11.0, "hard_count": torch.tensor(7.0)},
    "reverse": {"divergence": "reverse_kl", "temperature": 3.7},
    "jsd": {"divergence": distil_fast.JSD(0.2)},
    "smooth": {"label_smoothing": 0.1},
    "all rows": {"soft_mask": None},
    "no labels": {"labels": None},
    "soft off": {"soft_weight": 0.0},
    "class weights": {"class_weights": torch.linspace(0.0, 2.0, V)},
    "z-loss": {"z_loss": 0.02},
    "softcap": {"student_softcap": 4.0, "teacher_softcap": 6.0, "student_logit_scale": 0.5},
    "alpha-beta": {"divergence": distil_fast.AlphaBeta(0.3, 0.6)},
    "narrow": {"vocab_size": 401, "labels": "cut"},
}


def options(name: str, heads: Heads) -> dict[str, Any]:
    how = dict(OPTIONS[name])
    if how.get("labels") == "cut":
        how["labels"] = heads.labels.clamp(max=400)
    return {k: there(v) for k, v in how.items()}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_options(dtype: torch.dtype, name: str, reduction: str) -> None:
    if reduction != "mean" and name == "counts":
        pytest.skip("counts go with a mean")
    heads = make(dtype)
    check(heads, BOUND[dtype], reduction=reduction, chunk_bytes=8 * V * 5, **options(name, heads))


@pytest.mark.parametrize("chunk_bytes", [None, 1, 8 * V * 7])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: torch.dtype, reduction: str, chunk_bytes: int | None) -> None:
    check(make(dtype), BOUND[dtype], reduction=reduction, chunk_bytes=chunk_bytes)


def test_leading_dimensions_are_rows() -> None:
    heads = make(torch.float32, 3, 5, 4)
    assert check(heads, 2e-6, reduction="none").loss.shape == (3, 5, 4)
    strided = heads._replace(student_hidden=heads.student_hidden.detach().transpose(0, 1).contiguous().transpose(0, 1))
    check(strided.wanting(), 2e-6)


def test_temperatures_and_weights_by_row() -> None:
    heads = make(torch.float32)
    g = torch.Generator().manual_seed(2)
    weights = there((torch.rand(ROWS, generator=g) - 0.3).clamp(min=0.0))
    check(heads, 2e-6, temperature=there(1.0 + torch.rand(ROWS, generator=g)), soft_mask=weights, chunk_bytes=8 * V * 4)


def test_without_biases_and_with_one() -> None:
    heads = make(torch.float32)
    loss = distil_fast.linear_distillation_loss(*heads[:2], *heads[3:5], heads.labels, teacher_bias=heads.teacher_bias)
    exact = heads.exact()
    truth = reference.linear_distillation_loss(*exact[:2], *exact[3:5], exact.labels, teacher_bias=exact.teacher_bias)
    assert off(loss.loss, truth.loss) < 2e-6
    grads = torch.autograd.grad(loss.loss, heads[:2])
    for mine, theirs in zip(grads, torch.autograd.grad(truth.loss, exact[:2]), strict=True):
        assert off(mine, theirs) < 2e-6


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


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_as_the_models_meet(dtype: torch.dtype, apart: float) -> None:
    """The models' logits are `apart` from each other: the gradient stays within 1 % of the truth, where logits in the
    heads' dtype lose it."""
    g = torch.Generator().manual_seed(3)
    hidden = (torch.randn(64, 96, generator=g)).to(dtype)
    weight = (0.5 * torch.randn(2048, 96, generator=g)).to(dtype)
    # the student's last state differs, and with it its logits: by 0.5 apart
    other = hidden.clone()
    other[:, -1] = (other[:, -1].float() + 2 * apart * 8).to(dtype)
    leaf = there(other).requires_grad_()
    errors = {}
    exact = other.double().requires_grad_()
    truth = reference.linear_distillation_loss(exact, weight.double(), hidden.double(), weight.double()).loss
    (expected,) = torch.autograd.grad(truth, exact)
    for precision in ("exact", "fast"):
        heads = leaf, there(weight), there(hidden), there(weight)
        loss = distil_fast.linear_distillation_loss(*heads, precision=precision).loss
        errors[precision] = off(torch.autograd.grad(loss, leaf)[0], expected)
    assert errors["exact"] < 0.01
    if dtype == torch.bfloat16 and apart <= 1e-2:
        assert errors["fast"] > 0.01  # so that the test says something


def test_float16_gradients_do_not_underflow_before_a_scaler_acts() -> None:
    """With weights of 1 / N the gradient is below float16's range; a loss scale of 2^16 brings it back."""
    heads = make(torch.float16)
    loss = heads.loss(soft_count=1e6, hard_count=1e6).loss
    exact = heads.exact()
    truth = exact.loss(reference, soft_count=1e6, hard_count=1e6).loss
    grads = torch.autograd.grad(loss * 2.0**16, heads.leaves())
    for mine, theirs in zip(grads, torch.autograd.grad(truth * 2.0**16, exact.leaves()), strict=True):
        assert off(mine, theirs) < BOUND[torch.float16]


@pytest.mark.parametrize("counts", [{}, {"hard_count": 0.0}], ids=["no label", "no count"])
def test_a_term_without_a_row_leaves_float16_its_unit(counts: dict[str, Any]) -> None:
    """A denominator of 0 is a share of 0, and not of the infinity that no unit is made of."""
    heads = make(torch.float16)
    heads = heads._replace(labels=heads.labels if counts else torch.full_like(heads.labels, -100))
    exact = heads.exact()
    truth = exact.loss(reference, soft_count=1e6, **counts).loss
    grads = torch.autograd.grad(heads.loss(soft_count=1e6, **counts).loss * 2.0**16, heads.leaves())
    for mine, theirs in zip(grads, torch.autograd.grad(truth * 2.0**16, exact.leaves()), strict=True):
        assert off(mine, theirs) < BOUND[torch.float16]


def test_gradients_accumulate_over_parts_of_a_batch() -> None:
    heads = make(torch.float32)
    whole = torch.autograd.grad(heads.loss().loss, heads.leaves())
    soft_count, hard_count = float(heads.mask.sum()), float((heads.labels != -100).sum())
    for leaf in heads.leaves():
        leaf.grad = None
    for part in (slice(0, 10), slice(10, ROWS)):
        hidden, teacher = heads.student_hidden[part], heads.teacher_hidden[part]
        distil_fast.linear_distillation_loss(
            hidden,
            heads.student_weight,
            teacher,
            heads.teacher_weight,
            heads.labels[part],
            student_bias=heads.student_bias,
            teacher_bias=heads.teacher_bias,
            soft_mask=heads.mask[part],
            soft_count=soft_count,
            hard_count=hard_count,
        ).loss.backward()
    for leaf, expected in zip(heads.leaves(), whole, strict=True):
        assert leaf.grad is not None
        assert off(leaf.grad, expected.cpu()) < 2e-6


def test_float32_weights_beside_half_precision_states() -> None:
    """Master weights: computed in the states' dtype, their gradient in float32."""
    heads = make(torch.bfloat16)
    masters = Heads(*(x.float() if i in (1, 2, 4, 5) else x for i, x in enumerate(heads))).wanting()
    grads = torch.autograd.grad(masters.loss().loss, masters.leaves())
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    for mine, theirs in zip(grads, torch.autograd.grad(heads.loss().loss, heads.leaves()), strict=True):
        assert off(mine, theirs.cpu()) < 6e-3


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
    args = (None, *tensors, *vectors, *(None,) * 5, numbers, *settings, "", 1.0, True, 8 * V * 2, [True, True, True])
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


def test_single_terms_are_those_of_the_whole() -> None:
    heads = make(torch.float32)
    whole = heads.loss(temperature=1.0)
    states, teacher = (heads.student_hidden, heads.student_weight), (heads.teacher_hidden, heads.teacher_weight)
    biases = {"student_bias": heads.student_bias, "teacher_bias": heads.teacher_bias}
    soft = distil_fast.linear_divergence_loss(*states, *teacher, mask=heads.mask, **biases)
    hard = distil_fast.linear_cross_entropy(*states, heads.labels, bias=heads.student_bias)
    assert off(soft, whole.soft.cpu()) < 1e-6
    assert off(hard, whole.hard.cpu()) < 1e-6


@pytest.mark.parametrize("form", ["hidden", "logits", "log_probs", "probs"])
def test_any_form_of_teacher_is_the_same_teacher(form: str) -> None:
    """`Hidden` beside the student's logits, and a teacher's rows beside the student's head."""
    heads = make(torch.float32)
    bias = {"student_bias": heads.student_bias}
    expected = heads.loss()
    grads = torch.autograd.grad(expected.loss, heads.leaves())
    teacher = reference.head_logits(heads.teacher_hidden, heads.teacher_weight, heads.teacher_bias)
    if form == "hidden":
        logits = reference.head_logits(*heads.leaves())
        given = Hidden(heads.teacher_hidden, heads.teacher_weight, heads.teacher_bias)
        loss = distil_fast.distillation_loss(logits, given, heads.labels, soft_mask=heads.mask)
    else:
        rows = {
            "logits": lambda: teacher,
            "log_probs": lambda: LogProbs((teacher / 2.0).log_softmax(-1)),
            "probs": lambda: Probs((teacher / 2.0).softmax(-1)),
        }[form]()
        student = heads.student_hidden, heads.student_weight
        loss = distil_fast.linear_distillation_loss(*student, rows, None, heads.labels, soft_mask=heads.mask, **bias)
    assert off(loss.loss, expected.loss.detach().cpu()) < 3e-6
    for mine, theirs in zip(torch.autograd.grad(loss.loss, heads.leaves()), grads, strict=True):
        assert off(mine, theirs.cpu()) < 1e-5


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "ignore"])
def test_a_top_k_teacher_beside_the_students_head(tail: str) -> None:
    heads = make(torch.float32)
    logits = reference.head_logits(heads.teacher_hidden, heads.teacher_weight, heads.teacher_bias)
    teacher = distil_fast.TopK.from_logits(logits, 6, 2.0, tail)
    how = {"soft_mask": heads.mask, "student_bias": heads.student_bias, "chunk_bytes": 8 * V * 5}
    loss = distil_fast.linear_distillation_loss(*heads[:2], teacher, None, heads.labels, **how).loss
    whole = reference.head_logits(*heads.leaves())
    expected = distil_fast.distillation_loss(whole, teacher, heads.labels, soft_mask=heads.mask).loss
    assert off(loss, expected.detach().cpu()) < 1e-6
    grads = torch.autograd.grad(loss, heads.leaves())
    for mine, theirs in zip(grads, torch.autograd.grad(expected, heads.leaves()), strict=True):
        assert off(mine, theirs.cpu()) < 3e-6


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
