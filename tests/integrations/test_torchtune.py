"""Ours in the place of torchtune's KD losses: the same values and gradients, and the right ones where theirs are not.

Against the installed package, and against the formulae in float64. It knows nothing of kernels.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchtune")

from omegaconf import OmegaConf
from torchtune import config, training
from torchtune.modules import loss as host

from distil_fast.integrations import HostChangedError
from distil_fast.integrations import torchtune as ours

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

V = 61
WHOLE = ["ForwardKLLoss", "ReverseKLLoss", "SymmetricKLLoss"]
CHUNKED = [name.replace("Loss", "WithChunkedOutputLoss") for name in WHOLE]
OPTIONS: dict[str, dict[str, Any]] = {name: {} for name in WHOLE + CHUNKED}
OPTIONS["SymmetricKLLoss"] = OPTIONS["SymmetricKLWithChunkedOutputLoss"] = {"sym_kd_ratio": 0.3}


def batch(batch_size: int = 3, length: int = 16, ignored: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, S, V] in float64 and labels [B, S]: some ignored, the end of the first sequence padded."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(batch_size, length, V, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(V, (batch_size, length), generator=g)
    labels[torch.rand(batch_size, length, generator=g) < ignored] = -100
    labels[0, length // 2 :] = -100
    return student, teacher, labels


def truth(name: str, student: Tensor, teacher: Tensor, labels: Tensor, normalize: bool = True) -> Tensor:
    """The formulae in float64: cross-entropy with soft targets, reverse KL, 0.3 of the one and 0.7 of the other."""
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    forward = -(log_p.exp() * log_q).sum(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    rows = {"F": forward, "R": reverse, "S": 0.3 * forward + 0.7 * reverse}[name[0]]
    mask = labels != -100
    return (rows * mask).sum() / (mask.sum() if normalize else 1)


def evaluate(loss: Any, student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The value and the gradient of `loss(student, ...)`."""
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, *arguments)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def chunked(loss: nn.Module, count: int = 8, how: str = "chunk") -> Any:
    """`loss` of whole logits: cut as torchtune 0.6's models cut (chunk), or as newer ones do (tensor_split)."""

    def of_whole(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return loss(list(getattr(student, how)(count, 1)), list(getattr(teacher, how)(count, 1)), labels)

    return of_whole


def pair(name: str) -> tuple[Any, Any]:
    theirs, mine = getattr(host, name)(**OPTIONS[name]), getattr(ours, name)(**OPTIONS[name])
    return (chunked(theirs), chunked(mine)) if name in CHUNKED else (theirs, mine)


@pytest.mark.parametrize("name", WHOLE + CHUNKED)
def test_float32_is_as_theirs_and_as_the_truth(name: str) -> None:
    student, teacher, labels = batch()
    student, teacher = student.float(), teacher.float()
    expected = evaluate(lambda s: truth(name, s, teacher, labels), student)
    theirs, mine = (evaluate(loss, student, teacher, labels) for loss in pair(name))
    for found, peer, exact in zip(mine, theirs, expected, strict=True):
        assert error(found, exact) < 3e-6
        assert error(peer, exact) < 3e-6
    assert mine[0].dtype == theirs[0].dtype == torch.float32
    assert not mine[1][labels == -100].any()


@pytest.mark.parametrize("name", WHOLE + CHUNKED)
def test_bfloat16_is_not_farther_from_the_truth_than_theirs(name: str) -> None:
    student, teacher, labels = batch()
    student, teacher = student.bfloat16(), teacher.bfloat16()
    expected = evaluate(lambda s: truth(name, s, teacher, labels), student.double())
    theirs, mine = (evaluate(loss, student, teacher, labels) for loss in pair(name))
    assert mine[1].dtype == torch.bfloat16
    assert error(mine[0], expected[0]) <= max(error(theirs[0], expected[0]), 2e-6)
    rounded = error(expected[1].bfloat16(), expected[1])
    assert error(mine[1], expected[1]) <= min(error(theirs[1], expected[1]) * 1.001, 1.1 * rounded)


@pytest.mark.parametrize("name", WHOLE)
def test_normalize_false_is_the_sum(name: str) -> None:
    student, teacher, labels = batch()
    theirs, mine = (
        evaluate(loss, student.float(), teacher.float(), labels, False) for loss in (pair(name)[0], pair(name)[1])
    )
    expected = evaluate(lambda s: truth(name, s, teacher.float(), labels, False), student.float())
    for found, peer, exact in zip(mine, theirs, expected, strict=True):
        assert error(found, exact) < 3e-6
        assert error(peer, exact) < 3e-6


def test_rows_and_labels_may_be_flat_as_the_recipes_make_them() -> None:
    student, teacher, labels = batch()
    loss = ours.ForwardKLLoss()
    flat = loss(student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten())
    assert flat == loss(student, teacher, labels) == loss(student, teacher, labels.flatten())
    with pytest.raises(ValueError, match=r"labels: expected one for each row .* got shape \(2, 16\)"):
        loss(student, teacher, labels[:2])


@pytest.mark.parametrize("name", WHOLE + CHUNKED)
def test_another_ignore_index(name: str) -> None:
    student, teacher, labels = batch()
    renamed = torch.where(labels == -100, 7, torch.where(labels == 7, 8, labels))
    options = OPTIONS[name] | {"ignore_index": 7}
    mine = getattr(ours, name)(**options)
    mine = chunked(mine) if name in CHUNKED else mine
    assert error(mine(student, teacher, renamed), truth(name, student, teacher, labels)) < 1e-12


# ------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("name", WHOLE + CHUNKED)
def test_without_a_label_ours_is_zero_with_a_gradient_where_theirs_has_none_or_is_nan(name: str) -> None:
    student, teacher, labels = batch()
    labels.fill_(-100)
    theirs, mine = pair(name)
    value, gradient = evaluate(mine, student, teacher, labels)
    assert value == 0
    assert not gradient.any()
    found = theirs(student.requires_grad_(), teacher, labels)
    if name in ("ReverseKLWithChunkedOutputLoss", "SymmetricKLWithChunkedOutputLoss"):
        assert torch.isnan(found)
    else:
        assert found == 0
        assert not found.requires_grad  # their backward would raise


@pytest.mark.parametrize("name", WHOLE + CHUNKED)
@pytest.mark.parametrize("who", ["both", "student", "teacher"])
def test_infinite_logits_are_read_as_theirs_reads_them(name: str, who: str) -> None:
    student, teacher, labels = (part.float() if part.is_floating_point() else part for part in batch())
    for logits, side in ((student, "student"), (teacher, "teacher")):
        if who in (side, "both"):
            logits[..., -5:] = -torch.inf
    theirs, mine = (evaluate(loss, student, teacher, labels) for loss in pair(name))
    torch.testing.assert_close(mine[0], theirs[0], rtol=3e-6, atol=0)
    value, gradient = evaluate(lambda s: without_infinite_columns(name, s, teacher, labels), student.double())
    assert error(mine[0], value) < 3e-6
    assert error(mine[1], gradient) < 3e-6
    if name.startswith("Forward"):
        assert error(theirs[1], gradient) < 3e-6
    else:  # 0 times -inf in its backward
        assert torch.isnan(theirs[1]).any()


def without_infinite_columns(name: str, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """What torchtune's values are: sums over the columns where neither model (forward: the student) is infinite."""
    log_q, log_p = student.log_softmax(-1), teacher.double().log_softmax(-1)
    forward = -torch.where(student.isinf(), 0.0, log_p.exp() * torch.where(student.isinf(), 0.0, log_q)).sum(-1)
    out = student.isinf() | teacher.isinf()
    reverse = (log_q.exp() * torch.where(out, 0.0, torch.where(out, 0.0, log_q) - torch.where(out, 0.0, log_p))).sum(-1)
    rows = {"F": forward, "R": reverse, "S": 0.3 * forward + 0.7 * reverse}[name[0]]
    return rows[labels != -100].mean()


def test_a_row_that_is_not_a_number_is_not_hidden() -> None:
    student, teacher, labels = batch(ignored=0.0)
    student[1, 3, 5] = torch.nan
    assert torch.isnan(host.ForwardKLLoss()(student, teacher, labels))
    assert torch.isnan(ours.ForwardKLLoss()(student, teacher, labels))
    labels[1, 3] = -100  # what is ignored is not read by ours
    assert torch.isfinite(ours.ForwardKLLoss()(student, teacher, labels))


# ------------------------------------------------------------------------------------------------ chunks


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("how", ["chunk", "tensor_split"])
@pytest.mark.parametrize(("batch_size", "length"), [(1, 10), (1, 13), (2, 25), (2, 3), (1, 16)])
def test_chunks_of_any_length_are_right(name: str, how: str, batch_size: int, length: int) -> None:
    student, teacher, labels = batch(batch_size, length, ignored=0.2)
    labels[0] = torch.arange(length)  # so that a label for the wrong chunk shows
    labels[0, : length // 3] = -100
    expected = evaluate(lambda s: truth(name, s, teacher, labels), student)
    mine = getattr(ours, name)(**OPTIONS[name])
    if how == "tensor_split" and length < 8:  # empty chunks: still nothing but the sequence
        assert any(chunk.shape[1] == 0 for chunk in student.tensor_split(8, 1))
    for found, exact in zip(evaluate(chunked(mine, how=how), student, teacher, labels), expected, strict=True):
        assert error(found, exact) < 1e-12


@pytest.mark.parametrize("name", CHUNKED)
def test_theirs_is_silently_wrong_at_batch_1_where_chunks_are_not_of_one_length(name: str) -> None:
    student, teacher, labels = batch(1, 10, ignored=0.0)
    labels[0] = torch.arange(10)
    labels[0, :2] = -100
    right = truth(name, student, teacher, labels)
    theirs, mine = (
        chunked(getattr(side, name)(**OPTIONS[name]), how="tensor_split")(student, teacher, labels)
        for side in (host, ours)
    )
    print(f"{name}, S = 10 by tensor_split: right {right:.5f}, theirs {theirs:.5f}, ours {mine:.5f}")
    assert error(mine, right) < 1e-12
    assert error(theirs, right) > 0.02  # labels are cut by `chunk`, 2 for each of 5 chunks; the logits in 8


def test_chunks_that_do_not_fit_the_labels_are_refused() -> None:
    student, teacher, labels = batch()
    loss = ours.ForwardKLWithChunkedOutputLoss()
    with pytest.raises(ValueError, match=r"labels: expected \[B, S\] labels and chunks .* lengths \[8, 8\]"):
        loss(list(student.chunk(2, 1)), list(teacher.chunk(2, 1)), labels[:, :15])
    with pytest.raises(ValueError, match=r"\[8, 8\] of the student's and \[4, 4, 4, 4\] of the teacher's"):
        loss(list(student.chunk(2, 1)), list(teacher.chunk(4, 1)), labels)


# ------------------------------------------------------------------------------------------------ accumulation


@pytest.mark.parametrize("name", WHOLE)
def test_sums_accumulate_to_the_loss_of_the_whole_batch(name: str) -> None:
    student, teacher, labels = batch(batch_size=4)
    mine = getattr(ours, name)(**OPTIONS[name])
    leaf = student.clone().requires_grad_()
    for part in range(4):
        (mine(leaf[part], teacher[part], labels[part], normalize=False) / (labels != -100).sum()).backward()
    _, expected = evaluate(lambda s: truth(name, s, teacher, labels), student)
    assert error(leaf.grad, expected) < 1e-12


# ------------------------------------------------------------------------------------------------ in the host


@pytest.mark.parametrize("name", WHOLE + CHUNKED)
def test_a_config_finds_ours_by_its_path(name: str) -> None:
    options = OPTIONS[name] | {"ignore_index": 3}
    yaml = OmegaConf.create({"_component_": f"distil_fast.integrations.torchtune.{name}", **options})
    loss = config.instantiate(yaml)
    assert type(loss) is getattr(ours, name)
    assert all(getattr(loss, option) == value for option, value in options.items())
    assert ("num_output_chunks" in vars(loss)) == (name in CHUNKED)


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_a_ratio_outside_0_to_1_is_refused_as_theirs_is(ratio: float) -> None:
    for module in (host, ours):
        for loss in (module.SymmetricKLLoss, module.SymmetricKLWithChunkedOutputLoss):
            with pytest.raises(ValueError, match=r"sym_kd_ratio must be in the range \[0, 1\]"):
                loss(sym_kd_ratio=ratio)


@pytest.mark.parametrize("name", WHOLE + CHUNKED)
@pytest.mark.parametrize("compiled", [False, True])
def test_apply_replaces_a_recipes_loss_until_undo(name: str, compiled: bool) -> None:
    theirs = getattr(host, name)(**OPTIONS[name] | {"ignore_index": 5})
    if name in CHUNKED:
        theirs.num_output_chunks = 4
    recipe = types.SimpleNamespace(_kd_loss_fn=training.compile_loss(theirs, verbose=False) if compiled else theirs)
    before = recipe._kd_loss_fn
    with ours.apply(recipe):
        mine = recipe._kd_loss_fn
        assert type(mine) is getattr(ours, name)
        assert mine.ignore_index == 5
        assert getattr(mine, "num_output_chunks", 4) == 4
        assert getattr(mine, "sym_kd_ratio", 0.3) == 0.3
        assert mine.apply_compile_strategy(backend="inductor") is mine
        with pytest.raises(HostChangedError, match=r"expected .*_kd_loss_fn to be one of ForwardKLLoss"):
            ours.apply(recipe)
    assert recipe._kd_loss_fn is before


def test_a_host_of_another_shape_is_refused_before_anything_is_replaced() -> None:
    with pytest.raises(HostChangedError, match=r"got NoneType\. Call apply after the recipe's setup"):
        ours.apply(types.SimpleNamespace())
    with pytest.raises(HostChangedError, match="got CrossEntropyLoss"):
        ours.apply(types.SimpleNamespace(_kd_loss_fn=nn.CrossEntropyLoss()))
    loss = host.ForwardKLWithChunkedOutputLoss()
    del loss.num_output_chunks
    recipe = types.SimpleNamespace(_kd_loss_fn=loss)
    with pytest.raises(HostChangedError, match="to have num_output_chunks"):
        ours.apply(recipe)
    loss = host.ReverseKLLoss()
    loss.forward = lambda student, teacher: student
    with pytest.raises(HostChangedError, match="to take student_logits, teacher_logits, labels"):
        ours.apply(types.SimpleNamespace(_kd_loss_fn=loss))
    assert type(recipe._kd_loss_fn) is host.ForwardKLWithChunkedOutputLoss
