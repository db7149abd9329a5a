"""A top-k teacher that is not as it must be: each fault with its message, before anything is read or written; and
what a good one reads and writes: layouts, threads, in place.

Rows and pages that must not be touched are guarded.py's. Next: test_topk.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import distil_fast
from distil_fast import TopK
from distil_fast.backends.settings import TAILS
from tests import calls, oracle, topk
from tests.test_row_loss_memory import LAYOUTS, SIZE, outside

ROWS, V, K = 4, 11, 3
INF, NAN = math.inf, math.nan


def good() -> tuple[Tensor, Tensor, Tensor]:
    g = oracle.generator("top-k checks")
    student = torch.randn(ROWS, V, generator=g)
    ids = torch.tensor([[0, 5, 10], [3, 2, -1], [7, 8, 9], [1, 0, 4]])
    return student, ids, torch.tensor([[0.5, 0.2, 0.1]] * ROWS).log()


def with_entry(values: Tensor, row: int, column: int, entry: float) -> Tensor:
    values = values.clone()
    values[row, column] = entry
    return values


# ------------------------------------------------------------------------------------------------ shapes and types

_, IDS, LOG_PROBS = good()
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "ids-list": ({"ids": [[1]]}, TypeError, "TopK.ids: expected a tensor of integers, got list"),
    "ids-float": ({"ids": IDS.float()}, TypeError, r"TopK.ids: .*got torch.float32. Convert them with .long\(\)"),
    "ids-bool": ({"ids": IDS > 0}, TypeError, "TopK.ids: expected a tensor of integers, got torch.bool"),
    "ids-rows": ({"ids": IDS[:3]}, ValueError, r"TopK.ids: expected shape \(4, 'k'\) .*got \(3, 3\)"),
    "ids-flat": ({"ids": IDS[:, 0]}, ValueError, r"TopK.ids: expected shape \(4, 'k'\).*got \(4,\)"),
    "k=0": ({"ids": IDS[:, :0]}, ValueError, "TopK.ids: .*k >= 1"),
    "ids-device": ({"ids": IDS.to("meta")}, ValueError, r"TopK.ids: .*device cpu, got meta. Move it with .to\('cpu'\)"),
    "log_probs-none": (
        {"log_probs": None},
        TypeError,
        "TopK.log_probs: expected a floating-point tensor, got NoneType",
    ),
    "log_probs-int": (
        {"log_probs": IDS},
        TypeError,
        "TopK.log_probs: expected a floating-point tensor, got torch.int64",
    ),
    "log_probs-shape": ({"log_probs": LOG_PROBS[:, :2]}, ValueError, r"TopK.log_probs: .*\(4, 3\), got \(4, 2\)"),
    "log_probs-double": ({"log_probs": LOG_PROBS.double()}, TypeError, r"TopK.log_probs: .*float64.*\.float\(\)"),
    "log_probs-grad": (
        {"log_probs": LOG_PROBS.clone().requires_grad_()},
        ValueError,
        r"TopK.log_probs requires grad.*Pass TopK.log_probs.detach\(\)",
    ),
    "tail": ({"tail": "drop"}, ValueError, "TopK.tail: expected one of bucket, renormalise, ignore, got 'drop'"),
    "softcap": ({"teacher_softcap": 30.0}, ValueError, "expected a teacher given by its logits, got log_probs"),
    "inplace": ({"inplace": True, "reduction": "none"}, ValueError, "inplace: .*got 'none'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_needs_no_value(wrong: str) -> None:
    spoilt, error, says = WRONG[wrong]
    student, ids, log_probs = good()
    teacher = {"ids": ids, "log_probs": log_probs, "tail": "bucket"} | spoilt
    settings = {name: teacher.pop(name) for name in list(teacher) if name not in ("ids", "log_probs", "tail")}
    with pytest.raises(error, match=says):
        distil_fast.distillation_loss(student, TopK(**teacher), **settings)


# ------------------------------------------------------------------------------------------------ what stands in them

FAULTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "too high": ({"ids": with_entry(IDS, 2, 1, V)}, "TopK.ids: .*0 <= id < 11 .*got 11 in row 2. Pad rows"),
    "far too high": ({"ids": with_entry(IDS, 0, 0, 2**62)}, "TopK.ids: .*got 4611686018427387904 in row 0"),
    "negative": ({"ids": with_entry(IDS, 3, 2, -2)}, "TopK.ids: .*got -2 in row 3"),
    "twice": ({"ids": with_entry(IDS, 1, 1, 3)}, "TopK.ids: expected different columns .*got 3 twice in row 1"),
    "above 0": ({"log_probs": with_entry(LOG_PROBS, 1, 0, 0.01)}, "TopK.log_probs: .*<= 0 .*got 0.00999.* in row 1"),
    "nan": ({"log_probs": with_entry(LOG_PROBS, 3, 1, NAN)}, "TopK.log_probs: .*got nan in row 3. TopK.from_logits"),
    "inf": ({"log_probs": with_entry(LOG_PROBS, 0, 1, INF)}, "TopK.log_probs: .*got inf in row 0"),
    "mass": (
        {"log_probs": with_entry(LOG_PROBS, 2, 0, math.log(0.702))},
        "sum to at most 1, got a sum of 1.00.* in row 2",
    ),
}


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen_before_anything_is_written(instruction_set: str, fault: str, tail: str) -> None:
    spoilt, says = FAULTS[fault]
    student, ids, log_probs = good()
    before = student.clone()
    teacher = TopK(**({"ids": ids, "log_probs": log_probs} | spoilt), tail=tail)
    for settings in ({"inplace": True}, {"reduction": "sum"}, {"reduction": "none"}):
        with pytest.raises(ValueError, match=says):
            distil_fast.distillation_loss(student.requires_grad_(), teacher, torch.tensor([1, 2, 3, 4]), **settings)
        assert torch.equal(student, before)


def test_the_first_row_at_fault_is_named_whatever_the_threads() -> None:
    torch.set_num_threads(4)
    ids = torch.arange(64).expand(5000, 64).clone()
    ids[1234:, 7] = 5
    teacher = TopK(ids, torch.full((5000, 64), -6.0))
    for _ in range(5):
        with pytest.raises(ValueError, match="got 5 twice in row 1234"):
            distil_fast.divergence_loss(torch.zeros(5000, 100), teacher)


def test_what_rounding_may_do_is_no_fault() -> None:
    """0.1 % above 1, or 1 % of log-probabilities with 16 bits, in sum or alone."""
    student, ids, log_probs = good()
    for dtype, part in ((torch.float32, 0.0009), (torch.float16, 0.009), (torch.bfloat16, 0.009)):
        above = with_entry(log_probs, 0, 0, math.log(0.7 + part)).to(dtype)
        alone = with_entry(torch.full_like(log_probs, -INF), 1, 0, part).to(dtype)
        for entries in (above, alone):
            assert distil_fast.divergence_loss(student, TopK(ids, entries)).isfinite()
    with pytest.raises(ValueError, match=r"got a sum of 1\.00"):
        distil_fast.divergence_loss(student, TopK(ids, with_entry(log_probs, 0, 0, math.log(0.705))))


@pytest.mark.parametrize("fault", FAULTS)
def test_rows_without_weight_may_hold_anything(fault: str) -> None:
    spoilt, _ = FAULTS[fault]
    student, ids, log_probs = good()
    entries = {"ids": ids, "log_probs": log_probs} | spoilt
    changed = (entries["ids"] != ids).any(-1) | (entries["log_probs"] != log_probs).any(-1)
    expected = topk.by_backend(student, TopK(ids, log_probs), soft_mask=~changed)
    result = topk.by_backend(student, TopK(**entries), soft_mask=~changed)
    assert result.values == expected.values
    assert torch.equal(result.grad, expected.grad)
    assert (
        distil_fast.distillation_loss(student, TopK(**entries), torch.tensor([1, 2, 3, 4]), soft_weight=0.0).soft == 0
    )


def test_ids_beyond_vocab_size_are_refused() -> None:
    student, ids, log_probs = good()
    with pytest.raises(ValueError, match=r"TopK\.ids: .*0 <= id < 10 .*got 10 in row 0"):
        distil_fast.divergence_loss(student, TopK(ids, log_probs), vocab_size=10)


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits_and_nothing_else_is_touched(layout: str, dtype: torch.dtype) -> None:
    student = LAYOUTS[layout](dtype)
    g = oracle.generator("top-k", layout)
    student.copy_(torch.randn(student.shape, generator=g, dtype=torch.float64))
    whole = torch.randn(student.shape, generator=g, dtype=torch.float64)
    labels = torch.randint(0, SIZE, student.shape[:-1], generator=g)
    for tail in TAILS:
        teacher = TopK.from_logits(whole if dtype == torch.float64 else whole.float(), 9, 3.7, tail)
        settings: dict[str, Any] = {"divergence": "jsd", "temperature": 3.7, "label_smoothing": 0.1}
        for given in (labels, None):
            copy = student.clone()
            expected = topk.by_backend(student.contiguous(), teacher, given, **settings)
            surroundings = outside(student)
            inplace = topk.by_backend(student, teacher, given, gradient="inplace", **settings)
            assert inplace.values == expected.values
            assert torch.equal(inplace.grad, expected.grad)
            assert inplace.unit == expected.unit
            assert inplace.grad.data_ptr() == student.data_ptr() or calls.DEVICE.type != "cpu"
            assert torch.equal(outside(student), surroundings), "in place wrote beside the rows"
            student.copy_(copy)


@pytest.mark.parametrize("shape", [(1, 100003), (2, 50257), (7, 9001), (40, 1000)])
def test_threads_do_not_change_a_bit(instruction_set: str, shape: tuple[int, int]) -> None:
    """Rows over threads; with fewer rows than threads, the columns of each row over threads."""
    g = oracle.generator("top-k", shape)
    student, whole = oracle.logit_pair("plain", *shape, g)
    student[:, shape[1] // 2 :] += 90.0  # some blocks take a reference of their own
    labels = torch.randint(0, shape[1], shape[:1], generator=g)
    for tail in TAILS:
        teacher = TopK.from_logits(whole.float(), 64, 3.7, tail)
        for given in (labels, None):
            results = []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(topk.by_backend(student.float(), teacher, given, temperature=3.7))
            for result in results[1:]:
                assert result.values == results[0].values
                assert torch.equal(result.grad, results[0].grad)


def test_threads_and_a_faint_tail() -> None:
    g = oracle.generator("faint threads")
    student = torch.randn(2, 50000, generator=g)
    student[:, 7:10] += 200.0
    teacher = TopK(torch.tensor([[7, 9, 8]] * 2), torch.tensor([[0.5, 0.2, 0.1]] * 2).log())
    results = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        results.append(topk.by_backend(student, teacher, torch.tensor([7, 40000]), temperature=1.0))
    results[0].check(topk.exact(student, teacher, torch.tensor([7, 40000]), temperature=1.0), "faint")
    assert results[0].values == results[1].values
    assert torch.equal(results[0].grad, results[1].grad)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_rows(shape: tuple[int, ...], reduction: str) -> None:
    student = torch.randn(shape, requires_grad=True)
    teacher = TopK(torch.zeros(*shape[:-1], 2, dtype=torch.int64), torch.zeros(*shape[:-1], 2))
    loss = distil_fast.divergence_loss(student, teacher, reduction=reduction)
    assert loss.sum() == 0
    assert torch.autograd.grad(loss.sum(), student)[0].shape == shape
