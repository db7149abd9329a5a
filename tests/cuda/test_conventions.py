"""What the CUDA backend adds to the CPU's conventions: scalars on the device, faults that stop nothing, layouts, order.

Runs on the emulated device (conftest.py). Next: test_sanitizers.py, races and stray accesses; test_compiled.py, nvcc.
"""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from distil_fast import backends
from distil_fast.backends import cuda
from tests import calls, oracle
from tests.cuda import emulated
from tests.cuda.conftest import DEVICES
from tests.test_row_loss_memory import BATCH, LAYOUTS, SIZE, TOKENS, bits, outside

HALVES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_PAIRS = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]


def case(rows: int = 6, size: int = 37, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = oracle.generator("conventions", rows, size)
    student, teacher = oracle.logit_pair("plain", rows, size, g)
    labels = torch.randint(0, size, (rows,), generator=g)
    return student.to(dtype), teacher.to(dtype), labels


def same(a: Any, b: Any) -> bool:
    return torch.equal(bits(a.contiguous()), bits(b.contiguous()))


def call(student: Tensor, teacher: Tensor | None, labels: Tensor | None, **settings: Any) -> calls.Result:
    return calls.by_backend(student, teacher, labels, backend=cuda, **settings)


# ------------------------------------------------------------------------------------------------ scalars, units


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int64], ids=str)
def test_scalars_on_the_device_are_numbers(dtype: torch.dtype) -> None:
    student, teacher, labels = case()
    numbers = {"temperature": 3.0, "soft_weight": 2.0, "hard_weight": -1.0, "soft_count": 5.0, "hard_count": 4.0}
    expected = call(student, teacher, labels, **numbers)
    found = call(student, teacher, labels, **{name: torch.tensor(n, dtype=dtype) for name, n in numbers.items()})
    assert found.values == expected.values
    assert same(found.grad, expected.grad)
    assert expected.values["loss"] != call(student, teacher, labels).values["loss"]


def test_temperature_per_row() -> None:
    student, teacher, labels = case()
    temperature = torch.tensor([0.5, 1.0, 2.0, 3.7, 10.0, 2.0])
    truth = oracle.exact(student, teacher, labels, temperature=temperature)
    call(student, teacher, labels, temperature=temperature).check(truth, "a temperature per row")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_unit_is_the_cpus_and_stays_on_the_device(dtype: torch.dtype) -> None:
    student, teacher, labels = case(dtype=dtype)
    args = calls.after_labels(labels, {"soft_weight": 0.7, "hard_weight": 1.3})
    *_, grad, unit = cuda.row_loss(student, teacher, labels, *args, gradient="fresh")
    if dtype == torch.float16:
        assert isinstance(unit, Tensor)
        assert unit.shape == ()
        assert unit.item() == 2.0 ** (math.ceil(math.log2((0.7 * 2 + 1.3) / 6)) - 6)
    else:
        assert unit == 1.0
    assert grad is not None
    *_, unit = cuda.row_loss(student, teacher, labels, *args, gradient="fresh", upstream=torch.ones(6))
    assert unit == 1.0
    args = calls.after_labels(labels, {"soft_weight": 0.7, "hard_weight": 1.3, "student_logit_scale": 0.125})
    *_, unit = cuda.row_loss(student, teacher, labels, *args, gradient="fresh")
    assert float(unit) == (2.0 ** (math.ceil(math.log2((0.7 * 2 + 1.3) / 6)) - 9) if dtype == torch.float16 else 1.0)
    *_, unit = cuda.pair_loss(student, teacher, None, 1.0, -1.0, "cosine", 1.0, "mean", gradient=True)
    assert isinstance(unit, Tensor) == (dtype == torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rescale(dtype: torch.dtype) -> None:
    for cols, (factor, unit) in itertools.product((1, 7, 1000, 5001), ((0.25, 1.0), (-3.0, 0.5), (0.0, 1.0))):
        grad = torch.randn(3, cols + 5, generator=oracle.generator(cols)).to(dtype)
        expected = grad.clone()
        expected[:, 2:-3] = (expected[:, 2:-3].float() * (factor * unit)).to(dtype)
        cuda.rescale(grad[:, 2:-3], torch.tensor(factor), torch.tensor(unit))
        assert same(grad, expected)


def test_rescale_by_one_touches_nothing() -> None:
    """Multiplied by 1, a signalling nan would become a quiet one."""
    grad = torch.full((2, 9), 0x7F800001, dtype=torch.int32).view(torch.float32)
    before = bits(grad).clone()
    for factor, unit in ((1.0, 1.0), (0.5, torch.tensor(2.0)), (8.0, 0.125)):
        cuda.rescale(grad, torch.tensor(factor), unit)
        assert torch.equal(bits(grad), before)
    cuda.rescale(grad, torch.tensor(2.0), 1.0)
    assert not torch.equal(bits(grad), before)


# ------------------------------------------------------------------------------------------------ faults

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "label too large": ({"labels": 37}, "labels: expected 0 <= label < 37 or ignore_index, got 37 in row 4"),
    "label negative": ({"labels": -1}, "labels: expected 0 <= label < 37 or ignore_index, got -1 in row 4"),
    "label enormous": ({"labels": 2**40}, f"got {2**40} in row 4"),
    "mask negative": ({"soft_mask": -0.5}, "soft_mask: expected finite token weights >= 0, got -0.5 in row 4"),
    "mask nan": ({"soft_mask": math.nan}, "got nan in row 4"),
    "mask infinite": ({"soft_mask": math.inf}, "got inf in row 4"),
    "class weight negative": (
        {"class_weights": -0.5},
        "class_weights: expected finite weights >= 0, got -0.5 for class 36",
    ),
    "class weight nan": ({"class_weights": math.nan}, "class_weights: .*, got nan for class 36"),
    "temperature 0": ({"temperature": 0.0}, "temperature: expected a number > 0 .*, got 0.0 in row 4"),
    "temperature nan": ({"temperature": math.nan}, "temperature: .*, got nan in row 4"),
    "temperature negative": ({"temperature": -2.0}, "temperature: .*, got -2.0 in row 4"),
}


def with_fault(values: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """A call of six rows, with these values in row 4; a class weight is that of row 4's label, which is no other's."""
    student, teacher, labels = case()
    labels[:] = torch.tensor([1, 0, 3, 1, 36, 2])
    settings = {
        "soft_mask": torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0]),
        "temperature": torch.full((6,), 2.0),
        "class_weights": torch.linspace(0.5, 2.0, 37),
    }
    for name, value in values.items():
        (labels if name == "labels" else settings[name])[36 if name == "class_weights" else 4] = value
    return student, teacher, labels, settings


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_row_at_fault_is_nan_alone_and_has_no_gradient(fault: str, reduction: str) -> None:
    student, teacher, labels, settings = with_fault(FAULTS[fault][0])
    counts = {"soft_count": 5.5, "hard_count": 6.0, "reduction": reduction}
    found = call(student, teacher, labels, **settings, **counts)
    unused = {"labels": -100, "soft_mask": 0.0}
    student, teacher, labels, settings = with_fault(unused)
    expected = call(student, teacher, labels, **settings, **counts)
    assert same(found.grad, expected.grad)
    assert (found.grad[4] == 0).all()
    assert found.values["loss"].isnan().any()
    if reduction == "none":
        others = torch.arange(6) != 4
        assert found.values["loss"].isnan().equal(~others)
        assert same(found.values["loss"][others], expected.values["loss"][others])


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checking_mode_raises_what_the_cpu_raises(fault: str) -> None:
    student, teacher, labels, settings = with_fault(FAULTS[fault][0])
    with backends.checked(), pytest.raises(ValueError, match=FAULTS[fault][1]):
        call(student, teacher, labels, **settings)


def test_the_checking_mode_in_the_other_ops() -> None:
    student, teacher, _ = case()
    mask, temperature = torch.ones(6), torch.full((6,), 2.0)
    mask[3], temperature[2] = -1.0, math.inf
    loss, _, grad, _ = cuda.pair_loss(student, teacher, mask, 1.0, -1.0, "cosine", 1.0, "none", gradient=True)
    assert loss.isnan().tolist() == [i == 3 for i in range(6)]
    assert grad is not None
    assert (grad[3] == 0).all()
    out = cuda.softmax(student, temperature, False)
    assert out.isnan().all(-1).tolist() == [i == 2 for i in range(6)]
    with backends.checked():
        with pytest.raises(ValueError, match=r"mask: expected finite token weights >= 0, got -1.0 in row 3"):
            cuda.pair_loss(student, teacher, mask, 1.0, -1.0, "cosine", 1.0, "none")
        with pytest.raises(ValueError, match=r"temperature: .*, got inf in row 2"):
            cuda.softmax(student, temperature, False)
        call(student, teacher, None)


def test_class_weights_of_labels_that_no_row_has_are_not_read() -> None:
    student, teacher, labels = case()
    weights = torch.full((37,), math.nan)
    weights[labels] = torch.arange(6.0)
    weights[labels[2]] = 0.0
    truth = oracle.exact(student, teacher, labels, class_weights=weights)
    with backends.checked():
        call(student, teacher, labels, class_weights=weights).check(truth, "class weights")


FLAWS = {"probs": ("too much", "negative", "nan", "-inf", "nothing"), "log_probs": ("too much", "nan", "nothing")}


@pytest.mark.parametrize(("form", "flaw"), [(form, flaw) for form, flaws in FLAWS.items() for flaw in flaws])
def test_a_row_that_is_no_distribution_is_nan_alone_and_has_no_gradient(
    instruction_set: str, form: str, flaw: str
) -> None:
    """Reductions take turns: each with every flaw, and on every device."""
    turn = FLAWS[form].index(flaw) + list(FLAWS).index(form) + list(DEVICES).index(instruction_set)
    reduction = ("none", "mean")[turn % 2]
    student, teacher, labels = case(size=1500)
    probs = (teacher / 2.0).softmax(-1)
    settings: dict[str, Any] = {"teacher_form": form, "reduction": reduction, "student_softcap": 4.0}
    if reduction == "mean":
        settings |= {"soft_count": 6.0, "hard_count": 6.0}  # as many with the row as without
    with_mask = {**settings, "soft_mask": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])}
    of_form = torch.log if form == "log_probs" else torch.clone
    expected = call(student, of_form(probs), labels, **with_mask)
    with backends.checked():
        call(student, of_form(probs), labels, **with_mask)
    bad = of_form(probs)
    if flaw == "too much":
        bad[4] = of_form(1.002 * probs[4])
    elif flaw == "nothing":
        bad[4] = of_form(torch.zeros(1500))
    else:
        bad[4, 1499] = {"negative": -1e-6, "nan": math.nan, "-inf": -math.inf}[flaw]
    found = call(student, bad, labels, **settings)
    assert (found.grad[4] == 0).all()
    others = torch.arange(6) != 4
    assert same(found.grad[others], expected.grad[others])
    assert found.values["soft"].isnan().equal(~others if reduction == "none" else torch.tensor(True))
    assert found.values["loss"].isnan().equal(~others if reduction == "none" else torch.tensor(True))
    message = "teacher_logits: expected probabilities >= 0 .* sum to at most 1, got a sum of .* in row 4"
    with backends.checked(), pytest.raises(ValueError, match=message):
        call(student, bad, labels, **settings)
    masked = call(student, bad, labels, **with_mask)
    assert same(masked.grad, expected.grad)


def test_16_bits_may_sum_to_a_little_more() -> None:
    student, teacher, labels = case(dtype=torch.bfloat16)
    for dtype, excess in ((torch.bfloat16, 1.04), (torch.float16, 1.008)):
        probs = excess * (teacher.double() / 2.0).softmax(-1)
        for form, given in (("probs", probs), ("log_probs", probs.log())):
            with backends.checked():
                call(student, given.to(dtype), labels, teacher_form=form)
                with pytest.raises(ValueError, match=r"got a sum of 1\.0"):
                    call(student, given.float(), labels, teacher_form=form)


def test_counts_that_leave_nothing() -> None:
    student, teacher, labels = case()
    for settings in (
        {"soft_count": 0.0, "hard_count": 0.0},
        {"soft_count": torch.tensor(0), "hard_count": torch.tensor(-2.0)},
        {"soft_mask": torch.zeros(6), "hard_weight": 0.0},
    ):
        result = call(student, teacher, labels, **settings)
        assert all(value == 0 for value in result.values.values())
        assert (result.grad == 0).all()


# ------------------------------------------------------------------------------------------------ memory and order


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(instruction_set: str, layout: str) -> None:
    """Views in a sea of nan, of rows that begin anywhere: right, in place too, and nothing else is touched.

    Dtypes take turns: each pair with every layout, and on every device.
    """
    dtypes = DTYPE_PAIRS[(list(LAYOUTS).index(layout) + list(DEVICES).index(instruction_set)) % 3]
    student, teacher = (LAYOUTS[layout](dtype) for dtype in dtypes)
    g = oracle.generator(layout)
    student.copy_(torch.randn(student.shape, generator=g))
    teacher.copy_(torch.randn(teacher.shape, generator=g))
    labels = torch.randint(0, SIZE, student.shape[:-1], generator=g)
    settings: dict[str, Any] = {"divergence": "jsd", "temperature": 3.7, "label_smoothing": 0.1}
    truth = oracle.exact(student, teacher, labels, **settings)
    before = [bits(x).clone() for x in (student, teacher)]
    call(student, teacher, labels, **settings).check(truth, layout)
    call(student, teacher.contiguous(), labels, **settings).check(truth, f"{layout}, of the student alone")
    assert all(torch.equal(bits(x), b) for x, b in zip((student, teacher), before, strict=True)), "inputs changed"
    surroundings = outside(student)
    inplace = call(student, teacher, labels, gradient="inplace", **settings)
    inplace.check(truth, f"{layout}, in place")
    assert torch.equal(outside(student), surroundings), "in place wrote beside the rows"
    assert torch.equal(bits(teacher), before[1]), "the teacher changed"
    assert inplace.grad.data_ptr() == student.data_ptr()
    assert student.numel() in (BATCH * TOKENS * SIZE, SIZE)


@pytest.mark.parametrize("size", [37, 1000, 4111, 9000])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_order_of_threads_and_copies_changes_no_bit(
    size: int, dtype: torch.dtype, emulation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Late and early arrival of what is copied, and any order of a cluster's threads; each device has its own order."""
    student, teacher, labels = case(7, size, dtype)
    settings: dict[str, Any] = {"divergence": "reverse_kl", "label_smoothing": 0.1}
    truth = oracle.exact(student, teacher, labels, **settings)
    for device in DEVICES.values():
        emulation.use_device(*device)
        results = []
        for seed in (None, "1", "2"):
            if seed:
                monkeypatch.setenv("EMU_SEED", seed)
                monkeypatch.setenv("EMU_EAGER", "1")
            results.append(call(student, teacher, labels, **settings))
            monkeypatch.delenv("EMU_SEED", raising=False)
            monkeypatch.delenv("EMU_EAGER", raising=False)
        results[0].check(truth, f"{device} {size}")
        for other in results[1:]:
            assert other.values == results[0].values
            assert same(other.grad, results[0].grad)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dtype"), [(4111, torch.float32), (30522, torch.bfloat16), (70001, torch.float16)])
def test_the_devices_own_table_of_shapes(size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters of up to eight blocks of 512 threads, as they are launched on sm_90."""
    own = emulated.module("own_shapes", shapes=())
    own.use_device(*DEVICES["sm_90"])
    monkeypatch.setattr(cuda, "_C", own)
    student, teacher, labels = case(2, size, dtype)
    for divergence in ("forward_kl", "reverse_kl"):
        truth = oracle.exact(student, teacher, labels, divergence=divergence)
        call(student, teacher, labels, divergence=divergence).check(truth, f"{size} columns")


def test_a_launch_that_cannot_be_made_is_a_runtime_error(emulation: ModuleType) -> None:
    student, teacher, labels = case()
    emulation.use_device(8, 1024, 3)
    with pytest.raises(RuntimeError, match="distil_fast: CUDA: too much shared memory"):
        call(student, teacher, labels)
