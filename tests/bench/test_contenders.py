"""Right contenders pass, wrong ones are refused, and absent ones say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import distil_fast
from distil_fast import _C
from distil_fast.bench import cases, contenders, correctness, peers, problems, suite
from distil_fast.bench.cases import BF16, FP16, FP32, LOSS_SCALE, Case
from distil_fast.bench.problems import Problem

KL_CE = Case("KL+CE", 16, 257, FP32, temperature=2.0)


def errors_of(case: Case, name: str) -> correctness.Errors:
    problem = problems.make(case)
    contender = contenders.build(name, case, problem)
    contender.prepare()
    return correctness.errors(contender.call(), problem.exact())


@pytest.mark.parametrize("name", ["eager", "ours"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("labelled", [1.0, 0.4])
@pytest.mark.parametrize("problem", sorted(problems.PROBLEMS))
def test_right_contenders_are_timed(problem: str, labelled: float, dtype: torch.dtype, name: str) -> None:
    width = 24 if problem.startswith("linear") else 0
    temperature = 3.7 if problem == "KL+CE" else None
    case = Case(problem, 16, 257, dtype, temperature=temperature, width=width, labelled=labelled, top_k=9)
    found = errors_of(case, name)
    slack = problems.make(case).slack if name == "eager" else 1.0
    assert correctness.verdict(found, dtype, slack) is None
    assert found.array < (1e-5 if dtype == FP32 else slack * 1e-2)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    "options",
    [{"inplace": True}, {"grad_output": 0.25}, {"inplace": True, "shifted": True}, {"shifted": True}],
    ids=str,
)
def test_layouts_and_scales(options: dict[str, bool], dtype: torch.dtype) -> None:
    case = Case("KL+CE", 16, 257, dtype, temperature=2.0, **options)  # type: ignore[arg-type]
    for name in ("eager", "ours"):
        assert correctness.verdict(errors_of(case, name), dtype) is None, name


def test_the_last_rows_tell_who_loses_the_gradient_as_the_models_agree() -> None:
    case = Case("KL+CE", 16, 4001, BF16, temperature=2.0)
    eager, ours = errors_of(case, "eager"), errors_of(case, "ours")
    assert eager.near is not None
    assert ours.near is not None
    assert ours.near < 0.01 < eager.near


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("teacher_width", [36, 12])
def test_heads_that_differ_in_width(dtype: torch.dtype, teacher_width: int) -> None:
    case = Case("linear KL+CE", 40, 257, dtype, width=24, teacher_width=teacher_width)
    for name in ("eager", "ours", "ours fast"):
        assert correctness.verdict(errors_of(case, name), dtype) is None, name
    near = problems.make(replace(case, problem="linear KL")).nearby()
    assert near is not None
    found = correctness.errors(near.run(near.ours), near.exact())
    assert found.loss is not None
    assert found.loss < 1e-3


@pytest.mark.parametrize("problem", ["KL", "JSD", "linear KL", "linear JSD", "top-k KL"])
def test_both_distances_stand_beside_each_other(problem: str) -> None:
    """A divergence alone is checked again where the models agree, where its loss is ten thousand times smaller."""
    case = Case(problem, 40, 257, BF16, width=24 if "linear" in problem else 0, top_k=9)
    prepared = suite.Prepared.of(case)
    assert prepared.near is not None
    far, near = prepared.exact.loss, prepared.near[1].loss
    assert far is not None
    assert near is not None
    if problem != "top-k KL":  # whose sum over k columns is no divergence
        assert 0.0 < 1e3 * near < far
    row, contender = suite.checked("ours", case, prepared)
    assert contender is not None
    assert row.errors is not None
    assert row.errors.near is not None
    assert row.errors.near_loss is not None
    assert row.errors.near < 1e-2
    assert row.errors.near_loss < 1e-2


def test_a_loss_that_is_wrong_only_where_the_models_agree_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {"biased": lambda problem: lambda *inputs: problem.ours(*inputs) + 1e-6}
    monkeypatch.setattr(contenders, "FUNCTIONS", {**contenders.FUNCTIONS, **planted})
    case = Case("JSD", 16, 257, FP32)
    row, contender = suite.checked("biased", case, suite.Prepared.of(case))
    assert contender is not None
    assert row.errors is not None
    assert row.errors.loss is not None
    assert row.errors.near_loss is not None
    assert row.errors.loss < 1e-5 < 1e-2 < row.errors.near_loss


def test_rows_without_a_label_take_no_part() -> None:
    case = Case("KL+CE", 64, 257, FP32, temperature=2.0, labelled=0.15)
    problem = problems.make(case)
    gradient = problem.run(problem.ours).array
    assert int(gradient.any(-1).sum()) == round(0.15 * 64)
    everyone = errors_of(replace(case, labelled=1.0), "ours")
    assert everyone.array < 1e-5
    wrong = problem.run(lambda s, t, y: distil_fast.distillation_loss(s, t, y, soft_weight=0.5, hard_weight=0.5).loss)
    assert correctness.verdict(correctness.errors(wrong, problem.exact()), FP32) is not None


def test_the_products_are_a_yardstick_and_no_answer() -> None:
    case = Case("linear KL+CE", 16, 257, FP32, width=24)
    row, contender = suite.checked(cases.PRODUCTS, case, suite.Prepared.of(case))
    assert (row.errors, row.refused) == (None, None)
    assert isinstance(contender, contenders.Products)
    assert contender.call().array.shape == (16, 24)


def test_an_inplace_case_is_refilled() -> None:
    case = Case("KL+CE", 16, 257, FP32, True, 2.0)
    problem = problems.make(case)
    ours = contenders.build("ours", case, problem)
    before = problem.inputs[0].detach().clone()
    losses = []
    for _ in range(2):
        ours.prepare()
        assert torch.equal(problem.inputs[0].detach(), before)
        losses.append(ours.call().loss)
        assert not torch.equal(problem.inputs[0].detach(), before)
    assert torch.equal(*losses)


def test_fp16_overflows_under_a_loss_scale_unless_computed_in_float32() -> None:
    case = Case("KL+CE", 16, 257, FP16, temperature=2.0, grad_output=LOSS_SCALE)
    refused = correctness.verdict(errors_of(case, "eager"), FP16)
    assert refused is not None
    assert "inf" in refused
    assert correctness.verdict(errors_of(case, "eager float32"), FP16) is None


def _kl_turned_round(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return distil_fast.distillation_loss(
        student, teacher, labels, divergence="reverse_kl", soft_weight=0.5, hard_weight=0.5
    ).loss


def _another_temperature(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return distil_fast.distillation_loss(
        student, teacher, labels, temperature=2.2, soft_weight=0.5, hard_weight=0.5
    ).loss


def _ignored_rows_counted(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    soft = distil_fast.distillation_loss(student, teacher, soft_weight=0.5).loss
    return soft + 0.5 * F.cross_entropy(student, labels.clamp(min=0))


WRONG: dict[str, Callable[[Problem], problems.Function]] = {
    "half of it": lambda problem: lambda *inputs: 0.5 * problem.ours(*inputs),
    "zero gradient": lambda problem: lambda *inputs: problem.ours(*inputs).detach() + 0.0 * inputs[0].sum(),
    "right gradient, wrong loss": lambda problem: lambda *inputs: problem.ours(*inputs) + 1.0,
    "KL turned round": lambda problem: _kl_turned_round,
    "another temperature": lambda problem: _another_temperature,
    "ignored rows counted": lambda problem: _ignored_rows_counted,
}


@pytest.mark.parametrize("name", sorted(WRONG))
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_wrong_contenders_are_refused(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders.FUNCTIONS, name, WRONG[name])
    case = Case("KL+CE", 16, 257, dtype, temperature=2.0)
    row, contender = suite.checked(name, case, suite.Prepared.of(case))
    assert contender is None
    assert row.timing is None
    assert row.refused is not None
    assert row.refused.startswith("wrong")


def test_one_wrong_row_is_seen() -> None:
    problem = problems.make(KL_CE)
    outcome = problem.run(problem.ours)
    outcome.array[0] *= 1.01
    assert correctness.verdict(correctness.errors(outcome, problem.exact()), FP32) is not None


def test_nan_in_a_row_that_is_not_compared_is_seen() -> None:
    problem = problems.make(KL_CE)
    exact, outcome = problem.exact(), problem.run(problem.ours)
    unchecked = min(set(range(KL_CE.rows)) - set(exact.rows.tolist()))
    outcome.array[unchecked, 5] = float("nan")
    assert correctness.verdict(correctness.errors(outcome, exact), FP32) is not None


def test_a_contender_that_fails_is_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders.FUNCTIONS, "broken", lambda problem: lambda *inputs: inputs[0].no_such_method())
    row, contender = suite.checked("broken", KL_CE, suite.Prepared.of(KL_CE))
    assert contender is None
    assert row.refused is not None
    assert row.refused.startswith("fails: AttributeError")


def test_an_instruction_set_that_is_not_there_is_named() -> None:
    problem = problems.make(KL_CE)
    row, contender = suite.checked("ours avx1024", KL_CE, suite.Prepared.of(KL_CE))
    assert contender is None
    assert row.refused == "not available: the processor has no avx1024"
    assert not row.is_our_fault
    with pytest.raises(KeyError):
        contenders.build("theirs", KL_CE, problem)


def test_instruction_sets_hold_for_their_contender_alone() -> None:
    problem = problems.make(KL_CE)
    portable, best = (contenders.build(name, KL_CE, problem) for name in ("ours portable", "ours"))
    portable.prepare()
    assert _C.instruction_set() == "portable"
    best.prepare()
    assert _C.instruction_set() == contenders.BEST_INSTRUCTION_SET


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case("KL+CE", 16, 257, FP32, temperature=2.0), 3 * 16 * 257 * 4),
        (Case("KL+CE", 16, 257, BF16, temperature=2.0, shifted=True), 3 * 16 * 257 * 2),
        (Case("CE", 16, 257), 2 * 16 * 257 * 4),
        (Case("cosine", 16, 257), 3 * 16 * 257 * 4),
        (Case("MSE", 16, 257, labelled=0.5), 3 * 16 * 257 * 4),
        (Case("attention KL", 16, 257), 3 * 16 * 257 * 4),
        (Case("softmax", 16, 257), 2 * 16 * 257 * 4),
        (Case("softmax backward", 16, 257, FP16), 3 * 16 * 257 * 2),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_floor_bytes(case: Case, expected: int) -> None:
    assert problems.make(case).floor_bytes == expected


def test_the_table_is_consistent() -> None:
    every = list(
        {case.name: case for suite in cases.SUITES.values() for case in suite if case.device == "cpu"}.values()
    )
    assert all(len({case.name for case in suite}) == len(suite) for suite in cases.SUITES.values())
    every += cases.MEMORY
    assert len({case.name for case in cases.GPU}) == len(cases.GPU)
    assert len({case.name for case in every}) == len(every)
    for case in every:
        assert case.problem in problems.PROBLEMS
        unknown = {n for n in case.contenders if n not in contenders.FUNCTIONS} - set(cases.INSTRUCTION_SETS)
        assert unknown <= {cases.PRODUCTS, "ours fast", *peers.PEERS}
    assert {case.name for case in cases.select(every, quick=True)} < {case.name for case in every}
    assert [case.name for case in cases.select(every, containing="softmax b")] == ["softmax backward fp32 512x30522"]
    grouped = cases.groups(cases.LOSS)
    assert sorted(c.name for group in grouped for c in group) == sorted(c.name for c in cases.LOSS)
    assert max(len(group) for group in grouped) > 1


@pytest.mark.parametrize("name", sorted(peers.PEERS))
def test_another_library_says_why_it_is_not_here(name: str) -> None:
    """Not installed, or not for this device, or without such a kernel: a line of the table, and no fault of ours."""
    case = Case("cosine", 8, 16, contenders=(name,))
    row, contender = suite.checked(name, case, suite.Prepared.of(case))
    assert contender is None
    assert row.refused is not None
    assert row.refused.startswith("not available: ")
    assert any(
        reason in row.refused for reason in ("is not installed", "runs on GPUs alone", "has no kernel of Cosine")
    )
    assert not row.is_our_fault
