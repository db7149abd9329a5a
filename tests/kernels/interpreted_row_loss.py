"""The row kernel against the fp64 oracle: divergences x dtypes x lengths x alignments, and every argument.

Run by test_interpreter.py. Programs are slow here (50 ms a row), so rows are few, and sizes, kinds, temperatures and
terms take turns. Next: interpreted_conventions.py.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from distil_fast.backends import triton as backend
from distil_fast.kernels import launch
from tests import calls, oracle
from tests.kernels.interpreter import HALVES, MIXES, Guarded, check, row_loss

TEMPERATURES = (2.0, 1.0, 3.7, 0.5)
SIZES = (1, 2, 7, 17, 1000)
TERMS: tuple[dict[str, Any], ...] = (
    {"soft_weight": 0.7, "hard_weight": 1.3},
    {"soft_weight": 1.0, "hard_weight": 0.0},
    {"soft_weight": 0.0, "hard_weight": 1.0, "label_smoothing": 0.1},
)


def name_of(value: object) -> str:
    return "-".join(str(v).removeprefix("torch.") for v in value) if isinstance(value, tuple) else str(value)


def case(kind: str, shape: tuple[int, ...], mix: tuple[torch.dtype, torch.dtype], *seed: object) -> Any:
    """Logits in their dtypes, and labels, of which the second row has none."""
    g = oracle.generator(kind, shape, *seed)
    rows = math.prod(shape[:-1])
    student, teacher = oracle.logit_pair(kind, rows, shape[-1], g)
    labels = torch.randint(0, shape[-1], (rows,), generator=g)
    labels[1:2] = -100
    return student.to(mix[0]).view(shape), teacher.to(mix[1]).view(shape), labels.view(shape[:-1])


# ------------------------------------------------------------------------------------------------ the matrix


def check_case(turn: int, kind: str, divergence: str, mix: tuple[torch.dtype, torch.dtype]) -> None:
    size, temperature, terms = SIZES[turn % 5], TEMPERATURES[turn % 4], TERMS[turn % 3]
    student, teacher, labels = case(kind, (2, size), mix, turn)
    settings = terms | {"divergence": oracle.DIVERGENCES[divergence], "temperature": temperature}
    check(student, teacher, labels if terms["hard_weight"] else None, kind, **settings)


@pytest.mark.parametrize("mix", MIXES, ids=name_of)
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_matrix_in_turns(divergence: str, mix: tuple[torch.dtype, torch.dtype]) -> None:
    turn = 7 * MIXES.index(mix) + 11 * list(oracle.DIVERGENCES).index(divergence)
    check_case(turn, oracle.KINDS[turn % 6], divergence, mix)


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES, ids=name_of)
@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_matrix(divergence: str, mix: tuple[torch.dtype, torch.dtype]) -> None:
    start = MIXES.index(mix)
    for turn, (kind, _) in enumerate(itertools.product(oracle.KINDS, range(4)), start=start):
        check_case(turn, kind, divergence, mix)


@pytest.mark.parametrize(
    ("mix", "divergence", "kind"),
    [
        ((torch.bfloat16, torch.bfloat16), "forward_kl", "plain"),
        ((torch.float32, torch.float32), "jsd", "close"),
        ((torch.float16, torch.float32), "reverse_kl", "far"),
    ],
    ids=name_of,
)
def test_a_vocabulary(mix: tuple[torch.dtype, torch.dtype], divergence: str, kind: str) -> None:
    """V = 30522: its rows begin on a 16-byte boundary only by chance, and one row takes many tiles."""
    student, teacher, labels = case(kind, (2, 30522), mix)
    check(student, teacher, labels, kind, divergence=oracle.DIVERGENCES[divergence], temperature=3.7)


@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("divergence", oracle.EXTREMES)
def test_extreme_parameters(divergence: str, kind: str) -> None:
    turn = list(oracle.EXTREMES).index(divergence)
    student, teacher, labels = case(kind, (2, SIZES[2 + turn % 3]), MIXES[0])
    settings = {"divergence": oracle.EXTREMES[divergence], "temperature": TEMPERATURES[turn % 4]}
    check(student, teacher, labels, kind, **settings)


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_gradient_stays_exact_as_the_student_meets_the_teacher(divergence: str) -> None:
    for difference, offset in ((1e-2, 0.0), (1e-3, 100.0), (1e-4, -37.3)):
        g = oracle.generator(difference)
        noise, teacher = (torch.randn(2, 1500, generator=g, dtype=torch.float64) for _ in range(2))
        teacher = (2 * teacher).float()
        student = (teacher.double() + difference * noise + offset).float()
        settings = {"divergence": oracle.DIVERGENCES[divergence], "temperature": 3.7}
        check(student, teacher, where=f"{difference} {offset}", **settings)


@pytest.mark.parametrize("mix", [MIXES[0], MIXES[4], MIXES[1]], ids=name_of)
def test_a_student_that_is_sure_of_the_label(mix: tuple[torch.dtype, torch.dtype]) -> None:
    """1 - p of 1e-6: as a subtraction, it would have no digits left."""
    student, teacher, labels = case("plain", (2, 1000), mix)
    labels[:] = 500
    for margin in (10.0, 17.0):
        student[:, 500] = margin + 3.0
        check(student, teacher, labels, soft_weight=0.0, hard_weight=1.0)
        check(student, teacher, labels, temperature=1.0)


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(("mix", "inplace"), [*((mix, False) for mix in MIXES), *((mix, True) for mix in MIXES[1::3])])
def test_any_stride_and_alignment(mix: tuple[torch.dtype, torch.dtype], inplace: bool) -> None:
    """Student, teacher and gradient congruent or not, from aligned pointers or not, between canaries."""
    layouts: list[tuple[int, dict[str, int], dict[str, int]]] = [
        (33, {}, {}),
        (33, {"offset": 1}, {}),  # a pointer that is not aligned
        (40, {"gap": 3}, {"gap": 8}),  # rows that are not congruent
        (17, {"offset": 3, "gap": 5, "outer_gap": 7}, {"offset": 3, "gap": 5, "outer_gap": 7}),
    ]
    for cols, s_layout, t_layout in layouts:
        student, teacher, labels = case("plain", (2, 2, cols), mix)
        s, t = Guarded(student, **s_layout), Guarded(teacher, **t_layout)
        how = "inplace" if inplace else "fresh"
        _, grad, _ = check(s.rows, t.rows, labels, f"{s_layout} {t_layout}", gradient=how, label_smoothing=0.1)
        assert (grad.data_ptr() == s.rows.data_ptr()) == inplace
        assert inplace or torch.equal(s.rows, student)
        s.check()
        t.check()


def test_a_shifted_sequence() -> None:
    """logits[:, :-1]: no copy, and the gradient is contiguous."""
    student, teacher, labels = case("plain", (2, 3, 101), (torch.bfloat16, torch.bfloat16))
    _, grad, _ = check(student[:, :-1], teacher[:, :-1], labels[:, 1:].contiguous())
    assert grad.is_contiguous()


def test_a_storage_that_is_not_aligned() -> None:
    """Memory of others may begin anywhere; the pointer is then used as it is."""
    raw = bytearray(4 * 3 * 50 + 64)
    start = -torch.frombuffer(raw, dtype=torch.uint8).data_ptr() % 16 + 4
    student = torch.frombuffer(raw, dtype=torch.float32, count=150, offset=start).view(3, 50)
    assert student.data_ptr() % 16 == 4
    values, teacher, labels = case("plain", (3, 50), MIXES[0])
    student.copy_(values)
    check(student, teacher, labels)


@pytest.mark.parametrize("cols", [1, 2, 3, 7, 8, 9, 14, 15, 16, 17, 23, 25])
def test_short_rows(cols: int) -> None:
    """Rows without a whole group, with one, with pieces at both ends."""
    student, teacher, labels = case("plain", (3, cols), (torch.bfloat16, torch.bfloat16))
    check(student, teacher, labels)


def test_lengths_around_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SHAPES", {math.inf: launch.Shape(64, 1)})
    for cols, offset in itertools.product((63, 64, 65, 127, 129), (0, 1, 4)):
        student, teacher, labels = case("ascending", (1, cols), MIXES[0])
        s, t = Guarded(student, offset=offset), Guarded(teacher, offset=offset)
        check(s.rows, t.rows, labels, f"offset {offset}", gradient="inplace")
        s.check()


def test_rows_beyond_the_first_2_to_the_31_elements() -> None:
    """Offsets are of 64 bits: the third row begins where a 32-bit product would have wrapped."""
    stride = 2**30 + 8
    try:
        memory = torch.empty(2 * stride + 64, dtype=torch.bfloat16)  # untouched pages cost nothing
    except RuntimeError:
        pytest.skip("no address space for 4 GB")
    values, teacher, labels = case("plain", (3, 40), (torch.bfloat16, torch.bfloat16))
    student = memory.as_strided((3, 40), (stride, 1))
    student.copy_(values)
    check(student, teacher, labels)


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masks_weights_and_temperatures(reduction: str, dtype: torch.dtype) -> None:
    student, teacher, labels = case("plain", (4, 50), (dtype, dtype))
    upstream = torch.tensor([1.0, -2.0, 0.25, 0.5]) if reduction == "none" else None
    masks = torch.tensor([True, True, False, True]), torch.tensor([0.5, 2.0, 0.0, 1.5])
    for mask, temperature in zip(masks, (torch.tensor([1.0, 2.0, 0.7, 3.7]), torch.tensor(2.0)), strict=True):
        settings = {"soft_mask": mask, "temperature": temperature, "reduction": reduction, "label_smoothing": 0.2}
        check(student, teacher, labels, upstream=upstream, soft_weight=-0.5, hard_weight=2.0, **settings)


def test_an_upstream_gradient_of_zero_reads_nothing() -> None:
    student, teacher, labels = case("plain", (3, 50), MIXES[0])
    labels[:] = 3
    truth = oracle.exact(student, teacher, labels, torch.tensor([1.0, 0.0, 2.0]), reduction="none")
    student[1], teacher[1] = math.nan, math.nan
    upstream = torch.tensor([1.0, 0.0, 2.0])
    _, grad, _ = row_loss(student, teacher, labels, reduction="none", upstream=upstream)
    oracle.check_gradient(grad, truth, "upstream 0")


def test_scalars_on_the_device_are_as_numbers() -> None:
    """Weights, counts and the temperature as 0-d tensors of any dtype, against the same numbers: to the bit."""
    student, teacher, labels = case("plain", (3, 50), MIXES[0])
    numbers = {"temperature": 3.0, "soft_weight": 0.5, "hard_weight": 2.0, "soft_count": 4.0, "hard_count": 5.0}
    expected, expected_grad, _ = check(student, teacher, labels, **numbers)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensors = {name: torch.tensor(number, dtype=dtype) for name, number in numbers.items()}
        tensors["hard_count"] = torch.tensor(5)
        values, grad, _ = row_loss(student, teacher, labels, **tensors)
        assert all(torch.equal(values[name], expected[name]) for name in values)
        assert torch.equal(grad, expected_grad)


def test_vectors_of_any_dtype_and_stride() -> None:
    """Labels, masks, temperatures and upstream gradients are read as they are."""
    student, teacher, labels = case("plain", (2, 2, 50), MIXES[0])
    mask, temperature = torch.tensor([[1.0, 0.5], [0.0, 2.0]]), torch.tensor([[1.0, 2.0], [4.0, 0.5]])
    upstream = torch.tensor([[1.0, -2.0], [0.5, 0.25]])
    settings = {"soft_mask": mask, "temperature": temperature, "upstream": upstream, "reduction": "none"}
    _, expected, _ = row_loss(student, teacher, labels, **settings)
    for dtype, integer in ((torch.float64, torch.int32), (torch.bfloat16, torch.int8), (torch.float16, torch.int16)):
        others = {name: v.to(dtype).t().contiguous().t() for name, v in settings.items() if isinstance(v, torch.Tensor)}
        _, grad, _ = row_loss(student, teacher, labels.to(integer), **settings | others)
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("zero", [0, torch.tensor(0.0), torch.tensor(-1.0), torch.tensor(math.nan)], ids=str)
def test_a_count_that_is_not_positive(zero: Any) -> None:
    """No term and no gradient, never nan; a tensor is the count, also where it is -1."""
    student, teacher, labels = case("plain", (3, 50), MIXES[0])
    values, grad, _ = row_loss(student, teacher, labels, soft_count=zero, hard_count=zero)
    assert all(v == 0 for v in values.values())
    assert not grad.any()


def test_terms_without_a_row() -> None:
    student, teacher, labels = case("plain", (3, 50), MIXES[0])
    nobody = torch.zeros(3, dtype=torch.bool)
    values, grad, _ = row_loss(student, teacher, torch.full_like(labels, -100), soft_mask=nobody)
    assert all(v == 0 for v in values.values())
    assert not grad.any()
    check(student, teacher, torch.full_like(labels, 7), ignore_index=7)  # another one, which takes all labels


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_rows(reduction: str) -> None:
    empty = torch.empty(2, 0, 30)
    labels = torch.empty(2, 0, dtype=torch.int64)
    values, grad, _ = row_loss(empty, empty.clone(), labels, reduction=reduction)
    assert grad.shape == empty.shape
    assert all(v.shape == (() if reduction == "mean" else (2, 0)) for v in values.values())
    assert not any(v.any() for v in values.values())


def test_values_without_a_gradient() -> None:
    student, teacher, labels = case("plain", (3, 50), MIXES[0])
    expected, _, _ = check(student, teacher, labels)
    values, grad, unit = row_loss(student, teacher, labels, gradient="no")
    assert grad is None
    assert unit == 1.0
    assert all(torch.equal(values[name], expected[name]) for name in values)


# ------------------------------------------------------------------------------------------------ units


@pytest.mark.parametrize("weight", [1.0, 0.75, 3e-5, 4096.0])
def test_the_unit_of_an_fp16_gradient(weight: float) -> None:
    """A power of two, 64 times below the least that is not below the largest row weight: that of the CPU."""
    from distil_fast.backends import native

    student, teacher, labels = case("plain", (3, 50), (torch.float16, torch.float32))
    arguments = calls.after_labels(labels, {"soft_weight": weight, "hard_weight": 0.5 * weight})
    mine, theirs = (
        module.row_loss(student, teacher, labels, *arguments, gradient="fresh")[-1] for module in (backend, native)
    )
    assert mine.shape == ()
    assert mine.item() == theirs
    assert math.frexp(mine.item())[0] == 0.5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rescale(dtype: torch.dtype) -> None:
    """One rounding; nothing is written where the product is 1; rows of any layout."""
    values = torch.randn(2, 3, 45, generator=oracle.generator("rescale")).to(dtype)
    for layout in ({}, {"offset": 1, "gap": 2}, {"gap": 3, "outer_gap": 5}):
        for grad_output, unit in ((0.37, 1.0), (0.5, torch.tensor(2.0**-12)), (4.0, torch.tensor(0.25))):
            grad = Guarded(values, **layout)
            backend.rescale(grad.rows, torch.tensor(grad_output), unit)
            factor = torch.tensor(grad_output) * torch.as_tensor(unit, dtype=torch.float32)
            assert torch.equal(grad.rows, (values.float() * factor).to(dtype))
            grad.check()
