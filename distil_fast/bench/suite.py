"""One run of a suite: every case's contenders checked, then timed in turn, in one process or in several fresh ones.

It knows neither formulae nor tables. Next: measure.py for the clock, report.py for what is shown.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

import torch

from distil_fast import _C
from distil_fast.bench import cases, contenders, correctness, isolated, machine, measure, problems, results
from distil_fast.bench.cases import Case
from distil_fast.bench.contenders import Contender, Graphed, Products
from distil_fast.bench.linear import LinearProblem
from distil_fast.bench.measure import Canary, Effort, Sampled, Timing
from distil_fast.bench.peers import UnavailableError
from distil_fast.bench.problem import Exact, Problem
from distil_fast.bench.results import Memory, Results, Row

FIRST_CALLS, FIRST_CALL = 5, "ours, first call"
NO_PEAK = (*cases.INSTRUCTION_SETS, cases.PRODUCTS)  # peaks are those of "ours", or of no answer
Note = Callable[[str], None]


def run(
    chosen: Sequence[Case],
    memory: Sequence[Case],
    effort: Effort,
    *,
    processes: int,
    command: str,
    note: Note,
    without_peak: Sequence[str] = NO_PEAK,
) -> Results:
    """Measures the cases and the peak memory of `memory`; `note` is told what is going on."""

    def finish(found: Results) -> Results:
        rows = _with_isolated(found, chosen, note, without_peak)
        return replace(found, rows=rows, memory=_beyond_gradient(memory, note))

    return conducted(_timed, chosen, effort, finish, processes=processes, command=command, note=note)


def conducted(
    timed: Callable[..., Results],
    chosen: Sequence[Any],
    effort: Effort,
    finish: Callable[[Results], Results],
    *,
    processes: int,
    command: str,
    note: Note,
) -> Results:
    """What `timed(chosen, effort)` finds, a module's function, in this process or in several fresh ones; finished."""
    described, start, now = machine.describe(), time.monotonic(), datetime.now(timezone.utc)
    if processes == 1:
        found = timed(chosen, effort, note)
    else:
        runs = []
        for number in range(processes):
            note(f"process {number + 1} of {processes}")
            runs.append(isolated.fresh(timed, chosen, effort))
        found = results.merged(runs)
    return replace(
        finish(found),
        command=command,
        date=now.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - start, 1),
        machine=described,
    )


def _timed(chosen: Sequence[Case], effort: Effort, note: Note = lambda text: None) -> Results:
    """Everything that the clock tells, in this process."""
    evict = measure.CacheEvictor(chosen[0].device)
    copy = measure.Copy(evict)
    rows: list[Row] = []
    copied: list[float] = []
    try:
        for group in cases.groups(chosen):
            note(f"{group[0].name}" + (f" and {len(group) - 1} more" if len(group) > 1 else ""))
            found, seconds = _timed_group(group, copy, effort, evict)
            rows += found
            copied += seconds
    finally:
        _C.use_instruction_set(contenders.BEST_INSTRUCTION_SET)
    return Results(rows, copy.method, canary=Canary.of(copied))


def _timed_group(
    group: Sequence[Case], copy: measure.Copy, effort: Effort, evict: measure.CacheEvictor
) -> tuple[list[Row], list[float]]:
    """The rows of cases that are timed in turn, and the times of the copy beside them."""
    torch._dynamo.reset()  # other groups' compiled code
    if group[0].device == "cuda":
        torch.cuda.empty_cache()
    rows: list[Row] = []
    admitted: list[Contender | Graphed | Products] = []
    numbers: list[int] = []
    for case in group:
        prepared = Prepared.of(case)
        for name in case.contenders:
            row, contender = checked(name, case, prepared)
            if contender is not None:
                admitted.append(contender)
                numbers.append(len(rows))
            rows.append(row)
    copied, *samples = measure.in_turn([copy, *admitted], effort, evict)
    for number, seconds in zip(numbers, samples, strict=True):
        rows[number] = replace(rows[number], timing=Timing.of(seconds))
    rate = copy.gb_per_s(statistics.median(copied))
    return [replace(row, copy_gb_per_s=rate) for row in rows], copied


@dataclass(frozen=True)
class Prepared:
    """A case's problem and its answer, and both where the models nearly agree, if the problem has such a sibling."""

    problem: Problem
    exact: Exact
    near: tuple[Problem, Exact] | None

    @staticmethod
    def of(case: Case) -> Prepared:
        problem = problems.make(case)
        near = problem.nearby()
        return Prepared(problem, problem.exact(), (near, near.exact()) if near else None)


def checked(name: str, case: Case, prepared: Prepared) -> tuple[Row, Contender | Graphed | Products | None]:
    """A contender's row before it is timed, and the contender, unless it is absent, fails, or is wrong."""
    problem = prepared.problem
    floor_bytes = problem.floor_bytes if case.calls == 1 else 0
    row = Row(case.name, name, floor_bytes)
    if isinstance(problem, LinearProblem) and name == cases.PRODUCTS:
        return row, Products(case, problem)
    try:
        contender = contenders.build(name, case, problem)
        contender.prepare()
        found = correctness.errors(contender.call(), prepared.exact)
        if prepared.near and isinstance(contender, Contender):
            sibling, answer = prepared.near
            sibling.prepare(contender.function)
            found = correctness.beside_near(found, correctness.errors(sibling.run(contender.function), answer))
        if case.device == "cuda" and not case.graph:
            row = replace(row, peak_extra_bytes=peak_on_gpu(contender))
    except UnavailableError as error:
        return replace(row, refused=str(error)), None
    except Exception as error:  # whatever stops someone else's code is a line of the table, not the end of the run
        return replace(row, refused=f"fails: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"), None
    refused = correctness.verdict(found, case.dtype, problem.slack)
    return replace(row, errors=found, refused=refused), None if refused else contender


def peak_on_gpu(contender: Sampled) -> int:
    """The most memory that tensors held during one call, beyond what they held before."""
    contender.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _with_isolated(found: Results, chosen: Sequence[Case], note: Note, without_peak: Sequence[str]) -> list[Row]:
    """The rows with their peak memory, and rows of first calls, each from fresh processes."""
    rows: list[Row] = []
    for case in chosen:
        own = [row for row in found.rows if row.case == case.name]
        if case.calls == 1 and case.device == "cpu":
            note(f"peak memory of {case.name}")
            names = [row.contender for row in own if row.timing and row.contender not in without_peak]
            names.sort(key=lambda name: name != "ours")
            peaks = isolated.fresh(isolated.peak_extra_bytes, case, tuple(names))
            own = [replace(row, peak_extra_bytes=peaks.get(row.contender)) for row in own]
        rows += own
        ours = next((row for row in own if row.contender == "ours" and row.timing), None)
        if case.first_calls and ours:
            note(f"first calls of {case.name}")
            seconds = isolated.fresh(isolated.first_calls, case, FIRST_CALLS)
            rows.append(replace(ours, contender=FIRST_CALL, timing=Timing.of(seconds)))
    return rows


def _beyond_gradient(chosen: Sequence[Case], note: Note) -> list[Memory]:
    """What calls in place take, at several shapes."""
    found = []
    for case in chosen:
        note(f"peak memory of {case.name}")
        peaks = isolated.fresh(isolated.peak_extra_bytes, case, case.contenders)
        found += [Memory(case.name, peak) for peak in peaks.values()]
    return found
