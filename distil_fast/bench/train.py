"""Training steps side by side: checked against the original's losses and gradients, timed in turn, and taken apart.

It knows neither models nor losses. Next: train_cases.py for what is compared, train_steps.py for who, train_parts.py
for where the time goes, train_report.py for what is shown.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from distil_fast.bench import isolated, measure, suite, train_models, train_parts, train_steps
from distil_fast.bench.correctness import Errors
from distil_fast.bench.measure import Canary, Effort, Timing
from distil_fast.bench.results import Results, Row
from distil_fast.bench.syncs import host_syncs
from distil_fast.bench.train_cases import (
    COMPILED,
    EAGER,
    MASKED,
    MASKING,
    ORIGINAL,
    PADDING,
    SYNCS,
    TOKENS,
    TrainCase,
)
from distil_fast.bench.train_steps import Step
from distil_fast.training.batch import MaskedBatch
from distil_fast.training.masked_lm import MaskedLM

# dtype: relative error of the losses, the worst of them, and of the gradient of all parameters, against the original's
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (3e-2, 1e-1)}
REPEATS = 5  # of a step that is taken apart
TINY = 16  # tokens, of a micro-batch that makes a step allocate what it keeps


@dataclass(frozen=True)
class TrainContender:
    """A step as the clock takes it."""

    case: TrainCase
    name: str
    taken: Step
    batch: MaskedBatch
    calls: int = 1

    @property
    def device(self) -> str:
        return self.case.device

    def prepare(self) -> None:
        """Nothing is to be prepared: every step leaves the next one the same work."""

    def call(self) -> object:
        return self.taken.step([self.batch])


class Filled(NamedTuple):
    """What the contenders of a case share; each copies the student."""

    case: TrainCase
    student: MaskedLM
    teacher: MaskedLM
    batch: MaskedBatch

    def contender(self, name: str) -> TrainContender:
        step = train_steps.build(name, self.case, self.student, self.teacher)
        return TrainContender(self.case, name, step, self.batch)


def fill(case: TrainCase) -> Filled:
    """Models and micro-batch of a case."""
    return Filled(case, train_models.student(case), train_models.teacher(case), train_models.masked_batch(case))


def run(chosen: Sequence[TrainCase], effort: Effort, *, processes: int, command: str, note: suite.Note) -> Results:
    """Measures the cases; `note` is told what is going on."""

    def finish(found: Results) -> Results:
        return replace(found, rows=[_with_peak(row, chosen, note) for row in found.rows])

    return suite.conducted(timed, chosen, effort, finish, processes=processes, command=command, note=note)


def timed(chosen: Sequence[TrainCase], effort: Effort, note: suite.Note = lambda text: None) -> Results:
    """Everything that the clock tells, in this process."""
    evict = measure.CacheEvictor(chosen[0].device)
    copy = measure.Copy(evict)
    rows: list[Row] = []
    copied: list[float] = []
    for case in chosen:
        note(case.name)
        found, seconds = _timed_case(case, copy, effort, evict)
        rows += found
        copied += seconds
    return Results(rows, copy.method, canary=Canary.of(copied))


def _timed_case(
    case: TrainCase, copy: measure.Copy, effort: Effort, evict: measure.CacheEvictor
) -> tuple[list[Row], list[float]]:
    torch._dynamo.reset()
    if case.device == "cuda":
        torch.cuda.empty_cache()
    filled = fill(case)
    suffixes = {MASKED if name.endswith(MASKED) else "" for name in case.contenders}
    references = {suffix: _reference(filled, suffix) for suffix in suffixes}
    rows: list[Row] = []
    admitted: dict[int, TrainContender] = {}
    for name in case.contenders:
        row, contender = _checked(name, filled, references[MASKED if name.endswith(MASKED) else ""])
        if contender is not None:
            admitted[len(rows)] = contender
        rows.append(row)
    copied, *samples = measure.in_turn([copy, *admitted.values()], effort, evict)
    for (number, contender), seconds in zip(admitted.items(), samples, strict=True):
        taken_apart = train_parts.parts(contender.taken, filled.batch, REPEATS)
        taken_apart[MASKING] = train_parts.masking(case, filled.batch, REPEATS)
        rows[number] = replace(rows[number], timing=Timing.of(seconds), parts=taken_apart)
    rate = copy.gb_per_s(statistics.median(copied))
    return [replace(row, copy_gb_per_s=rate) for row in rows], copied


# ------------------------------------------------------------------------------------------------ agreement


class Outcome(NamedTuple):
    """The loss and its three terms, and the gradient of all the student's parameters."""

    losses: Tensor
    gradient: Tensor


def outcome(step: Step, batch: MaskedBatch) -> Outcome:
    """What a step computes before its optimiser."""
    losses = step.gradients([batch])
    gradient = torch.cat([p.grad.flatten() for p in step.student.parameters() if p.grad is not None])
    step.optimizer.zero_grad()
    return Outcome(losses, gradient)


def disagreement(found: Outcome, reference: Outcome) -> Errors:
    """The largest relative difference of a loss, and the relative difference of the gradients."""
    loss = float(((found.losses - reference.losses).abs() / reference.losses.abs()).max())
    gradient = float((found.gradient - reference.gradient).norm() / reference.gradient.norm())
    return Errors(loss, gradient, None)


def _reference(filled: Filled, suffix: str) -> Outcome:
    """The original's answer; a modern one's where the original needs more memory than there is."""
    try:
        return outcome(filled.contender(ORIGINAL + suffix).taken, filled.batch)
    except torch.OutOfMemoryError:
        return outcome(filled.contender(EAGER + suffix).taken, filled.batch)


def _checked(name: str, filled: Filled, reference: Outcome) -> tuple[Row, TrainContender | None]:
    """A contender's row before it is timed, and the contender, unless it fails or disagrees."""
    case, batch = filled.case, filled.batch
    tokens = batch.tokens.numel()
    row = Row(case.name, name, 0, facts={TOKENS: tokens, PADDING: 1 - tokens / batch.input_ids.numel()})
    try:
        contender = filled.contender(name)
        found = disagreement(outcome(contender.taken, batch), reference)
        if case.device == "cuda":
            contender.call()
            row = replace(row, peak_extra_bytes=suite.peak_on_gpu(contender))
        if case.device == "cuda" or not name.startswith(COMPILED):
            row.facts[SYNCS] = host_syncs(contender.call, case.device)
    except Exception as error:  # whatever stops someone else's code is a line of the table, not the end of the run
        return replace(row, refused=f"fails: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"), None
    refused = _verdict(found, case.dtype)
    return replace(row, errors=found, refused=refused), None if refused else contender


def _verdict(found: Errors, dtype: torch.dtype) -> str | None:
    """Why a contender that differs so much from the original is not timed; None if it is."""
    assert found.loss is not None
    for what, error, limit in zip(("losses", "gradient"), (found.loss, found.array), TOLERANCES[dtype], strict=True):
        if not error <= limit:
            return f"wrong: its {what} differ from the original's by {error:.1e}, expected at most {limit:.0e}"
    return None


# ------------------------------------------------------------------------------------------------ memory


def _with_peak(row: Row, chosen: Sequence[TrainCase], note: suite.Note) -> Row:
    """The row with its peak memory, from a fresh process."""
    case = next(case for case in chosen if case.name == row.case)
    if row.timing is None or case.device != "cpu" or not isolated.CLEAR_REFS.exists():
        return row
    note(f"peak memory of {row.contender}, {case.name}")
    return replace(row, peak_extra_bytes=isolated.fresh(peak_bytes, case, row.contender))


def peak_bytes(case: TrainCase, name: str) -> int:
    """The most memory during one step beyond weights and moments; gradients count. Call it through `isolated.fresh`."""
    isolated.give_back_what_is_freed()
    contender = fill(case).contender(name)
    if name.startswith(COMPILED):
        contender.call()  # compiles, which takes memory of its own
    else:
        tiny = train_models.masked_batch(replace(case, batch=1, length=TINY, shortest=TINY))
        contender.taken.step([tiny])
    return isolated.peak_of(contender.call)
