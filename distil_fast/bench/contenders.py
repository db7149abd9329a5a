"""Who computes a case: eager torch, compiled torch, and distil_fast by instruction set.

"eager" is torch as its users write it, "compiled" is torch.compile of that with static shapes; on a CPU the mode
max-autotune-no-cudagraphs generates the same code for these formulas (it tunes matrix products), so the default stands
for both. It knows nothing of time or truth. Next: measure.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distil_fast import _C
from distil_fast.bench.cases import Case
from distil_fast.bench.problems import Function, Outcome, Problem

BEST_INSTRUCTION_SET = _C.instruction_set()
ABSENT = "not available"  # how the reason begins where the machine lacks something
MORE_THAN_CASES = 64  # compilations of one formula, for as many dtypes and layouts as a group has


class UnavailableError(Exception):
    """This contender does not run on this machine; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One row of the table: a problem, and a function that solves it."""

    case: Case
    name: str
    problem: Problem
    function: Function
    instruction_set: str = BEST_INSTRUCTION_SET

    @property
    def calls(self) -> int:
        return self.case.calls

    def prepare(self) -> None:
        """What must be done before a call, outside the clock."""
        _C.use_instruction_set(self.instruction_set)
        self.problem.prepare(self.function)

    def call(self) -> Outcome:
        """One call, inside the clock."""
        return self.problem.run(self.function)


def _in_float32(formula: Function) -> Function:
    """What users write where the formula overflows in fp16, as it does under a loss scale: logits.float()."""

    def upcast(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return formula(student.float(), teacher.float(), labels)

    return upcast


def _compiled(function: Function) -> Function:
    torch._dynamo.config.recompile_limit = MORE_THAN_CASES
    return torch.compile(function, fullgraph=True, dynamic=False)


FUNCTIONS: dict[str, Callable[[Problem], Function]] = {
    "eager": lambda problem: problem.formula,
    "eager float32": lambda problem: _in_float32(problem.formula),
    "compiled": lambda problem: _compiled(problem.formula),
    "compiled float32": lambda problem: _compiled(_in_float32(problem.formula)),
    "ours": lambda problem: problem.ours,
    "ours compiled": lambda problem: _compiled(problem.ours),
}


def family(name: str) -> str:
    """ "eager", "compiled" or "ours"."""
    return name.partition(" ")[0]


def build(name: str, case: Case, problem: Problem) -> Contender:
    """The contender of this name. "ours ISA" is distil_fast held to that instruction set.

    Raises:
        UnavailableError: the machine lacks what it needs.
        KeyError: there is no such contender.
    """
    if name in FUNCTIONS:
        return Contender(case, name, problem, FUNCTIONS[name](problem))
    if family(name) != "ours":
        raise KeyError(name)
    instruction_set = name.removeprefix("ours ")
    if not _C.use_instruction_set(instruction_set):
        raise UnavailableError(f"{ABSENT}: the processor has no {instruction_set}")
    return Contender(case, name, problem, problem.ours, instruction_set)
