"""What the compiled kernels take, on GPUs that are not there: no spills, bounded registers, 128-bit loads at any V.

Compiles for two NVIDIA and two AMD architectures; nothing is run. Rows have 30523 columns and begin anywhere, which
leaves a plain masked kernel with loads of 2 bytes. Next: aot.py, which compiles; kernels/launch.py, the launch shapes.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from distil_fast.backends import triton as backend
from distil_fast.backends.settings import TAILS, RowSettings
from distil_fast.kernels.divergences import CENTRED, DIVERGENCES
from distil_fast.kernels.pairs import PAIRS
from tests.kernels import aot
from tests.kernels.aot import HALVES, ODD, TARGETS, Launch

MIXES = list(itertools.product(HALVES, repeat=2))
# Three blocks of 256 threads on a multiprocessor, or, of the row kernel's larger variants, two; three waves on a SIMD.
REGISTERS, MORE_REGISTERS = {"cuda": 80, "hip": 168}, {"cuda": 128, "hip": 168}
NARROW = 20  # loads in the code of a kernel that are not 16 bytes: scalars, and the ends of rows
BF16 = torch.bfloat16
FIRST = ("sm_90", "gfx942")  # the others are slow tests


def check(launch: Launch, target: str, reads: int, itemsizes: int, stores: int = 0, narrow: int = 0) -> None:
    """reads: of each tensor, a tile at a time; itemsizes: the tensors' sum. A thread has 8 elements of a tile. narrow:
    loads allowed besides."""
    used = aot.compile_for(launch, target)
    where = f"{launch.name} for {target}: {used}"
    assert used.spilled == 0, where
    bound = MORE_REGISTERS if launch.kwargs.get("maxnreg", 0) > 80 else REGISTERS
    assert used.registers <= bound[TARGETS[target].backend], where
    assert used.wide_loads >= reads * itemsizes // 2, where
    assert used.narrow_loads <= NARROW + narrow, where
    assert used.wide_stores >= stores // 2, where


def check_rows(
    target: str, mix: Any, divergence: str, terms: tuple[float, float], gradient: str, **options: Any
) -> None:
    _, launch, _ = aot.row_loss(*mix, divergence, terms, gradient=gradient, target=target, options=options)
    soft, _hard = terms
    writes = gradient != "no"
    student, teacher = (dtype.itemsize for dtype in mix)
    if not soft:
        check(launch, target, 1 + writes, student, writes * student)
        return
    reads = 2 + writes * (1 + (divergence in CENTRED))  # the centre is the gradient's alone
    check(launch, target, reads, student + teacher, writes * student)


# ------------------------------------------------------------------------------------------------ budgets


def targets(slow: bool) -> Any:
    marks = {name: () if name in FIRST and not slow else (pytest.mark.slow,) for name in TARGETS}
    return pytest.mark.parametrize("target", [pytest.param(name, marks=marks[name]) for name in TARGETS])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_row_kernel(divergence: str) -> None:
    """For NVIDIA each, for AMD every third; test_row_kernel_of_every_kind, which is slow, has them all."""
    for target in FIRST if list(DIVERGENCES).index(divergence) % 3 == 0 else FIRST[:1]:
        check_rows(target, (BF16, BF16), divergence, (0.5, 0.5), "fresh")


# What the row kernel is compiled for besides: logits that are made from others.
MADE: dict[str, dict[str, Any]] = {
    "capped": {"transforms": (1.5, 30.0, 1.0, 50.0)},
    "capped beside probabilities": {"transforms": (1.0, 30.0, 1.0, 0.0), "teacher_form": "probs"},
    "beside log-probabilities": {"teacher_form": "log_probs"},
}


@targets(slow=False)
@pytest.mark.parametrize("made", MADE)
def test_row_kernel_of_logits_that_are_made(made: str, target: str) -> None:
    check_rows(target, (BF16, BF16), "reverse_kl", (0.5, 0.5), "fresh", **MADE[made])


@targets(slow=True)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_row_kernel_of_every_divergence_and_logits_that_are_made(divergence: str, target: str) -> None:
    for made, dtype in itertools.product(MADE.values(), (BF16, torch.float32)):
        check_rows(target, (dtype, dtype), divergence, (0.5, 0.5), "fresh", **made)


@targets(slow=False)
def test_row_kernel_in_float32(target: str) -> None:
    check_rows(target, (torch.float32, torch.float32), "forward_kl", (0.5, 0.5), "inplace")
    check_rows(target, (torch.float32, torch.float32), "forward_kl", (0.0, 0.5), "fresh")


@targets(slow=True)
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_row_kernel_of_every_kind(mix: Any, target: str) -> None:
    """Divergences x dtypes; and of one mix a student's dtype, all terms, with and without a gradient."""
    for divergence in DIVERGENCES:
        check_rows(target, mix, divergence, (0.5, 0.5), "fresh")
    if mix[0] == mix[1]:
        for divergence, gradient in itertools.product(DIVERGENCES, ("no", "fresh")):
            check_rows(target, mix, divergence, (0.5, 0.0), gradient)
            check_rows(target, mix, divergence, (0.5, 0.5), "no")
        for gradient in ("no", "fresh"):
            check_rows(target, mix, "forward_kl", (0.0, 0.5), gradient)


def check_topk(target: str, dtype: torch.dtype, divergence: str, tail: str, k: int, **how: Any) -> None:
    """One read of the student's row, one more of its gradient, one write."""
    _, order, launch, _ = aot.topk_loss(dtype, divergence, tail, k, target=target, **how)
    used = aot.compile_for(order, target)
    assert used.spilled == 0, f"{order.name} of {k}: {used}"
    check(launch, target, 2, dtype.itemsize, dtype.itemsize, narrow=4 * math.ceil(k / 256))


@targets(slow=False)
@pytest.mark.parametrize("tail", TAILS)
def test_topk_kernels(tail: str, target: str) -> None:
    check_topk(target, BF16, "reverse_kl", tail, 64)


@targets(slow=True)
@pytest.mark.parametrize("k", [16, 1024])
def test_topk_kernels_of_every_kind(k: int, target: str) -> None:
    for divergence in ("forward_kl", "alpha_beta"):
        check_topk(target, torch.float32, divergence, "bucket", k, options=MADE["capped"])
    check_topk(target, torch.float16, "skewed_kl", "ignore", k, cols=1000)


@targets(slow=True)
@pytest.mark.parametrize("cols", [99, 300, 1001])
def test_row_kernel_of_shorter_rows(cols: int, target: str) -> None:
    _, launch, _ = aot.row_loss(BF16, BF16, cols=cols, target=target)
    check(launch, target, 3, 4, 2)


@targets(slow=True)
def test_rows_that_are_not_congruent(target: str) -> None:
    """The first sweeps read both models in full width all the same; later, from L2, the teacher alone is narrow."""
    _, launch, _ = aot.row_loss(BF16, BF16, padding=1, target=target)
    assert not launch.kwargs["ALIGNED_T"]
    used = aot.compile_for(launch, target)
    assert used.spilled == 0
    assert used.registers <= REGISTERS[TARGETS[target].backend]
    assert used.wide_loads >= 4
    assert used.wide_stores >= 1


@targets(slow=False)
def test_the_kernels_of_one_program(target: str) -> None:
    prologue, _, reduction = aot.row_loss(BF16, BF16, target=target, class_weights=torch.ones(ODD))
    weights, _, reduction_with_unit, _ = aot.pair("cosine", torch.float16, BF16, target=target)
    for launch in (prologue, reduction, weights, reduction_with_unit):
        used = aot.compile_for(launch, target)
        assert used.spilled == 0, f"{launch.name}: {used}"
        assert used.registers <= REGISTERS[TARGETS[target].backend], f"{launch.name}: {used}"


@targets(slow=False)
@pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=() if d == BF16 else pytest.mark.slow) for d in HALVES], ids=str
)
def test_softmax_pairs_and_rescale(dtype: torch.dtype, target: str) -> None:
    size = dtype.itemsize
    for logarithm in (False, True):
        forward, backward = aot.softmaxes(dtype, logarithm, target)
        check(forward, target, 2, size, size)
        check(backward, target, 1, (3 if logarithm else 4) * size, size)
    for other in HALVES:
        cosine = next(x for x in reversed(aot.pair("cosine", dtype, other, target=target)) if x.name == "cosine_kernel")
        check(cosine, target, 3, size + other.itemsize, size)
        for kind in PAIRS:
            check(aot.pair(kind, dtype, other, aot.ODD, target)[1], target, 1, size + other.itemsize, size)
    check(aot.rescale(dtype, target)[0], target, 1, size, size)


def test_a_plain_mask_would_have_shown() -> None:
    """The counts see what they are for: rows that are not congruent have their loads one element at a time."""
    _, aligned, _ = aot.row_loss(BF16, BF16)
    _, other, _ = aot.row_loss(BF16, BF16, padding=1)
    assert aot.compile_for(other, "sm_90").narrow_loads >= aot.compile_for(aligned, "sm_90").narrow_loads + 16


# ------------------------------------------------------------------------------------------------ launches


def test_number_of_launches() -> None:
    """With backward's rescaling four at most; five for an fp16 gradient of the cosine loss."""
    names = ["prologue_kernel", "row_kernel", "reduction_kernel"]
    assert [x.name for x in aot.row_loss(torch.float16, BF16)] == names
    assert [x.name for x in aot.row_loss(BF16, BF16, upstream=torch.ones(4))] == names
    topk = ["prologue_kernel", "order_kernel", "topk_kernel", "reduction_kernel"]
    assert [x.name for x in aot.topk_loss(BF16)] == topk
    cosine = ["prologue_kernel", "cosine_kernel", "reduction_kernel"]
    assert [x.name for x in aot.pair("cosine", BF16, BF16)] == cosine
    assert [x.name for x in aot.pair("cosine", torch.float16, BF16)] == [*cosine, "cosine_kernel"]
    for kind in PAIRS:
        assert [x.name for x in aot.pair(kind, torch.float16, BF16)] == [cosine[0], "entries_kernel", cosine[2]]
    empty = torch.empty(0, 30)
    grid = aot.record(lambda: backend.softmax(empty, 2.0, False))
    assert grid == []


def keys(rows: int, cols: int, numbers: tuple[float, ...], settings: RowSettings, k: int = 50) -> list[Any]:
    """Of every kernel, the row kernel's with plain and with capped logits, and of a teacher by its probabilities."""
    temperature, soft, _, soft_count, _ = numbers
    x, labels = torch.empty(rows, cols, dtype=BF16), torch.zeros(rows, dtype=torch.int64)
    plain = settings._replace(transforms=(1.0, 0.0, 1.0, 0.0))
    variants = plain, settings, plain._replace(teacher_form="probs")
    entries = torch.zeros(rows, k, dtype=torch.int64), torch.zeros(rows, k)
    call = aot.record(
        lambda: (
            *(backend.row_loss(x, x, labels, None, None, *numbers, v, gradient="fresh") for v in variants),
            backend.topk_loss(x, *entries, labels, None, None, *numbers, plain, soft, "bucket", gradient="fresh"),
            backend.softmax(x, temperature, False),
            backend.softmax_backward(x, x, temperature, False),
            backend.pair_loss(x, x, None, soft, soft_count, "cosine", 1.0, "mean", gradient=True),
            backend.rescale(x, torch.ones(()), soft),
        )
    )
    return [aot.cache_key(launch) for launch in call]


def test_nothing_is_compiled_again_for_other_numbers() -> None:
    """Another temperature, weight, count, smoothing, parameter, z-loss, cap, scale, ignore_index, k, number of rows, or
    length of rows that have the same launch shape: also 1, and multiples of 16, which Triton specialises unless told
    not to."""
    settings = RowSettings(-100, "alpha_beta", (0.5, 0.2), True, 0.1, 0.0, "logits", (1.0, 30.0, 2.0, 0.0))
    others = (
        settings._replace(ignore_index=1, parameters=(1.0, 16.0), label_smoothing=0.0, z_loss=1.0),
        settings._replace(ignore_index=16, parameters=(16, 1), label_smoothing=1, z_loss=16.0),
        settings._replace(ignore_index=0, transforms=(16.0, 16.0, 16.0, 0.0)),
        settings._replace(label_smoothing=0, transforms=(0.5, 1, 3, 0)),
    )
    first = keys(7, 30522, (2.0, 0.5, 0.5, -1.0, -1.0), settings)
    assert len(first) == 19
    assert len(set(first)) == 13  # the prologue and the reduction of four row losses are the same
    assert keys(7, 30522, (3.7, 1.0, 16.0, 1.0, 0.0), others[0]) == first
    assert keys(1, 30522, (1.0, 0.25, 2.0, 32.0, 7.0), others[1], 33) == first
    assert keys(64, 32768, (2.0, 0.5, 0.5, -1.0, -1.0), others[2], 64) == first
    assert keys(5, 50257, (1, 2, 1, 16, 16), others[3]) == first
    assert keys(7, 30522, (2.0, 0.5, 0.5, -1.0, -1.0), settings._replace(divergence="forward_kl")) != first


@pytest.mark.parametrize("kind", PAIRS)
def test_nothing_is_compiled_again_for_another_width(kind: str) -> None:
    """The scale is 1 / width; 1 is a scale too."""
    for dtype in (BF16, torch.float16):
        first, *others = (
            [aot.cache_key(x) for x in aot.pair(kind, dtype, BF16, cols, scale=scale)]
            for cols, scale in ((768, 1 / 768), (1024, 1 / 1024), (1001, 1.0), (2048, 0.5))
        )
        assert all(other == first for other in others)


LAYOUTS: list[tuple[int, int, int]] = [(0, 0, 0), (1, 0, 0), (3, 5, 7), (8, 8, 8), (0, 8, 16), (4, 4, 4), (0, 0, 4)]


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_rows_said_to_be_congruent_are(mix: Any) -> None:
    """The interpreter does not see a lie about alignment, a GPU faults on it: from the addresses of all rows."""
    congruent = 0
    for s_layout, t_layout in itertools.product(LAYOUTS, repeat=2):
        student, teacher = (placed(d, *layout) for d, layout in zip(mix, (s_layout, t_layout), strict=True))
        launch, grad = recorded(student, teacher)
        group = launch.kwargs["VEC"]
        heads = [launch.args[i] for i in (0, 4, 8)]
        assert all(head.data_ptr() % 16 == 0 for head in heads)
        for tensor, flag, at in ((student, "ALIGNED_S", 0), (teacher, "ALIGNED_T", 4)):
            head, start = launch.args[at], launch.args[at + 1]
            assert head.data_ptr() + start * tensor.element_size() == tensor.data_ptr()
            apart = {(places(tensor, o, r) - places(grad, o, r)) % group for o in range(2) for r in range(3)}
            assert launch.kwargs[flag] == (apart == {0}), f"{flag} {s_layout} {t_layout}"
            congruent += launch.kwargs[flag]
    assert 10 < congruent < 2 * len(LAYOUTS) ** 2


def recorded(student: torch.Tensor, teacher: torch.Tensor) -> tuple[Launch, torch.Tensor]:
    """The row kernel's launch, and the gradient that it would have written."""
    made: list[Any] = []
    args = (None, None, None, 2.0, 1.0, 0.0, -1.0, -1.0, RowSettings())
    _, launch, _ = aot.record(lambda: made.extend(backend.row_loss(student, teacher, *args, gradient="fresh")))
    return launch, made[3]


def test_nothing_is_compiled_again_for_scalars_elsewhere_in_memory() -> None:
    """0-d tensors out of a packed vector, and masks and labels that begin anywhere."""
    x, vector, integers = torch.empty(8, 99), torch.arange(128.0), torch.arange(128)

    def launches(at: int) -> list[Any]:
        scalars = [vector[at + i] for i in range(5)]
        labels, mask = integers[at : at + 8], vector[at : at + 8]
        args = (mask, vector[at : at + 99], *scalars, RowSettings(reduction="none"))
        calls = aot.record(
            lambda: (
                backend.row_loss(x, x, labels, *args, gradient="fresh", upstream=vector[at : at + 8]),
                backend.rescale(x, vector[at], vector[at + 1]),
                backend.softmax(x, vector[at : at + 8], True),
                backend.pair_loss(x, x, mask, scalars[1], scalars[2], "cosine", 1.0, "mean"),
            )
        )
        return [aot.cache_key(launch) for launch in calls]

    assert launches(0) == launches(1) == launches(6)


def placed(dtype: torch.dtype, offset: int, gap: int, outer_gap: int) -> torch.Tensor:
    """[2, 3, 40] in a storage of its own, `offset` elements from its beginning."""
    strides = (3 * (40 + gap) + outer_gap, 40 + gap, 1)
    return torch.empty(512 + offset, dtype=dtype).as_strided((2, 3, 40), strides, offset)


def places(tensor: torch.Tensor, outer: int, row: int) -> int:
    """A row's address, in elements."""
    return tensor[outer, row].data_ptr() // tensor.element_size()


def test_availability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert backend.available(gpu, BF16)[0]
    assert backend.available(gpu, torch.float64) == (
        False,
        "Triton kernels serve float32, float16 and bfloat16, not torch.float64",
    )
    assert not backend.available(cpu, BF16)[0]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.available(cpu, BF16)[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    can, why = backend.available(gpu, BF16)
    assert not can
    assert "pip install triton" in why


def test_groups_fill_16_bytes() -> None:
    from distil_fast.kernels import launch

    assert [launch.group_of(4, 4), launch.group_of(2, 4), launch.group_of(2)] == [4, 8, 8]
    for wave, cols in itertools.product((32, 64), (1, 512, 513, 2048, 30522, math.inf)):
        options = launch.options_for_rows(cols, wave)
        threads = options["num_warps"] * wave
        assert options["BLOCK"] == 8 * threads
