"""The row losses on the logits that break others: -inf masks, inf, nan, huge values, blocks without a finite logit.

The expectations are closed forms in float64 (oracle.closed_form). Next: test_row_loss_memory.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import distil_fast
from tests import calls, oracle

INF = math.inf
Settings = dict[str, Any]
HALVES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [7, 100, 5000]


def rows_of_logits(size: int, dtype: torch.dtype, seed: object, rows: int = 4) -> tuple[Tensor, Tensor]:
    student, teacher = oracle.logit_pair("plain", rows, size, oracle.generator(seed, size))
    return student.to(dtype), teacher.to(dtype)


def masked(logits: Tensor, columns: Tensor) -> Tensor:
    return logits.masked_fill(columns, -INF)


def every_third(size: int, start: int = 0) -> Tensor:
    """A mask of columns that touches every lane of a vector, whole blocks included where there are several."""
    columns = torch.arange(size) % 3 == start
    if size > 4096:
        columns[:2048] = start == 0  # all of the first block
    return columns


def expect(result: calls.Result, value: Tensor, gradient: Tensor, dtype: torch.dtype, where: str) -> None:
    """Reduction "sum": the loss is value's sum, each row has the gradient; the zeros are exact. nan equals nan."""
    torch.testing.assert_close(
        result.values["soft"].double(), value.sum(), rtol=4e-6, atol=0, equal_nan=True, msg=where
    )
    grad = result.grad.double() * result.unit
    assert (grad[gradient == 0] == 0).all(), f"a gradient that is exactly zero is not, {where}"
    finite = gradient.isfinite().all(-1)
    assert grad[~finite].isnan().any(-1).all(), f"a gradient without a value has one, {where}"
    error, size = (grad - gradient)[finite].norm(dim=-1), gradient[finite].norm(dim=-1)
    rounding = ((gradient / result.unit).to(dtype).double() * result.unit - gradient)[finite].norm(dim=-1)
    bound = 4e-6 * size + oracle.ROUNDING_FACTOR * rounding * (dtype != torch.float32)
    assert (error <= bound).all(), f"{error}, {where}"


# ------------------------------------------------------------------------------------------------ -inf


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_columns_masked_in_both_do_not_exist(instruction_set: str, divergence: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        student, teacher = rows_of_logits(size, dtype, "both")
        columns = every_third(size)
        settings: Settings = {
            "divergence": oracle.DIVERGENCES[divergence],
            "reduction": "sum",
            "t_squared": False,
        }
        result = calls.by_backend(masked(student, columns), masked(teacher, columns), **settings)
        value, gradient = oracle.closed_form(settings["divergence"], student[:, ~columns], teacher[:, ~columns], 2.0)
        everywhere = torch.zeros(student.shape, dtype=torch.float64)
        everywhere[:, ~columns] = gradient
        expect(result, value, everywhere, dtype, f"{size} columns")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
@pytest.mark.parametrize("who", ["teacher", "student", "each some"])
def test_columns_masked_in_one(instruction_set: str, who: str, divergence: str, dtype: torch.dtype) -> None:
    """Forward KL and soft cross-entropy: inf where p has mass that q lacks, and the gradient is q - p all the same.
    Reverse KL: inf where q has mass that p lacks, and no gradient. The others: always finite."""
    for size in SIZES:
        student, teacher = rows_of_logits(size, dtype, "one")
        if who != "teacher":
            student = masked(student, every_third(size, 1))
        if who != "student":
            teacher = masked(teacher, every_third(size, 2))
        settings: Settings = {
            "divergence": oracle.DIVERGENCES[divergence],
            "reduction": "sum",
            "t_squared": False,
        }
        result = calls.by_backend(student, teacher, temperature=2.0, **settings)
        value, gradient = oracle.closed_form(settings["divergence"], student, teacher, 2.0)
        lacking = {"forward_kl": "teacher", "soft_cross_entropy": "teacher", "reverse_kl": "student"}
        infinite = divergence in lacking and who != lacking[divergence]
        assert value.isinf().all() == infinite, "the test's own expectation"
        if divergence == "reverse_kl" and infinite:
            gradient = torch.full_like(gradient, math.nan)
        expect(result, value, gradient, dtype, f"{size} columns, -inf in {who}")


@pytest.mark.parametrize("divergence", ["jsd", "jsd_0.1", "jsd_0.9"])
def test_jsd_of_models_without_a_column_in_common(instruction_set: str, divergence: str) -> None:
    """Disjoint supports: the largest value there is, -(beta log beta + (1 - beta) log(1 - beta)), and no gradient."""
    jsd = distil_fast.reference.as_divergence(oracle.DIVERGENCES[divergence])
    for size in SIZES:
        student, teacher = rows_of_logits(size, torch.float32, "disjoint")
        columns = every_third(size)
        result = calls.by_backend(masked(student, columns), masked(teacher, ~columns), divergence=jsd, temperature=1.0)
        beta = jsd.parameters[0]
        entropy = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
        assert result.values["loss"].item() == pytest.approx(entropy, rel=2e-6)
        q = masked(student, columns).double().softmax(-1) / student.shape[0]
        assert ((result.grad.double()).norm(dim=-1) < 1e-6 * q.norm(dim=-1)).all()
        assert (result.grad[:, columns] == 0).all()


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_cross_entropy_with_a_masked_vocabulary(instruction_set: str, divergence: str) -> None:
    """The label's own column masked: inf, and a gradient as any other. Masked columns otherwise get exactly 0."""
    for size in SIZES:
        student, teacher = rows_of_logits(size, torch.float32, "ce")
        columns = every_third(size)
        columns[-1] = False
        student, teacher = masked(student, columns), masked(teacher, columns)
        labels = torch.full((4,), size - 1)
        settings: Settings = {
            "divergence": oracle.DIVERGENCES[divergence],
            "temperature": 3.7,
            "reduction": "none",
        }
        upstream = torch.tensor([1.0, 2.0, -1.0, 0.5])
        result = calls.by_autograd(student, teacher, labels, upstream, **settings)
        truth = oracle.exact(
            student[:, ~columns], teacher[:, ~columns], labels * 0 - 1 + (~columns).sum(), upstream, **settings
        )
        oracle.check_values(result.values, truth, f"{size}")
        assert (result.grad[:, columns] == 0).all()
        oracle.check_gradient(result.grad[:, ~columns], truth, f"{size}")
    labels[:] = 0  # masked
    loss = distil_fast.cross_entropy(student.requires_grad_(), labels, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert (loss == INF).all()
    expected = student.detach().double().softmax(-1)
    expected[:, 0] = -1.0
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
@pytest.mark.parametrize("value", [math.nan, -INF, INF], ids=str)
def test_a_bad_row_is_bad_alone(instruction_set: str, value: float, divergence: str, dtype: torch.dtype) -> None:
    """nan or +inf anywhere, or nothing but -inf, in the student or the teacher: nan in that row, and there only."""
    for size, who in ((5, 0), (5, 1), (4100, 0), (4100, 1)):
        pair = rows_of_logits(size, dtype, "bad")
        labels = torch.tensor([1, 0, 3, 2])
        settings: Settings = {
            "divergence": oracle.DIVERGENCES[divergence],
            "temperature": 3.7,
            "reduction": "none",
        }
        settings["upstream"] = torch.ones(4)
        good = calls.by_autograd(*pair, labels, **settings)
        columns = slice(None) if value == -INF else size - 1
        pair[who][2, columns] = value
        bad = calls.by_autograd(*pair, labels, **settings)
        others = torch.tensor([0, 1, 3])
        where = f"{value} in {('student', 'teacher')[who]}, {size} columns"
        for name in ("loss", "soft"):
            assert bad.values[name][2].isnan(), f"{name} {where}"
            assert torch.equal(bad.values[name][others], good.values[name][others]), f"{name} {where}"
        assert bad.values["hard"][2].isnan() == (who == 0), where
        assert bad.grad[2].isnan().all(), where
        assert torch.equal(bad.grad[others], good.grad[others]), where
        if dtype != torch.float64:
            summed = calls.by_backend(*pair, labels, **settings | {"reduction": "sum", "upstream": None})
            assert summed.values["loss"].isnan(), where
            assert summed.grad[others].isfinite().all(), where


# ------------------------------------------------------------------------------------------------ blocks and sizes


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
@pytest.mark.parametrize(
    "shape_of_row", ["first block masked", "last block masked", "a peak in the last block", "steps", "descending"]
)
def test_rows_whose_blocks_differ(instruction_set: str, shape_of_row: str, divergence: str) -> None:
    """The first block's maximum serves as the reference of the row, until a block's sum shows that it cannot."""
    size = 7000
    student, teacher = rows_of_logits(size, torch.float32, shape_of_row)
    if shape_of_row == "first block masked":
        student, teacher = (masked(x, torch.arange(size) < 2048) for x in (student, teacher))
    elif shape_of_row == "last block masked":
        student, teacher = (masked(x, torch.arange(size) >= 6144) for x in (student, teacher))
    elif shape_of_row == "a peak in the last block":
        student[:, -1] += 60.0
        teacher[:, -1] += 52.0
    else:
        steps = 90.0 * (torch.arange(size) // 2048)
        student, teacher = (x + (steps if shape_of_row == "steps" else -steps) for x in (student, teacher))
    labels = torch.tensor([6000, -100, 2048, 5000])
    used = student[0].isfinite()
    place = used.cumsum(0)[labels.clamp(min=0)] - 1  # of the labels among the finite columns
    for temperature in (1.0, 2.0, 3.7):
        settings: Settings = {"divergence": oracle.DIVERGENCES[divergence], "temperature": temperature}
        truth = oracle.exact(student[:, used], teacher[:, used], torch.where(labels < 0, labels, place), **settings)
        result = calls.by_backend(student, teacher, labels, **settings)
        oracle.check_values(result.values, truth, shape_of_row)
        oracle.check_gradient(result.grad[:, used], truth, shape_of_row)
        assert (result.grad[:, ~used] == 0).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_finite_masks_are_as_good_as_infinite_ones(instruction_set: str, divergence: str, dtype: torch.dtype) -> None:
    """-1e30, and the dtype's lowest number, which is what masking code fills in."""
    for size in SIZES:
        student, teacher = rows_of_logits(size, dtype, "finite masks")
        columns = every_third(size)
        settings: Settings = {
            "divergence": oracle.DIVERGENCES[divergence],
            "temperature": 0.5,
            "reduction": "sum",
        }
        expected = calls.by_backend(masked(student, columns), masked(teacher, columns), **settings)
        lowest = torch.finfo(dtype).min
        for fill in (lowest, max(-1e30, lowest)):
            result = calls.by_backend(
                student.masked_fill(columns, fill), teacher.masked_fill(columns, fill), **settings
            )
            torch.testing.assert_close(result.values["loss"], expected.values["loss"], rtol=1e-6, atol=0)
            assert torch.equal(result.grad, expected.grad), f"{size} {fill}"


def test_a_row_of_lowest_numbers_is_uniform(instruction_set: str) -> None:
    for dtype in HALVES:
        student = torch.full((2, 4100), torch.finfo(dtype).min, dtype=dtype)
        result = calls.by_backend(student, student.clone(), torch.tensor([0, 4099]), reduction="sum")
        assert result.values["soft"] == 0
        assert result.values["hard"].item() == pytest.approx(2 * math.log(4100), rel=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "jsd_0.1", "jsd_0.9"])
@pytest.mark.parametrize("size", [1e3, 1e4, 1e6])
def test_huge_logits(instruction_set: str, divergence: str, size: float) -> None:
    student, teacher = rows_of_logits(3000, torch.float32, "huge")
    labels = torch.tensor([5, 2999, -100, 2048])
    calls.check(size * student, size * teacher, labels, divergence=oracle.DIVERGENCES[divergence])


def test_huge_logits_reverse_kl(instruction_set: str) -> None:
    """The gradient is q (r - D) with r and D in the thousands, so the error is a part of D."""
    student, teacher = (1e3 * x for x in rows_of_logits(3000, torch.float32, "huge"))
    settings: Settings = {"divergence": "reverse_kl", "t_squared": False, "reduction": "none"}
    truth = oracle.exact(student, teacher, upstream=torch.ones(4), **settings)
    result = calls.by_backend(student, teacher, **settings)
    oracle.check_values(result.values, truth, "huge")
    assert (truth.values["loss"] > 1000).all(), "the logits are not huge"
    assert ((result.grad.double() - truth.grad).norm(dim=-1) <= 1e-6 * truth.values["loss"]).all()


@pytest.mark.parametrize("temperature", [1e-6, 0.05, 50.0, 1e6, 1e15])
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_extreme_temperatures(instruction_set: str, divergence: str, temperature: float) -> None:
    """From one-hot distributions to uniform ones; T^2 keeps the loss in a float's range."""
    student, teacher = rows_of_logits(3000, torch.float32, "temperature")
    labels = torch.tensor([5, 2999, -100, 2048])
    calls.check(student, teacher, labels, divergence=oracle.DIVERGENCES[divergence], temperature=temperature)


def test_label_smoothing_with_a_masked_vocabulary(instruction_set: str) -> None:
    """The uniform part of the target asks for what the model has excluded: inf, and q - target for a gradient."""
    logits, _ = rows_of_logits(3000, torch.float32, "smoothing")
    logits[:, 2100:2200] = -INF
    labels = torch.tensor([5, 2999, -100, 2048])
    result = calls.by_backend(logits, None, labels, soft_weight=0.0, label_smoothing=0.1, reduction="sum")
    assert result.values["loss"] == INF
    target = torch.full((4, 3000), 0.1 / 3000, dtype=torch.float64)
    target[torch.arange(4), labels.clamp(min=0)] += 0.9
    expected = (logits.double().softmax(-1) - target) * (labels >= 0).unsqueeze(-1)
    error = (result.grad.double() - expected).norm(dim=-1)
    assert (error <= 3e-6 * expected.norm(dim=-1)).all()


def test_subnormal_logits_and_probabilities_count_as_zero(instruction_set: str) -> None:
    student, teacher = rows_of_logits(1000, torch.float32, "subnormal")
    tiny = student.clone()
    tiny[:, ::2] = 1e-40
    expected = torch.where(tiny == tiny[0, 0], 0.0, tiny)
    a, b = (calls.by_backend(x, teacher, torch.tensor([0, 1, 2, 3])) for x in (tiny, expected))
    torch.testing.assert_close(a.values, b.values, rtol=1e-6, atol=0)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)
