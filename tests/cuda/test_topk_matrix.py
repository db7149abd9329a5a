"""The tests of the CPU's top-k teacher on the CUDA kernels, and what GPUs add: faults that stop nothing, transforms.

What is imported here is collected here, as in test_matrix.py. Next: test_conventions.py, the same for whole teachers.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distil_fast import TopK, backends
from distil_fast.backends import cuda
from distil_fast.backends.settings import TAILS
from tests import calls, oracle, topk
from tests.cuda.conftest import DEVICES
from tests.cuda.test_conventions import HALVES, same
from tests.test_row_loss_memory import LAYOUTS, SIZE, bits, outside
from tests.test_topk import (  # noqa: F401
    test_a_bucket_that_the_student_leaves_empty,
    test_a_faint_tail_keeps_its_digits,
    test_all_columns_are_the_loss_of_the_whole_teacher,
    test_an_empty_row_is_nothing,
    test_columns_that_are_impossible,
    test_counts_replace_denominators,
    test_entries_with_any_strides,
    test_gradient_as_the_student_meets_the_teacher,
    test_leading_dimensions_are_rows,
    test_masses_that_rounding_lifted_above_1_leave_no_bucket,
    test_matrix,
    test_what_is_no_number_spoils_its_row_alone,
)
from tests.test_topk_checks import FAULTS, ROWS, good

tails = pytest.mark.parametrize("tail", TAILS)


def call(student: Tensor, teacher: TopK, labels: Tensor | None = None, **settings: Any) -> calls.Result:
    return topk.by_backend(student, teacher, labels, backend=cuda, **settings)


def drawn(rows: int, size: int, k: int, dtype: torch.dtype, tail: str) -> tuple[Tensor, TopK, Tensor]:
    g = oracle.generator("top-k", rows, size, k)
    student, teacher = oracle.logit_pair("plain", rows, size, g)
    ids, log_probs = topk.entries(teacher, k, 2.0, torch.float32, g)
    labels = torch.randint(0, size, (rows,), generator=g)
    labels[0] = ids[0, 0]
    return student.to(dtype), TopK(ids, log_probs, tail), labels


@tails
@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_at_fault_is_nan_alone_and_has_no_gradient(fault: str, tail: str) -> None:
    spoilt, says = FAULTS[fault]
    student, ids, log_probs = good()
    parts = {"ids": ids, "log_probs": log_probs}
    labels = torch.tensor([1, 2, 3, 4])
    expected = call(student, TopK(**parts, tail=tail), labels, reduction="none")
    parts |= spoilt
    bad = next(row for row in range(ROWS) if f"in row {row}" in says)
    others = torch.arange(ROWS) != bad
    for gradient in ("fresh", "inplace"):
        found = call(student.clone(), TopK(**parts, tail=tail), labels, reduction="none", gradient=gradient)
        assert found.values["loss"].isnan().equal(~others)
        assert same(found.values["loss"][others], expected.values["loss"][others])
        assert (found.grad[bad] == 0).all()
        assert same(found.grad[others], expected.grad[others])
    assert call(student, TopK(**parts, tail=tail), labels).values["loss"].isnan()
    with backends.checked(), pytest.raises(ValueError, match=says):
        call(student, TopK(**parts, tail=tail), labels)
    with backends.checked():  # where no term uses the row, nobody looks
        call(student, TopK(**parts, tail=tail), labels, soft_mask=others)


@tails
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_hard_term_and_transforms(tail: str, dtype: torch.dtype) -> None:
    """Transforms the CPU's kernels have not here: the truth is that of the transformed logits."""
    student, teacher, labels = drawn(6, 1500, 40, dtype, tail)
    options: tuple[dict[str, Any], ...] = (
        {"z_loss": 0.01, "label_smoothing": 0.1},
        {"class_weights": torch.rand(1500, generator=oracle.generator("weights"))},
        {"vocab_size": 1499},
    )
    for settings in options:
        labels = labels.clamp(max=1498)
        ids = torch.where(teacher.ids == 1499, -1, teacher.ids)
        cut = TopK(ids, teacher.log_probs, tail)
        truth = topk.exact(student, cut, labels, **settings)
        call(student, cut, labels, **settings).check(truth, f"{tail} {dtype} {settings}")
    capped = {"student_logit_scale": 0.7, "student_softcap": 6.0, "z_loss": 0.01}
    x = student.double().requires_grad_()
    truth = topk.exact(6.0 * torch.tanh(0.7 * x.detach() / 6.0), teacher, labels, z_loss=0.01)
    found = call(student, teacher, labels, **capped)
    slope = 0.7 * (1 - torch.tanh(0.7 * x.detach() / 6.0) ** 2)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    expected = truth.grad * slope
    assert (found.grad.double() * found.unit - expected).norm() <= tolerance * expected.norm()
    torch.testing.assert_close(found.values["loss"].double(), truth.values["loss"], rtol=1e-5, atol=0.0)


@tails
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(instruction_set: str, layout: str, tail: str) -> None:
    """Views in a sea of nan, of rows that begin anywhere: right, in place too, and nothing else is touched.

    Dtypes take turns: each with every layout, and with every tail.
    """
    student = LAYOUTS[layout](HALVES[(list(LAYOUTS).index(layout) + TAILS.index(tail)) % 3])
    g = oracle.generator(layout)
    student.copy_(torch.randn(student.shape, generator=g))
    ids, log_probs = topk.entries(torch.randn(student.shape, generator=g), 11, 2.0, torch.float32, g)
    teacher, labels = TopK(ids, log_probs, tail), torch.randint(0, SIZE, student.shape[:-1], generator=g)
    for settings in ({"divergence": "jsd", "label_smoothing": 0.1}, {"hard_weight": 0.0}):
        truth = topk.exact(student, teacher, labels, **settings)
        before = bits(student).clone()
        call(student, teacher, labels, **settings).check(truth, layout)
        assert torch.equal(bits(student), before), "inputs changed"
    surroundings = outside(student)
    call(student, teacher, labels, gradient="inplace", **settings).check(truth, f"{layout}, in place")
    assert torch.equal(outside(student), surroundings), "in place wrote beside the rows"


@tails
def test_the_order_of_threads_and_copies_changes_no_bit(
    tail: str, emulation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place, where a cluster's blocks read each other's columns until the last of them is done."""
    student, teacher, labels = drawn(5, 4111, 100, torch.bfloat16, tail)
    truth = topk.exact(student, teacher, labels, divergence="reverse_kl")
    for device in DEVICES.values():
        emulation.use_device(*device)
        results = []
        for seed in ("0", "1", "2"):
            monkeypatch.setenv("EMU_SEED", seed)
            monkeypatch.setenv("EMU_EAGER", seed)
            results.append(call(student.clone(), teacher, labels, gradient="inplace", divergence="reverse_kl"))
        results[0].check(truth, f"{device}")
        for other in results[1:]:
            assert other.values == results[0].values
            assert same(other.grad, results[0].grad)


def test_more_entries_than_threads_and_none_beside_padding() -> None:
    student, teacher, labels = drawn(3, 3000, 2999, torch.float32, "bucket")
    truth = topk.exact(student, teacher, labels)
    call(student, teacher, labels).check(truth, "k = 2999")
    padded = TopK(
        torch.cat([teacher.ids, torch.full((3, 40), -1)], -1),
        torch.cat([teacher.log_probs, torch.full((3, 40), math.nan)], -1),
    )
    call(student, padded, labels).check(truth, "padded")
