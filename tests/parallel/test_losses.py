"""Sharded vocabularies against the unsharded truth in fp64: worlds of 2 and 3 gloo processes, uneven shards.

What is right is oracle.py's affair where it knows the case, else reference.py's in float64. Next: test_ranks.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import distil_fast
from distil_fast import reference
from tests import oracle, world
from tests.parallel.sharded import COLS, WIDTHS, Sharded, check, pair, some_labels

# ------------------------------------------------------------------------------------------------ the matrix


@pytest.mark.parametrize("name", oracle.DIVERGENCES)
def test_every_divergence(ranks: world.World, name: str) -> None:
    """Each kind of logits at two temperatures, which take turns."""
    divergence, start = oracle.DIVERGENCES[name], list(oracle.DIVERGENCES).index(name)
    for turn, kind in enumerate(oracle.KINDS, start=start):
        student, teacher = (x.float() for x in pair(kind, 4, name))
        for temperature in ((1.0, 2.0), (2.0, 3.7), (3.7, 1.0))[turn % 3]:
            check(ranks, student, teacher, some_labels(4), divergence=divergence, temperature=temperature)


@pytest.mark.parametrize("name", oracle.DIVERGENCES)
def test_every_divergence_in_plain_torch(ranks: world.World, name: str) -> None:
    options: dict[str, Any] = {"divergence": oracle.DIVERGENCES[name], "backend": "reference"}
    for kind in oracle.KINDS:
        student, teacher = (x.float() for x in pair(kind, 3, name))
        check(ranks, student, teacher, some_labels(3), temperature=2.5, label_smoothing=0.1, **options)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_dtypes(ranks: world.World, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        student, teacher = pair("close", 4)
        loss_scale = torch.full((4,), 1024.0)  # what a loss scaler multiplies with, before anything is rounded
        options: dict[str, Any] = {"divergence": divergence, "hard_weight": 0.1}
        args = student.to(student_dtype), teacher.to(teacher_dtype), some_labels(4), loss_scale
        check(ranks, *args, reduction="none", **options)


def test_float64(ranks: world.World) -> None:
    for name, divergence in oracle.DIVERGENCES.items():
        student, teacher = pair("plain", 3, name)
        for backend in ("native", "reference"):
            check(ranks, student, teacher, some_labels(3), divergence=divergence, backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masks_counts_weights(ranks: world.World, reduction: str, backend: str) -> None:
    g = oracle.generator("options")
    student, teacher = (x.float().view(3, 2, COLS) for x in pair("plain", 6))
    options: dict[str, Any] = {
        "temperature": 1.0 + 3.0 * torch.rand(3, 2, generator=g),
        "soft_mask": torch.tensor([[0.5, 0.0], [1.0, 2.0], [0.0, 0.25]]),
        "soft_weight": 0.3,
        "hard_weight": torch.tensor(1.7),
        "t_squared": False,
        "label_smoothing": 0.2,
        "reduction": reduction,
        "backend": backend,
    }
    labels = some_labels(6).view(3, 2)
    upstream = torch.rand(3, 2, generator=g) if reduction == "none" else None
    for divergence in ("forward_kl", "jsd"):
        check(ranks, student, teacher, labels, upstream, divergence=divergence, **options)
    if reduction == "mean":
        check(ranks, student, teacher, labels, soft_count=11.0, hard_count=torch.tensor(7.0), backend=backend)
        mask = torch.tensor([[True, False], [False, True], [True, True]])
        named = torch.where(labels == -100, 0, labels)
        check(ranks, student, teacher, named, soft_mask=mask, ignore_index=0, backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {"z_loss": 0.01},
        {"z_loss": 0.01, "label_smoothing": 0.3},
        {"class_weights": torch.linspace(0.0, 2.0, COLS)},
        {"student_logit_scale": 0.7, "student_softcap": 5.0, "teacher_softcap": 4.0, "z_loss": 0.1},
        {"teacher_logit_scale": 1.5, "divergence": "reverse_kl"},
    ],
    ids=["z_loss", "z_loss-smooth", "class_weights", "softcap", "scale"],
)
def test_the_rest_of_the_options(ranks: world.World, options: dict[str, Any], backend: str) -> None:
    student, teacher = (x.float() for x in pair("plain", 5))
    labels = some_labels(5)
    got = Sharded(ranks, student, teacher, labels, backend=backend, **options)
    whole = student.double().requires_grad_()
    terms = reference.distillation_loss(whole, teacher.double(), labels, **options)
    (grad,) = torch.autograd.grad(terms.loss, whole)
    for name, value in got.values.items():
        torch.testing.assert_close(value.double(), getattr(terms, name).detach(), rtol=3e-6, atol=0.0)
    assert (got.grad - grad).norm() <= 3e-6 * grad.norm()


# ------------------------------------------------------------------------------------------------ the hard term


def test_labels_on_every_shard(ranks: world.World) -> None:
    widths = WIDTHS[ranks.size]
    edges = [0, *torch.tensor(widths).cumsum(0).tolist()]
    labels = torch.tensor([edge + step for edge in edges for step in (-1, 0, 1) if 0 <= edge + step < COLS])
    student, _ = pair("plain", len(labels))
    upstream = torch.rand(len(labels), generator=oracle.generator("upstream"))
    check(ranks, student.float(), None, labels, upstream, reduction="none")
    check(ranks, student.float(), None, labels, label_smoothing=0.1)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_model_that_is_sure_of_the_label_keeps_its_digits(ranks: world.World, backend: str) -> None:
    """log1p(rest / own), whichever shard the label is on; a second column as high is no reason to count it out."""
    for label in (0, 1400, COLS - 1):
        student = pair("plain", 3)[0].float()
        student[:, label] = 40.0
        student[1, label // 2 + 1] = 40.0
        labels = torch.full((3,), label)
        got = Sharded(ranks, student, None, labels, torch.ones(3), reduction="none", backend=backend)
        whole = student.double().requires_grad_()
        others = whole.detach().clone()
        others[:, label] = -math.inf
        exact = torch.log1p((others.logsumexp(-1) - whole.detach()[:, label]).exp())
        assert exact[0] < 1e-9
        torch.testing.assert_close(got.values["loss"].double(), exact, rtol=2e-6, atol=0.0)
        torch.testing.assert_close(got.grad[:, label].double(), torch.expm1(-exact), rtol=2e-6, atol=0.0)


# ------------------------------------------------------------------------------------------------ edges


def masked_pairs(widths: tuple[int, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Columns that are masked in a model, single ones and all of a rank's."""
    first, last = slice(0, widths[0]), slice(COLS - widths[-1], COLS)
    pairs = {}
    for name, (in_student, in_teacher) in {"both": (1, 1), "teacher": (0, 1), "student": (1, 0)}.items():
        for place, what in {"column": slice(7, 8), "first": first, "last": last}.items():
            student, teacher = (x.float() for x in pair("plain", 3, name))
            if in_student:
                student[:2, what] = -math.inf
            if in_teacher:
                teacher[:2, what] = -math.inf
            pairs[f"{name}-{place}"] = student, teacher
    return pairs


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_masked_columns(ranks: world.World, divergence: str, backend: str) -> None:
    """As the unsharded loss: finite where it is, infinite where it is; a gradient wherever the loss is finite."""
    for name, (student, teacher) in masked_pairs(WIDTHS[ranks.size]).items():
        options: dict[str, Any] = {"divergence": divergence, "reduction": "none"}
        got = Sharded(ranks, student, teacher, None, torch.ones(3), backend=backend, **options)
        whole = student.clone().requires_grad_()
        loss = distil_fast.distillation_loss(whole, teacher, **options).loss
        (grad,) = torch.autograd.grad(loss.sum(), whole)
        torch.testing.assert_close(got.values["loss"], loss.detach(), rtol=2e-6, atol=1e-6, msg=lambda m, n=name: n + m)
        finite = loss.isfinite() | (divergence == "forward_kl")
        torch.testing.assert_close(got.grad[finite], grad[finite], rtol=1e-5, atol=2e-7, msg=lambda m, n=name: n + m)
        assert got.grad[~finite].isnan().any(-1).all()
        assert loss.isfinite().all() == (
            divergence == "jsd"
            or divergence == "total_variation"
            or "both" in name
            or ("teacher" in name) == (divergence == "forward_kl")
        )


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nan_stays_in_its_row(ranks: world.World, backend: str) -> None:
    student, teacher = (x.float() for x in pair("plain", 5))
    labels = torch.tensor([3, 4, 5, 6, 7])
    clean = Sharded(ranks, student, teacher, labels, torch.ones(5), reduction="none", backend=backend)
    student[1, 11] = math.nan
    student[2] = -math.inf
    teacher[3, COLS - 1] = math.inf
    got = Sharded(ranks, student, teacher, labels, torch.ones(5), reduction="none", backend=backend)
    assert got.values["loss"].isnan().tolist() == [False, True, True, True, False]
    for row in (0, 4):
        assert torch.equal(got.grad[row], clean.grad[row])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_unused_rows_are_never_read(ranks: world.World, backend: str) -> None:
    student, teacher = (x.float() for x in pair("plain", 4))
    labels, mask = torch.tensor([-100, 5, -100, -100]), torch.tensor([True, False, False, True])
    options: dict[str, Any] = {"soft_mask": mask, "backend": backend}
    clean = Sharded(ranks, student, teacher, labels, **options)
    student[2] = teacher[2] = math.nan
    teacher[1] = math.nan
    got = Sharded(ranks, student, teacher, labels, **options)
    assert got.values == clean.values
    assert torch.equal(got.grad, clean.grad)
    assert (got.grad[2] == 0).all()


def test_no_rows_and_no_used_rows(ranks: world.World) -> None:
    for rows in (0, 3):
        student, teacher = (x.float() for x in pair("plain", rows))
        for divergence in ("forward_kl", "jsd"):
            labels, mask = torch.full((rows,), -100), torch.zeros(rows, dtype=torch.bool)
            got = Sharded(ranks, student, teacher, labels, soft_mask=mask, divergence=divergence)
            assert all(value == 0 for value in got.values.values())
            assert got.grad.shape == student.shape
            assert (got.grad == 0).all()


def test_equal_models_have_no_gradient(ranks: world.World) -> None:
    student = pair("plain", 4)[0].float()
    for divergence in oracle.DIVERGENCES.values():
        got = Sharded(ranks, student, student.clone(), divergence=divergence)
        assert (got.grad == 0).all(), divergence


def test_wide_rows_few_rows_and_all_threads(ranks: world.World) -> None:
    widths = (40000, 9000, 7000)[: ranks.size]
    student, teacher = (x.float() for x in pair("close", 2, cols=sum(widths)))
    check(ranks, student, teacher, some_labels(2, sum(widths)), divergence="jsd", widths=widths)
    check(ranks, student.bfloat16(), teacher, some_labels(2, sum(widths)), divergence="reverse_kl", widths=widths)
