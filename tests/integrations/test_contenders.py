"""The benchmark's other libraries, by their real packages: each answers the question that ours answers."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import pytest
import torch

from distil_fast.bench import suite
from distil_fast.bench.cases import BF16, FP32, Case

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries' imports and compilations

PACKAGES = {"liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy", "torchtune chunked": "torchtune"}
ON_CPU = [
    ("KL", "trl"),
    ("reverse KL", "trl"),
    ("reverse KL", "torchtune"),
    ("reverse KL", "torchtune chunked"),
    ("JSD", "trl"),
    ("soft CE", "torchtune"),
    ("soft CE", "torchtune chunked"),
    ("linear KL", "trl"),
    ("linear JSD", "trl"),
    ("linear KL", "liger"),
    ("linear JSD", "liger"),
    ("linear KL+CE", "liger"),
    ("linear CE", "cut-cross-entropy"),
]


@pytest.mark.parametrize("labelled", [1.0, 0.4])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("problem", "name"), ON_CPU)
def test_value_and_gradient_are_those_of_the_question(
    problem: str, name: str, dtype: torch.dtype, labelled: float
) -> None:
    package = PACKAGES.get(name, name)
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    width = 24 if problem.startswith("linear") else 0
    case = Case(problem, 64, 257, dtype, temperature=2.0 if problem == "KL" else None, labelled=labelled, width=width)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row, contender = suite.checked(name, case, suite.Prepared.of(case))
    assert row.refused is None
    assert contender is not None
    assert row.errors is not None
    assert row.errors.loss is not None
    assert row.errors.loss < (1e-5 if dtype == FP32 else 1e-2)
    assert row.errors.array < (1e-4 if dtype == FP32 else 1e-1)


@pytest.mark.parametrize(
    ("problem", "name", "package"),
    [
        ("JSD", "liger", "liger_kernel"),
        ("linear JSD", "liger triton", "liger_kernel"),
        ("linear CE", "fla", "fla"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_of_triton_say_that_they_need_a_gpu(problem: str, name: str, package: str) -> None:
    pytest.importorskip(package)
    case = Case(problem, 8, 32, width=16 if problem.startswith("linear") else 0)
    row, contender = suite.checked(name, case, suite.Prepared.of(case))
    assert contender is None
    assert row.refused is not None
    assert "runs on GPUs alone" in row.refused
