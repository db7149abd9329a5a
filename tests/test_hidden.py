"""Losses over layers: hidden states, attention maps and raw logits against plain torch's formulae, and wrong arguments.

The authors' own expressions are written out here. What one pair of tensors comes to in every dtype is test_pairs.py's
and test_cosine.py's. Next: distil_fast/hidden.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import distil_fast
from distil_fast import reference
from tests import oracle

B, L, HEADS = 3, 6, 4
MASK = torch.arange(L) < torch.tensor([[6], [4], [1]])
both_kinds = pytest.mark.parametrize("kind", ["cosine", "mse"])


def states(layers: int, width: int, *seed: object, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = oracle.generator("states", layers, width, *seed)
    return [torch.randn(B, L, width, generator=g, dtype=torch.float64).to(dtype) for _ in range(layers)]


def maps(layers: int, *seed: object, heads: int = HEADS) -> list[Tensor]:
    """Attention probabilities, 0 for padded keys."""
    g = oracle.generator("maps", layers, heads, *seed)
    scores = [2 * torch.randn(B, heads, L, L, generator=g, dtype=torch.float64) for _ in range(layers)]
    return [s.masked_fill(~MASK[:, None, None, :], -torch.inf).softmax(-1) for s in scores]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in tensors]


def same(ours: Tensor, theirs: Tensor, inputs: Any, rtol: float = 1e-11) -> None:
    """Values, and gradients by all inputs."""
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0, check_dtype=False)
    grads = zip(*(torch.autograd.grad(x, inputs, allow_unused=True) for x in (ours, theirs)), strict=True)
    for a, b in grads:
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= max(rtol, 3e-6 if a.dtype == torch.float32 else 0) * b.norm()


# ------------------------------------------------------------------------------------------------ one pair


def test_mse_is_torchs_over_the_selected_tokens() -> None:
    (student,), (teacher,) = leaves(states(1, 9, "s")), states(1, 9, "t")
    same(distil_fast.mse_loss(student, teacher), F.mse_loss(student, teacher), [student])
    same(distil_fast.mse_loss(student, teacher, MASK), F.mse_loss(student[MASK], teacher[MASK]), [student])


def test_logit_mse_is_distilberts() -> None:
    """`alpha_mse` of the authors' training code: a sum over selected logits, divided by the number of rows."""
    (student,), (teacher,) = leaves(states(1, 37, "s")), states(1, 37, "t")
    selected = [x[MASK] for x in (student, teacher)]
    theirs = nn.MSELoss(reduction="sum")(*selected) / selected[0].size(0)
    same(distil_fast.logit_mse(student, teacher, MASK), theirs, [student])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", [distil_fast.mse_loss, distil_fast.logit_mse])
def test_a_vocabulary_masked_in_both(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    student, teacher = (x[0].to(dtype) for x in (states(1, 37, "s"), states(1, 37, "t")))
    student[..., -5:] = teacher[..., -5:] = -torch.inf
    student.requires_grad_()
    loss = function(student, teacher, MASK)
    size = 37 if function is distil_fast.mse_loss else 1
    expected = (student - teacher)[..., :-5].detach()[MASK].double().square().sum() / (MASK.sum() * size)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6 if dtype == torch.float32 else 5e-3)
    loss.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert not student.grad[..., -5:].any()


# ------------------------------------------------------------------------------------------------ layers


def plain(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """DistilBERT's cosine, and torch's MSE, over the selected tokens."""
    student, teacher = student[MASK], teacher[MASK]
    if kind == "mse":
        return F.mse_loss(student, teacher)
    return F.cosine_embedding_loss(student, teacher, student.new_ones(len(student)))


@both_kinds
def test_several_layers_with_several(kind: str) -> None:
    student, teacher = leaves(states(3, 8, "s")), states(5, 8, "t")
    layers = [(0, 1), (2, 4), (2, 0), (-1, -1)]

    def losses() -> list[Tensor]:
        return [plain(kind, student[s], teacher[t]) for s, t in layers]

    mean = torch.stack(losses()).mean()
    same(distil_fast.hidden_loss(student, teacher, MASK, layer_map=layers, kind=kind), mean, student)
    weights = [0.5, 2.0, torch.tensor(1.0), 0.0]
    total = torch.stack([w * x for w, x in zip(weights, losses(), strict=True)]).sum()
    how: dict[str, Any] = {"layer_map": layers, "kind": kind, "layer_weights": weights}
    same(distil_fast.hidden_loss(student, teacher, MASK, **how), total, student)
    expected = reference.hidden_loss(student, teacher, MASK, **how)
    same(distil_fast.hidden_loss(student, teacher, MASK, **how), expected, student)


@both_kinds
def test_one_to_one_by_default(kind: str) -> None:
    student, teacher = tuple(leaves(states(3, 8, "s"))), tuple(states(3, 8, "t"))
    expected = reference.hidden_loss(student, teacher, kind=kind)
    same(distil_fast.hidden_loss(student, teacher, kind=kind), expected, student)


@both_kinds
def test_projections_learn(kind: str) -> None:
    """One for each pair, none where the widths agree, or one for all; the gradient reaches their parameters."""
    torch.manual_seed(0)
    student, teacher = leaves(states(2, 6, "s")), states(2, 8, "t")
    student.append(states(1, 8, "third")[0].requires_grad_())
    own = [nn.Linear(6, 8).double(), None, nn.Linear(6, 8, bias=False).double()]
    layers = [(0, 1), (2, 0), (1, 1)]
    modules = [m for m in own if m is not None]
    inputs = [*student, *(p for m in modules for p in m.parameters())]
    losses = [
        plain(kind, s if m is None else m(s), teacher[t])
        for (s, t), m in zip([(student[i], j) for i, j in layers], own, strict=True)
    ]
    ours = distil_fast.hidden_loss(student, teacher, MASK, layer_map=layers, kind=kind, projections=own)
    same(ours, torch.stack(losses).mean(), inputs)
    shared = modules[0]
    ours = distil_fast.hidden_loss(student[:2], teacher, MASK, kind=kind, projections=shared)
    theirs = torch.stack([plain(kind, shared(s), t) for s, t in zip(student[:2], teacher, strict=True)]).mean()
    same(ours, theirs, [*student[:2], *shared.parameters()])
    doubled = distil_fast.hidden_loss(student[2:], teacher[:1], MASK, kind=kind, projections=lambda x: 2 * x)
    same(doubled, plain(kind, 2 * student[2], teacher[0]), student[2:])


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    student, teacher = leaves(states(2, 33, "s", dtype=dtype)), states(2, 33, "t", dtype=torch.bfloat16)
    loss = distil_fast.hidden_loss(student, teacher, MASK, kind=kind)
    assert loss.dtype == torch.float32
    wide = leaves([s.detach().double() for s in student])
    exact = reference.hidden_loss(wide, [t.double() for t in teacher], MASK, kind=kind)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss, student), torch.autograd.grad(exact, wide), strict=True):
        assert (ours - theirs).norm() <= {4: 3e-6, 2: 4e-3}[dtype.itemsize] * theirs.norm()


# ------------------------------------------------------------------------------------------------ attention


def test_attention_mse_is_tinyberts_without_padding() -> None:
    """Of full sequences the authors' code computes this for each pair of layers, and adds them up."""
    student, teacher = (
        [2 * torch.randn(B, HEADS, L, L, generator=oracle.generator(name, i), dtype=torch.float64) for i in range(2)]
        for name in "st"
    )
    student = leaves(student)
    losses = [
        nn.MSELoss()(*(torch.where(x <= -1e2, torch.zeros_like(x), x) for x in pair))
        for pair in zip(student, teacher, strict=True)
    ]
    same(2 * distil_fast.attention_loss(student, teacher), torch.stack(losses).sum(), student)


def test_attention_mse_beside_textbrewers() -> None:
    """It leaves padded keys out of the mean too: of sequences that are equally long, keys / real keys times ours."""
    mask = torch.arange(L).expand(B, L) < 4
    student, teacher = ([m.masked_fill(~mask[:, None, None, :], 0.0) for m in maps(1, name)] for name in "st")
    student = leaves(student)
    rows = mask.to(student[0]).unsqueeze(1).expand(-1, HEADS, -1)
    squares = F.mse_loss(student[0], teacher[0], reduction="none") * rows.unsqueeze(-1) * rows.unsqueeze(2)
    theirs = squares.sum() / rows.sum(dim=2).pow(2).sum()
    same(L / 4 * distil_fast.attention_loss(student, teacher, mask), theirs, student)


def test_attention_kl_is_a_mean_over_heads_and_real_queries() -> None:
    student, teacher = leaves(maps(2, "s")), maps(2, "t")
    real = MASK.unsqueeze(1).expand(B, HEADS, L)

    def kl(s: Tensor, t: Tensor) -> Tensor:
        return (
            torch.where(t == 0, 0.0, t * (t.clamp(min=1e-300).log() - s.clamp(min=1e-300).log())).sum(-1)[real].mean()
        )

    theirs = torch.stack([kl(s, t) for s, t in zip(student, teacher, strict=True)]).mean()
    same(distil_fast.attention_loss(student, teacher, MASK, kind="kl"), theirs, student)


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_attention_masks_maps_and_counts(kind: str) -> None:
    student, teacher = leaves(maps(3, "s")), maps(2, "t")
    layers = [(0, 1), (2, 0), (-1, -1)]
    for mask, count in itertools.product((None, MASK, MASK.long(), MASK * 0.5), (None, 7, torch.tensor(3.0))):
        how: dict[str, Any] = {"layer_map": layers, "kind": kind, "count": count}
        expected = reference.attention_loss(student, teacher, mask, **how)
        same(distil_fast.attention_loss(student, teacher, mask, **how), expected, student)
    counted = distil_fast.attention_loss(student, teacher, MASK, count=int(MASK.sum()), layer_map=layers, kind=kind)
    same(counted, distil_fast.attention_loss(student, teacher, MASK, layer_map=layers, kind=kind), student)
    averaged = [x.mean(1, keepdim=True) for x in teacher]
    distil_fast.attention_loss([student[0].mean(1, keepdim=True)], averaged[:1], MASK, kind=kind).backward()
    narrow = distil_fast.attention_loss([student[0][:, :, :2]], [teacher[0][:, :, :2]], MASK[:, :2], kind=kind)
    assert narrow.isfinite()  # queries need not be as many as keys


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_maps_of_one_model(kind: str) -> None:
    """No loss; and padded rows, which hold anything, reach nothing."""
    teacher = [m.float() for m in maps(1, "t")]
    student = leaves(teacher)
    loss = distil_fast.attention_loss(student, teacher, MASK, kind=kind)
    assert loss.item() == 0.0
    spoilt = [m.clone() for m in teacher]
    spoilt[0].masked_fill_(~MASK[:, None, :, None], float("nan"))
    assert distil_fast.attention_loss(student, spoilt, MASK, kind=kind).item() == 0.0


# ------------------------------------------------------------------------------------------------ torch's machinery


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_whole() -> None:
    student, teacher = leaves(states(3, 8, "s", dtype=torch.float32)), states(3, 8, "t", dtype=torch.float32)
    heads = [leaves([m.float() for m in maps(2, "s")]), [m.float() for m in maps(2, "t")]]
    project = nn.Linear(8, 8)

    def loss() -> Tensor:
        hidden = distil_fast.hidden_loss(
            student, teacher, MASK, layer_map=[(0, 1), (2, 2)], kind="mse", projections=[project, None]
        )
        attention = distil_fast.attention_loss(*heads, MASK, kind="kl")
        return hidden + attention + distil_fast.logit_mse(student[1], teacher[1], MASK)

    inputs = [*student, *heads[0], *project.parameters()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    same(compiled(), loss(), inputs, rtol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "squared", "kl"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_op_is_a_good_citizen(kind: str, reduction: str) -> None:
    student, teacher = (m.flatten(0, 1)[..., :4].float() + 0.1 for m in (*maps(1, "s"), *maps(1, "t")))
    weight, settings = torch.tensor(2.0), ([-1.0, -1.0], kind, 0.25, reduction, "native")
    args = (student, teacher, torch.rand(student.shape[:-1]), weight, None, *settings)
    torch.library.opcheck(torch.ops.distil_fast.pair_loss, args)
    upstream = torch.rand(student.shape[:-1] if reduction == "none" else ())
    torch.library.opcheck(torch.ops.distil_fast.pair_loss_backward, (upstream, *args))


# ------------------------------------------------------------------------------------------------ modules


def test_hidden_loss_module_owns_its_projections() -> None:
    torch.manual_seed(0)
    layers = [(0, 1), (1, 2)]
    module = distil_fast.HiddenLoss(layer_map=layers, kind="mse", student_width=6, teacher_width=8).double()
    assert len(list(module.parameters())) == 4
    assert module.projections is not None
    student, teacher = leaves(states(2, 6, "s")), states(3, 8, "t")
    inputs = [*student, *module.parameters()]
    expected = reference.hidden_loss(
        student, teacher, MASK, layer_map=layers, kind="mse", projections=list(module.projections), count=5
    )
    same(module(student, teacher, MASK, count=5), expected, inputs)
    other = distil_fast.HiddenLoss(layer_map=layers, kind="mse", student_width=6, teacher_width=8).double()
    other.load_state_dict(module.state_dict())
    same(other(student, teacher, MASK), module(student, teacher, MASK), student)
    assert "kind='mse'" in repr(module)
    assert not list(distil_fast.HiddenLoss().parameters())
    weighted = distil_fast.HiddenLoss(layer_weights=[2.0, 1.0, 0.5])
    pair = states(3, 8, "u"), teacher
    assert weighted(*pair, MASK) == distil_fast.hidden_loss(*pair, MASK, layer_weights=[2.0, 1.0, 0.5])
    for wrong in ({"student_width": 6}, {"student_width": 6, "teacher_width": 8}):
        with pytest.raises(ValueError, match="student_width, teacher_width and layer_map: expected all three"):
            distil_fast.HiddenLoss(**wrong)


# ------------------------------------------------------------------------------------------------ wrong arguments

S, T = states(2, 6, "s"), states(3, 8, "t")
A = maps(2, "a")
WRONG_STATES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a tensor": (
        {"student_states": S[0]},
        TypeError,
        r"student_states: expected a sequence.*got Tensor.*\(student_sta",
    ),
    "lengths": (
        {"teacher_states": T},
        ValueError,
        r"layer_map: expected pairs.*2 student_states.*3 teacher_.*\(1, 2\)",
    ),
    "no layers": ({"layer_map": []}, ValueError, r"layer_map: expected at least one pair.*\[\(-1, -1\)\]"),
    "three": ({"layer_map": [(0, 1, 2)]}, TypeError, r"layer_map: expected pairs .*got \(0, 1, 2\)"),
    "a number": ({"layer_map": [1]}, TypeError, "layer_map: expected pairs .*got 1"),
    "a float": ({"layer_map": [(0, 1.0)]}, TypeError, r"layer_map: expected pairs .*got \(0, 1.0\)"),
    "beyond": ({"layer_map": [(0, 0), (1, 2)]}, ValueError, r"a teacher's layer from -2 to 1, got 2 in \(1, 2\)"),
    "before": ({"layer_map": [(-3, 0)]}, ValueError, r"a student's layer from -2 to 1, got -3 in \(-3, 0\)"),
    "kind": ({"kind": "l2"}, ValueError, "kind: expected one of cosine, mse, got 'l2'"),
    "weights": ({"layer_weights": [1.0]}, ValueError, "layer_weights: expected one number for each of 2 .*got 1"),
    "a weight": ({"layer_weights": 2.0}, TypeError, "layer_weights: expected one number for each pair.*got float"),
    "nan": ({"layer_weights": [1.0, float("nan")]}, ValueError, "weight: expected a finite number, got nan"),
    "projections": ({"projections": [None]}, ValueError, "projections: expected one, or one for each of 2 .*got 1"),
    "projection": ({"projections": [None, 3]}, TypeError, "projections: expected callables.*got int"),
    "widths": (
        {"teacher_states": T[:2]},
        ValueError,
        r"projections: expected one for layers \(0, 0\).*nn.Linear\(6, 8\)",
    ),
    "projected": (
        {"teacher_states": T[:2], "projections": nn.Linear(6, 7).double()},
        ValueError,
        r"projections: expected the teacher's width 8 for layers \(0, 0\), got 7",
    ),
    "mask": ({"mask": MASK[:2]}, ValueError, r"mask: expected shape \(3, 6\).*got \(2, 6\)"),
    "integers": ({"mask": MASK.long()}, TypeError, r"mask: expected bool.*int64.*bool\(\)"),
    "count": ({"count": -1}, ValueError, "count: expected .*>= 0, got -1"),
    "a list": ({"student_states": [S[0], [1.0]]}, TypeError, "student_states: expected a tensor, got list"),
    "dtype": ({"teacher_states": [s.float() for s in S]}, TypeError, "teacher_states: .*float64.*Convert"),
    "grad": ({"teacher_states": leaves(S)}, ValueError, "teacher_states requires grad.*no_grad"),
    "backend": ({"backend": "gpu"}, ValueError, "backend: expected one of .*got 'gpu'"),
}
WRONG_MAPS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a tensor": ({"teacher_attentions": A[0]}, TypeError, "teacher_attentions: expected a sequence.*got Tensor"),
    "lengths": ({"teacher_attentions": A[:1]}, ValueError, "layer_map: expected pairs.*2 student_att.*1 teacher_att"),
    "heads": (
        {"teacher_attentions": maps(2, "b", heads=2)},
        ValueError,
        r"teacher_attentions: expected 4 heads.*\(0, 0\), got 2.*\.mean\(1, keepdim=True\)",
    ),
    "no heads": ({"student_attentions": [x[:, 0] for x in A]}, ValueError, r"\[B, heads, queries, keys\].*unsqueeze"),
    "kind": ({"kind": "cosine"}, ValueError, "kind: expected one of mse, kl, got 'cosine'"),
    "mask": ({"attention_mask": MASK[:, :3]}, ValueError, r"attention_mask: expected shape \(3, 6\).*got \(3, 3\)"),
    "a list": ({"attention_mask": [1]}, TypeError, "attention_mask: expected a tensor, got list"),
    "count": ({"count": float("inf")}, ValueError, "count: expected .*>= 0, got inf"),
    "keys": ({"teacher_attentions": [x[..., :4] for x in A]}, ValueError, r"teacher_attentions: expected student_att"),
    "negative": ({"attention_mask": -1.0 * MASK}, ValueError, "mask: expected .*>= 0, got -1.0 in row 0"),
}


@pytest.mark.parametrize("case", WRONG_STATES.values(), ids=WRONG_STATES)
def test_wrong_states(case: tuple[dict[str, Any], type[Exception], str]) -> None:
    spoilt, error, message = case
    arguments = {"student_states": S, "teacher_states": S, **spoilt}
    with pytest.raises(error, match=message):
        distil_fast.hidden_loss(**arguments)


@pytest.mark.parametrize("case", WRONG_MAPS.values(), ids=WRONG_MAPS)
def test_wrong_maps(case: tuple[dict[str, Any], type[Exception], str]) -> None:
    spoilt, error, message = case
    arguments = {"student_attentions": A, "teacher_attentions": A, **spoilt}
    with pytest.raises(error, match=message):
        distil_fast.attention_loss(**arguments)


def test_wrong_pairs() -> None:
    student, teacher = S[0].float().requires_grad_(), S[1].float()
    cases: list[tuple[Callable[..., Tensor], tuple[Any, ...], type[Exception], str]] = [
        (distil_fast.mse_loss, (None, teacher), TypeError, "student_hidden: expected a tensor, got NoneType"),
        (distil_fast.mse_loss, (student, teacher[:2]), ValueError, "teacher_hidden: expected student_hidden's shape"),
        (distil_fast.mse_loss, (student, teacher, None, 2, "sum"), ValueError, "count: expected reduction='mean'"),
        (distil_fast.logit_mse, (student, teacher[..., :5]), ValueError, r"padded, .*logits\[\.\.\., :5\]"),
        (distil_fast.logit_mse, (student, teacher, MASK.int()), TypeError, r"mask: expected bool.*bool\(\)"),
        (
            distil_fast.logit_mse,
            (student, teacher, MASK.float() - 1.0),
            ValueError,
            "mask: expected .*got -1.0 in row 10",
        ),
        (distil_fast.logit_mse, (student, teacher, None, None, "avg"), ValueError, "reduction: expected one of"),
        (distil_fast.logit_mse, (student.mT, teacher.mT), ValueError, "contiguous"),
    ]
    for function, args, error, message in cases:
        with pytest.raises(error, match=message):
            function(*args)
