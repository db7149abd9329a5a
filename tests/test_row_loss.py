"""The row losses against the fp64 oracle: divergences x dtypes x instruction sets x temperatures x sizes, and every
argument of distillation_loss.

Bounds and inputs are oracle.py's. Next: test_row_loss_values.py (infinities, nan, extremes), test_row_loss_memory.py
(layouts, threads, what is read and written).
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import distil_fast
from tests import calls, oracle

HALF_MIXES = [
    (student, teacher)
    for student in (torch.float32, torch.bfloat16, torch.float16)
    for teacher in (torch.float32, torch.bfloat16, torch.float16)
]
TEMPERATURES = (2.0, 1.0, 3.7, 0.5)
SMALL_SIZES = (1, 2, 7, 17, 1000)
TERMS: dict[str, dict[str, Any]] = {
    "soft": {},
    "hard": {"soft_weight": 0.0, "hard_weight": 1.0},
    "both": {"soft_weight": 0.7, "hard_weight": 1.3},
}

Case = tuple[str, Tensor, Tensor, Tensor | None, dict[str, Any], oracle.Truth]


def make_case(
    kind: str, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], terms: str, **settings: Any
) -> Case:
    """Logits of a kind in their dtypes, labels (the second row has none) where the terms need them, and the truth."""
    g = oracle.generator(kind, shape, terms, settings)
    student, teacher = oracle.logit_pair(kind, *shape, g)
    student, teacher = student.to(dtypes[0]), teacher.to(dtypes[1])
    labels = None
    if terms != "soft":
        labels = torch.randint(0, shape[1], (shape[0],), generator=g)
        labels[1] = -100
    settings = settings | TERMS[terms]
    where = f"{kind} {shape} teacher {dtypes[1]} {terms} {settings}"
    return where, student, teacher, labels, settings, oracle.exact(student, teacher, labels, **settings)


ANY_DIVERGENCE = oracle.DIVERGENCES | oracle.EXTREMES


@cache  # one truth for all instruction sets
def matrix(divergence: str, dtypes: tuple[torch.dtype, torch.dtype]) -> list[Case]:
    """Every kind of logits at every temperature; sizes and terms take turns, each dtype mix beginning elsewhere."""
    cases = []
    start = HALF_MIXES.index(dtypes) if dtypes in HALF_MIXES else 0
    for i, (kind, temperature) in enumerate(itertools.product(oracle.KINDS, TEMPERATURES), start=start):
        size, terms = SMALL_SIZES[i % len(SMALL_SIZES)], list(TERMS)[i % len(TERMS)]
        settings: dict[str, Any] = {"divergence": ANY_DIVERGENCE[divergence], "temperature": temperature}
        cases.append(make_case(kind, (8, size), dtypes, terms, **settings))
    return cases


def name_of(value: object) -> str:
    if isinstance(value, tuple):
        return "-".join(str(v).removeprefix("torch.") for v in value)
    return str(value)


# ------------------------------------------------------------------------------------------------ the matrix


@pytest.mark.parametrize("dtypes", HALF_MIXES, ids=name_of)
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_matrix(instruction_set: str, divergence: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for where, student, teacher, labels, settings, truth in matrix(divergence, dtypes):
        calls.by_backend(student, teacher, labels, **settings).check(truth, f"{instruction_set} {where}")


@pytest.mark.parametrize("divergence", oracle.EXTREMES)
def test_matrix_of_extreme_parameters(instruction_set: str, divergence: str) -> None:
    for where, student, teacher, labels, settings, truth in matrix(divergence, (torch.float32,) * 2):
        calls.by_backend(student, teacher, labels, **settings).check(truth, f"{instruction_set} {where}")


@pytest.mark.parametrize("divergence", ANY_DIVERGENCE)
def test_matrix_in_double_precision(divergence: str) -> None:
    for where, student, teacher, labels, settings, truth in matrix(divergence, (torch.float64,) * 2):
        calls.by_backend(student, teacher, labels, **settings).check(truth, where)


@pytest.mark.parametrize("size", [2048, 2049, 30522, 50257, 128256])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)],
    ids=name_of,
)
def test_vocabularies(instruction_set: str, dtypes: tuple[torch.dtype, torch.dtype], size: int) -> None:
    for kind, terms, temperature, divergence in (
        ("plain", "both", 2.0, "forward_kl"),
        ("close", "both", 3.7, "jsd"),
        ("close", "soft", 1.0, "reverse_kl"),
    ):
        case = vocabulary_case(kind, size, dtypes, terms, temperature, divergence)
        where, student, teacher, labels, settings, truth = case
        calls.by_backend(student, teacher, labels, **settings).check(truth, f"{instruction_set} {where}")


@cache
def vocabulary_case(
    kind: str, size: int, dtypes: tuple[torch.dtype, torch.dtype], terms: str, temperature: float, divergence: str
) -> Case:
    return make_case(kind, (2, size), dtypes, terms, temperature=temperature, divergence=divergence)


@pytest.mark.parametrize("offset", [0.0, 100.0, -37.3])
@pytest.mark.parametrize("difference", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_gradient_stays_exact_as_the_student_meets_the_teacher(
    instruction_set: str, divergence: str, difference: float, offset: float
) -> None:
    g = oracle.generator(difference)
    noise, teacher = (torch.randn(4, 3000, generator=g, dtype=torch.float64) for _ in range(2))
    teacher = (2 * teacher).float()
    student = (teacher.double() + difference * noise + offset).float()
    for temperature in (2.0, 3.7):
        settings: dict[str, Any] = {"divergence": oracle.DIVERGENCES[divergence], "temperature": temperature}
        calls.check(student, teacher, where=f"{instruction_set} {difference} {offset}", **settings)


@pytest.mark.parametrize("divergence", ANY_DIVERGENCE)
def test_a_student_that_is_surer_than_its_teacher(instruction_set: str, divergence: str) -> None:
    """g_k - q_k sum g where one q is almost 1, so that large numbers cancel: for reverse KL, q_k (r_k - D)."""
    for kind, temperature, size in (("plain", 0.5, 1000), ("far", 1.0, 17), ("far", 3.7, 5000)):
        settings = {"divergence": ANY_DIVERGENCE[divergence], "temperature": temperature}
        where, student, teacher, _, settings, truth = make_case(kind, (24, size), HALF_MIXES[0], "soft", **settings)
        calls.by_backend(student, teacher, **settings).check(truth, f"{instruction_set} {where}")


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_models_that_are_sure_of_the_same_column(instruction_set: str, divergence: str) -> None:
    """Where 1 - p is below what a float can hold beside 1, the gradient, of that size itself, keeps three digits or so:
    its error is that of sums with 1 in them, twice rounded. Under 2^-34 of the weight, against 2^-44 elsewhere."""
    for margin, size in ((20.0, 9000), (30.0, 30522)):
        g = oracle.generator("sure", margin)
        student, teacher = torch.randn(8, size, generator=g), torch.randn(8, size, generator=g)
        student[:, size // 2] += margin
        teacher[:, size // 2] += margin
        settings: dict[str, Any] = {"divergence": oracle.DIVERGENCES[divergence], "temperature": 1.0}
        truth = oracle.exact(student, teacher, **settings)
        error = (calls.by_backend(student, teacher, **settings).grad.double() - truth.grad).norm(dim=-1)
        bound = oracle.gradient_bound(truth, torch.float32) + 2.0**-34 * truth.mass
        assert (error <= bound).all(), f"{margin}: {(error / bound).max().item():.3g} times the bound"


@pytest.mark.parametrize("margin", [0.0, 5.0, 15.0, 25.0, 40.0])
def test_gradient_of_a_label_that_the_model_is_sure_of(instruction_set: str, margin: float) -> None:
    """softmax - 1 has lost all digits where p = 1 - 1e-9; the exact value is the sum of the other probabilities."""
    logits = torch.randn(3, 5000, generator=oracle.generator(margin))
    labels = torch.tensor([0, 2500, 4999])
    logits[torch.arange(3), labels] = logits.amax(-1) + margin
    others = logits.double().scatter(-1, labels[:, None], -torch.inf)
    rest = (others.logsumexp(-1) - logits.double().logsumexp(-1)).exp()
    expected = (others - logits.double().logsumexp(-1, keepdim=True)).exp().scatter(-1, labels[:, None], -rest[:, None])
    for temperature in (1.0, 2.0, 3.7):
        result = calls.by_backend(logits, logits, labels, temperature=temperature, soft_weight=0.5, reduction="sum")
        error = (result.grad.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.max() < 3e-6, f"both terms, T = {temperature}, margin {margin}: {error}"
    alone = distil_fast.cross_entropy(logits, labels, reduction="none")
    error = (alone.double() / -torch.log1p(-rest) - 1).abs().max()
    assert error < 1e-5, f"loss: relative error {error}, margin {margin}"


def test_same_logits_have_no_divergence_and_no_gradient(instruction_set: str) -> None:
    teacher = 5 * torch.randn(3, 3001, generator=oracle.generator("same"))
    for divergence, temperature in itertools.product(oracle.DIVERGENCES.values(), TEMPERATURES):
        result = calls.by_backend(teacher.clone(), teacher, divergence=divergence, temperature=temperature)
        if divergence != "soft_cross_entropy":  # the teacher's entropy remains
            assert result.values["loss"] == 0, f"{divergence} {temperature}"
        assert not result.grad.any(), f"{divergence} {temperature}"


# ------------------------------------------------------------------------------------------------ fp16


@pytest.mark.parametrize("rows", [1, 5000])
def test_fp16_gradient_is_stored_in_a_power_of_two_and_leaves_in_one_rounding(instruction_set: str, rows: int) -> None:
    student, teacher = (x.half() for x in oracle.logit_pair("plain", rows, 40, oracle.generator(rows)))
    labels = torch.arange(rows) % 40
    stored = calls.by_backend(student, teacher, labels)
    assert stored.unit == 2.0 ** round(torch.tensor(stored.unit).log2().item())
    assert 2.0**-12 < stored.grad.abs().max() < 2.0**14, "the unit is not of the gradient's size"
    for grad_output in (1.0, 0.25, -3.0, 65536.0):
        final = calls.by_autograd(student, teacher, labels, upstream=torch.tensor(grad_output)).grad
        torch.testing.assert_close(final, (stored.grad.double() * stored.unit * grad_output).half(), rtol=0, atol=0)


def test_fp16_gradient_survives_a_mean_over_many_rows() -> None:
    """p / N underflows in fp16 before a loss scaler acts; in units of the rows' weight it does not."""
    student, teacher = (x.half() for x in oracle.logit_pair("plain", 2048, 64, oracle.generator("scaler")))
    scaled = calls.by_autograd(student, teacher, upstream=torch.tensor(65536.0)).grad
    truth = oracle.exact(student, teacher).grad * 65536.0
    assert (scaled.double() - truth).norm() < 4e-4 * truth.norm()


# ------------------------------------------------------------------------------------------------ arguments

ROWS = 6
CLASS_WEIGHTS = torch.rand(37, generator=oracle.generator("class weights")).index_fill(0, torch.tensor([0]), 0.0)
ARGUMENTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "t_squared off": {"t_squared": False, "temperature": 3.0},
    "temperature per row": {"temperature": torch.tensor([0.5, 1.0, 2.0, 3.7, 10.0, 2.0])},
    "temperature per row, t_squared off": {"temperature": torch.linspace(0.5, 4.0, ROWS), "t_squared": False},
    "temperature as a tensor": {"temperature": torch.tensor(3.0)},
    "soft_weight": {"soft_weight": 0.3},
    "hard_weight": {"hard_weight": 2.5},
    "negative weight": {"soft_weight": -1.5, "hard_weight": 2.0},
    "weights as tensors": {"soft_weight": torch.tensor(0.3), "hard_weight": torch.tensor(2, dtype=torch.float64)},
    "soft alone": {"hard_weight": 0.0},
    "hard alone": {"soft_weight": 0.0},
    "bool mask": {"soft_mask": torch.tensor([True, False, True, True, False, True])},
    "float mask": {"soft_mask": torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25, 0.0])},
    "half mask": {"soft_mask": torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25, 0.0], dtype=torch.bfloat16)},
    "soft_count": {"soft_count": 17},
    "hard_count": {"hard_count": 17.0},
    "counts as tensors": {"soft_count": torch.tensor(5), "hard_count": torch.tensor(2.5)},
    "mask and count": {"soft_mask": torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25, 0.0]), "soft_count": 11},
    "ignore_index": {"ignore_index": 3},
    "ignore_index inside": {"ignore_index": 0},
    "label_smoothing": {"label_smoothing": 0.1},
    "all smooth": {"label_smoothing": 1.0, "temperature": 1.0},
    "smoothing at 3.7": {"label_smoothing": 0.3, "temperature": 3.7},
    "reverse": {"divergence": "reverse_kl"},
    "jsd": {"divergence": distil_fast.JSD(0.25)},
    "class_weights": {"class_weights": CLASS_WEIGHTS},
    "class_weights and count": {"class_weights": CLASS_WEIGHTS, "hard_count": 5.0, "hard_weight": 0.5},
    "ignore_index and class_weights": {"class_weights": CLASS_WEIGHTS, "ignore_index": 3},
    "half class_weights": {"class_weights": CLASS_WEIGHTS.bfloat16(), "soft_weight": 0.0},
    "z_loss": {"z_loss": 1e-2},
    "z_loss at T = 1, smooth": {"z_loss": 0.3, "temperature": 1.0, "label_smoothing": 0.2},
    "z_loss alone": {"z_loss": 1e-4, "soft_weight": 0.0},
    "z_loss and class_weights": {"z_loss": 1e-2, "class_weights": CLASS_WEIGHTS, "temperature": 3.7},
    "student_logit_scale": {"student_logit_scale": 0.3},
    "student_softcap": {"student_softcap": 3.0},
    "student_softcap at T = 1": {"student_softcap": 3.0, "temperature": 1.0},
    "student_softcap at 3.7, smooth": {"student_softcap": 3.0, "temperature": 3.7, "label_smoothing": 0.1},
    "student_softcap, hard": {"student_softcap": 3.0, "student_logit_scale": 1.7, "soft_weight": 0.0},
    "teacher_logit_scale": {"teacher_logit_scale": 1.3},
    "teacher_softcap": {"teacher_softcap": 5.0, "teacher_logit_scale": 0.7, "divergence": "reverse_kl"},
    "both softcaps": {"student_softcap": 3.0, "teacher_softcap": 5.0, "divergence": "hellinger"},
    "a softcap far away": {"student_softcap": 1e6},
    "a softcap that is near": {"student_softcap": 0.01},
    "vocab_size": {"vocab_size": 37},
    "transforms everywhere": {
        "student_logit_scale": 0.9,
        "student_softcap": 4.0,
        "teacher_logit_scale": 1.1,
        "teacher_softcap": 6.0,
        "temperature": torch.tensor([0.5, 1.0, 2.0, 3.7, 10.0, 2.0]),
        "soft_mask": torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25, 0.0]),
        "class_weights": CLASS_WEIGHTS,
        "z_loss": 0.01,
        "divergence": distil_fast.JSD(0.25),
    },
    "everything": {
        "temperature": torch.tensor([0.5, 1.0, 2.0, 3.7, 10.0, 2.0]),
        "soft_weight": 0.7,
        "hard_weight": 1.3,
        "soft_mask": torch.tensor([0.5, 0.0, 2.0, 1.0, 0.25, 0.0]),
        "divergence": distil_fast.JSD(0.25),
        "label_smoothing": 0.1,
        "t_squared": False,
    },
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def labelled_case(dtype: torch.dtype, size: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = oracle.logit_pair("plain", ROWS, size, oracle.generator("arguments"))
    labels = torch.tensor([3, -100, 0, size - 1, 3, -100])
    return student.to(dtype), teacher.to(dtype), labels


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_arguments(argument: str, reduction: str, dtype: torch.dtype) -> None:
    settings: dict[str, Any] = ARGUMENTS[argument] | {"reduction": reduction}
    if reduction != "mean" and any(name.endswith("count") for name in settings):
        pytest.skip("counts are denominators, and only a mean has one")
    student, teacher, labels = labelled_case(dtype)
    if argument.startswith("ignore_index"):
        labels = torch.where(labels == -100, 5, labels)
    upstream = torch.tensor([1.0, -0.5, 3.0, 0.0, 0.125, 2.0]) if reduction == "none" else None
    calls.check(student, teacher, labels, argument, upstream, **settings)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("grad_output", [1.0, 0.25, -3.0, 0.0, 1e-3])
def test_grad_output_of_a_scalar_loss(instruction_set: str, grad_output: float, inplace: bool) -> None:
    for dtype in DTYPES[:3]:
        student, teacher, labels = labelled_case(dtype)
        truth = oracle.exact(student, teacher, labels)
        x = student.clone().requires_grad_()
        distil_fast.distillation_loss(x, teacher, labels, inplace=inplace).loss.backward(torch.tensor(grad_output))
        assert x.grad is not None
        expected = truth.grad * grad_output
        tolerance = {torch.float32: 4e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}[dtype]
        assert (x.grad.double() - expected).norm() <= tolerance * expected.norm(), f"{dtype}"


@pytest.mark.parametrize("size", [1, 7, 37, 2049])
def test_integer_labels_of_every_width(size: int) -> None:
    student, teacher, labels = labelled_case(torch.float32, size)
    labels[labels >= size] = 0
    expected = calls.by_autograd(student, teacher, labels)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        if size > torch.iinfo(dtype).max:
            continue
        narrow = torch.where(labels == -100, 100, labels) if dtype == torch.uint8 else labels
        result = calls.by_autograd(
            student, teacher, narrow.to(dtype), ignore_index=100 if dtype == torch.uint8 else -100
        )
        assert torch.equal(result.grad, expected.grad)
        assert result.values == expected.values


def test_modules_of_one_term_are_the_same_kernel(instruction_set: str) -> None:
    student, teacher, labels = labelled_case(torch.float32)
    mask = torch.tensor([True, False, True, True, False, True])
    x = student.clone().requires_grad_()
    soft = distil_fast.divergence_loss(
        x, teacher, divergence="jsd", temperature=3.0, mask=mask, count=9, t_squared=True
    )
    hard = distil_fast.cross_entropy(x, labels, count=9, label_smoothing=0.2)
    soft_truth = oracle.exact(student, teacher, divergence="jsd", temperature=3.0, soft_mask=mask, soft_count=9)
    hard_truth = oracle.exact(student, None, labels, hard_count=9, label_smoothing=0.2)
    for loss, truth, name in ((soft, soft_truth, "soft"), (hard, hard_truth, "hard")):
        oracle.check_values({name: loss.detach()}, truth, name)
        oracle.check_gradient(torch.autograd.grad(loss, x)[0], truth, name)
