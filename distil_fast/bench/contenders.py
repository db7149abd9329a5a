"""Who computes a case: eager torch, compiled torch, other libraries, and distil_fast by instruction set or backend.

"eager" is torch as its users write it, "compiled" is torch.compile of that with static shapes; on a CPU the mode
max-autotune-no-cudagraphs generates the same code for these formulas (it tunes matrix products), so the default stands
for both. It knows nothing of time or truth. Next: peers.py for the other libraries; measure.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from distil_fast import _C, backends
from distil_fast.bench.cases import PRODUCTS, Case
from distil_fast.bench.host_problem import HostProblem
from distil_fast.bench.linear import LinearProblem
from distil_fast.bench.peers import ABSENT, PEERS, UnavailableError
from distil_fast.bench.problem import Function, Outcome, Problem

BEST_INSTRUCTION_SET = _C.instruction_set()
WARM_UP_CALLS = 3  # before a graph is captured, as torch's notes on graphs advise
MORE_THAN_CASES = 64  # compilations of one formula, for as many dtypes and layouts as a group has

Compiled = TypeVar("Compiled", bound="Callable[..., Any]")


@dataclass(frozen=True)
class Contender:
    """One row of the table: a problem, and a function that solves it."""

    case: Case
    name: str
    problem: Problem
    function: Function
    instruction_set: str = BEST_INSTRUCTION_SET
    backend: str | None = None
    precision: str = "exact"

    @property
    def calls(self) -> int:
        return self.case.calls

    @property
    def device(self) -> str:
        return self.case.device

    def prepare(self) -> None:
        """What must be done before a call, outside the clock."""
        _C.use_instruction_set(self.instruction_set)
        self.problem.backend = self.backend
        self.problem.precision = self.precision
        self.problem.prepare(self.function)

    def call(self) -> Outcome:
        """One call, inside the clock."""
        return self.problem.run(self.function)


@dataclass(frozen=True)
class Products:
    """The matrix products of a linear problem alone: no answer, but what every answer costs at least."""

    case: Case
    problem: LinearProblem
    name: str = PRODUCTS
    calls: int = 1

    @property
    def device(self) -> str:
        return self.case.device

    def prepare(self) -> None:
        """Nothing is to be prepared."""

    def call(self) -> Outcome:
        return self.problem.products()


class Graphed:
    """A contender whose call is captured in a CUDA graph, and replayed inside the clock."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.calls, self.device = contender.calls, contender.device
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                contender.prepare()
                contender.call()
        torch.cuda.current_stream().wait_stream(stream)
        contender.prepare()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outcome = contender.call()

    def prepare(self) -> None:
        self.contender.prepare()

    def call(self) -> Outcome:
        self.graph.replay()
        return self.outcome


def _in_float32(formula: Function) -> Function:
    """What users write where the formula overflows in fp16, as it does under a loss scale: logits.float()."""

    def upcast(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return formula(student.float(), teacher.float(), labels)

    return upcast


def compiled(function: Compiled) -> Compiled:
    """torch.compile with static shapes, for as many of them as a group has."""
    torch._dynamo.config.recompile_limit = MORE_THAN_CASES
    return cast(Compiled, torch.compile(function, fullgraph=True, dynamic=False))


FUNCTIONS: dict[str, Callable[[Problem], Function]] = {
    "eager": lambda problem: problem.formula,
    "eager float32": lambda problem: _in_float32(problem.formula),
    "compiled": lambda problem: compiled(problem.formula),
    "compiled float32": lambda problem: compiled(_in_float32(problem.formula)),
    "ours": lambda problem: problem.ours,
    "ours compiled": lambda problem: compiled(problem.ours),
}


def family(name: str) -> str:
    """The first word of a contender's name: "eager", "compiled", a library, or "ours"."""
    return name.partition(" ")[0]


def build(name: str, case: Case, problem: Problem) -> Contender | Graphed:
    """The contender of this name. "ours ISA" and "ours BACKEND" are distil_fast held to that.

    Raises:
        UnavailableError: the machine lacks what it needs.
        KeyError: there is no such contender.
    """
    contender = _build(name, case, problem)
    return Graphed(contender) if case.graph else contender


def _build(name: str, case: Case, problem: Problem) -> Contender:
    if isinstance(problem, HostProblem):
        return _of_host(name, case, problem)
    if name in FUNCTIONS:
        return Contender(case, name, problem, FUNCTIONS[name](problem))
    if name in PEERS:
        return Contender(case, name, problem, PEERS[name](problem, case.device))
    if family(name) != "ours":
        raise KeyError(name)
    held_to = name.removeprefix("ours ")
    if held_to == "fast":
        return Contender(case, name, problem, problem.ours, precision=held_to)
    if held_to in backends.KERNELS:
        try:
            backends.serving(case.device, case.dtype, held_to)
        except ValueError as error:
            raise UnavailableError(f"{ABSENT}: {error}") from None
        return Contender(case, name, problem, problem.ours, backend=held_to)
    if not _C.use_instruction_set(held_to):
        raise UnavailableError(f"{ABSENT}: the processor has no {held_to}")
    return Contender(case, name, problem, problem.ours, held_to)


def _of_host(name: str, case: Case, problem: HostProblem) -> Contender:
    """A host's own loss, or ours in its place."""
    try:
        problem.load(name)
    except ImportError as error:
        raise UnavailableError(f"{ABSENT}: {error}") from None
    return Contender(case, name, problem, problem.ours if name == "ours" else problem.formula)
