"""The suite of the integrations: what both sides must compute, absent hosts, its tables; planted mistakes are seen."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from distil_fast import _C, distillation_loss, divergence_loss
from distil_fast.bench import contenders, correctness, hosts, integrations, problems, report
from distil_fast.bench.cases import BF16, FP32, Case
from distil_fast.bench.correctness import Errors
from distil_fast.bench.host_problem import HostProblem
from distil_fast.bench.hosts import AFTER, BEFORE, HOSTS, Batch, Host
from distil_fast.bench.measure import QUICK, Timing
from distil_fast.bench.results import Results, Row

TINY = Case("", 32, 96, contenders=(BEFORE, AFTER))


def case_of(host: Host) -> Case:
    return replace(TINY, problem=host.name, width=8 if host.hidden else 0)


def rows_of(host: Host, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Both models' logits where the host's loss is taken, made by hand."""
    student, teacher = batch.student.flatten(0, 1), batch.teacher.flatten(0, 1)
    if host.hidden:
        student, teacher = student @ batch.student_weight.t(), teacher @ batch.teacher_weight.t()
    chosen = batch.labels.flatten() != -100 if host.labelled else slice(None)
    return student[chosen], teacher[chosen]


@pytest.mark.parametrize("host", [h for h in HOSTS if "Distil" not in h.name or h.hidden], ids=lambda h: h.name)
def test_a_divergence_of_the_right_rows_is_what_a_host_means(host: Host) -> None:
    problem = problems.make(case_of(host))
    assert isinstance(problem, HostProblem)
    kind, temperature, squared = {
        "TRL GKD beta=0": ("forward_kl", 1.0, False),
        "TextBrewer kd_ce_loss": ("soft_cross_entropy", 4.0, False),
        "ModelOpt LogitsDistillationLoss": ("forward_kl", 2.0, True),
    }.get(host.name, ("soft_cross_entropy" if "torchtune" in host.name else "jsd", 1.0, False))

    def right(*_: object) -> torch.Tensor:
        student, teacher = rows_of(host, problem.batch)
        return divergence_loss(student, teacher, divergence=kind, temperature=temperature, t_squared=squared)

    exact = problem.exact()
    assert correctness.verdict(correctness.errors(problem.run(right), exact), FP32) is None
    wrong = correctness.errors(problem.run(lambda: right() * 1.001), exact)
    assert str(correctness.verdict(wrong, FP32)).startswith("wrong")


def test_the_original_distiller_means_its_own_loss() -> None:
    host = HOSTS[-1]
    problem = problems.make(case_of(host))
    assert isinstance(problem, HostProblem)
    exact = problem.exact()
    use = host.use(hosts._found(host.own))
    found = correctness.errors(problem.run(lambda: use(problem.batch)), exact)
    assert correctness.verdict(found, FP32) is None

    def ours() -> torch.Tensor:
        batch = problem.batch
        return distillation_loss(
            batch.student, batch.teacher, batch.labels, temperature=2.0, soft_weight=5.0, hard_weight=2.0
        ).loss

    assert correctness.verdict(correctness.errors(problem.run(ours), exact), FP32) is None


@pytest.mark.parametrize("name", [BEFORE, AFTER])
def test_what_is_not_installed_is_absent_and_nobodys_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(HOSTS[0], own="no_such_host:loss")
    monkeypatch.setattr("distil_fast.bench.host_problem.HOSTS", (absent,))
    problem = problems.make(case_of(absent))
    with pytest.raises(contenders.UnavailableError, match="not available: No module named 'no_such_host'"):
        contenders.build(name, case_of(absent), problem)


def test_a_run_and_its_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original distiller is here wherever the tests are; its place is taken by itself."""
    host = replace(HOSTS[-1], ours=HOSTS[-1].own)
    monkeypatch.setattr("distil_fast.bench.host_problem.HOSTS", (host,))
    monkeypatch.setattr("distil_fast.bench.suite.isolated.fresh", lambda *_: {BEFORE: 4 << 20, AFTER: 1 << 20})
    effort = replace(QUICK, warm_up=0.0, budget=0.0)
    try:
        found = integrations.run([case_of(host)], effort, processes=1, command="c", note=lambda _: None)
    finally:
        _C.use_instruction_set(contenders.BEST_INSTRUCTION_SET)
    before, after = found.rows
    assert before.timing
    assert after.timing
    assert after.facts == {integrations.LINES: 2.0}
    assert found.machine["hosts"]["transformers"]
    assert "MiB before" in shown(found)


def shown(results: Results) -> str:
    console = Console(file=io.StringIO(), width=200)
    report.show(results, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_tables_of_what_was_measured_and_what_was_not() -> None:
    def row(case: str, name: str, ms: float | None) -> Row:
        timing = Timing(ms, ms, ms, 9) if ms else None
        refused = None if ms else "not available: x"
        facts = {integrations.LINES: 1.0}
        return Row(case, name, 0, 40.0, Errors(1e-7, 2e-7, None), refused, timing, 8 << 20, facts)

    rows = [row("a", BEFORE, 60.0), row("a", AFTER, 6.0), row("b", BEFORE, None), row("b", AFTER, 6.0)]
    times, errors = integrations.tables(Results(rows, "copy"))
    cells = [list(column.cells) for column in times.columns]
    assert [column[0] for column in cells] == ["a", "1", "60", "6", "10", "8", "8", "1"]
    assert [column[1] for column in cells][:5] == ["b", "1", "not timed", "6", ""]
    assert [next(iter(column.cells)) for column in errors.columns] == [
        "a", "1.0e-07", "1.0e-07", "2.0e-07", "2.0e-07", "-", "-",
    ]  # fmt: skip
    assert not integrations.tables(Results([replace(row("a", AFTER, 1.0), contender="eager")], "copy"))


def test_every_host_has_both_dtypes_and_a_name_of_its_own() -> None:
    assert len({case.name for case in hosts.CASES}) == 2 * len(HOSTS)
    assert {case.dtype for case in hosts.CASES} == {FP32, BF16}
