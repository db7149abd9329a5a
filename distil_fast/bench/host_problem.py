"""A host's loss as a problem of the benchmark: one batch for both, and what both must compute, in float64.

The last two rows are of a student that nearly agrees with its teacher. It knows no host. Next: hosts.py for the table,
problem.py, whose interface this is; integrations.py, which runs it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from distil_fast.bench.cases import Case
from distil_fast.bench.formulas import LOG_SPACE_SLACK
from distil_fast.bench.hosts import AFTER, BEFORE, HOSTS, SEQUENCES, UNLABELLED, Batch, Loss
from distil_fast.bench.problem import (
    CHECKED,
    DIFFERENCE,
    NEAR,
    ORACLE_ROWS,
    Exact,
    Function,
    Outcome,
    Problem,
    normal_numbers,
    spread_out,
)

SPREAD = 3.0  # standard deviation of the logits
EVERY = round(1 / UNLABELLED)


class HostProblem(Problem):
    """The loss of a host and its gradient in the student's logits; `formula` or `ours` is to be loaded first."""

    slack = LOG_SPACE_SLACK  # most hosts round both models' log-probabilities to bfloat16

    def __init__(self, case: Case) -> None:
        self.case = case
        self.host = next(host for host in HOSTS if host.name == case.problem)
        normal, generator = normal_numbers(case, seed=0)
        self.labels = torch.randint(case.cols, (case.rows,), generator=generator, device=case.device)
        self.labels[::EVERY] = -100
        self.student, self.teacher = self._models(normal)
        self.student = self.student.to(case.dtype).requires_grad_()
        self.teacher = self.teacher.to(case.dtype)
        nothing = self.student.new_empty(0)
        self.weights: tuple[Tensor, Tensor] = (nothing, nothing)
        self.inputs = (self.student,)
        self._functions: dict[str, Loss] = {}

    def _models(self, normal: Any) -> tuple[Tensor, Tensor]:
        teacher, student = (normal(self.case.rows, self.case.cols).mul_(SPREAD) for _ in range(2))
        student[-NEAR:] = teacher[-NEAR:] + DIFFERENCE * normal(NEAR, self.case.cols)
        return self._in_sequences(student), self._in_sequences(teacher)

    def _in_sequences(self, rows: Tensor) -> Tensor:
        return rows.view(SEQUENCES, -1, *rows.shape[1:])

    @property
    def batch(self) -> Batch:
        return Batch(self.student, self.teacher, self._in_sequences(self.labels), *self.weights)

    def load(self, name: str) -> None:
        """Imports what BEFORE or AFTER needs.

        Raises:
            ImportError: it is not installed.
        """
        self._functions[name] = self.host.loss(name)

    def formula(self, *inputs: Any) -> Tensor:
        return self._functions[BEFORE](self.batch)

    def ours(self, *inputs: Any) -> Tensor:
        return self._functions[AFTER](self.batch)

    def run(self, function: Function) -> Outcome:
        loss = function()
        return Outcome(loss, torch.autograd.grad(loss, self.student)[0])

    def exact(self) -> Exact:
        student, teacher = (x.detach().flatten(0, 1) for x in (self.student, self.teacher))
        share = self._shares()
        loss = sum(float(share(student[part].double(), teacher[part], part)) for part in self._parts())
        chosen = torch.cat([spread_out(len(student) - NEAR), torch.arange(len(student) - NEAR, len(student))])
        rows = student[chosen].double().requires_grad_()
        gradient = torch.zeros_like(rows)
        for number, row in enumerate(chosen):  # one by one: those that take no part have no gradient
            one = row.view(1)
            (found,) = torch.autograd.grad(share(rows[number : number + 1], teacher[one], one), rows)
            gradient += found
        return Exact(loss, chosen, gradient, NEAR)

    def _parts(self) -> tuple[Tensor, ...]:
        return torch.arange(self.case.rows, device=self.labels.device).split(ORACLE_ROWS)

    def _shares(self) -> Any:
        """The share of some rows in the loss: of the student's and teacher's logits there, and the rows' numbers."""
        takes_part = self.labels != -100 if self.host.labelled else torch.ones_like(self.labels, dtype=torch.bool)
        count = float(takes_part.sum())

        def share(student: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
            chosen = takes_part[rows]
            return self.host.means(student[chosen], teacher.double()[chosen], self.labels[rows][chosen], count)

        return share


class HiddenHostProblem(HostProblem):
    """The same from hidden states; the array of an outcome is their gradient, and below it that of the first CHECKED
    rows of the student's head."""

    arrays = 0  # no logits need ever be in memory

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        normal, _ = normal_numbers(case, seed=1)
        student, teacher = (normal(case.cols, case.width).mul_(SPREAD * case.width**-0.5) for _ in range(2))
        self.weights = student.to(case.dtype).requires_grad_(), teacher.to(case.dtype)

    def _models(self, normal: Any) -> tuple[Tensor, Tensor]:
        student, teacher = (normal(self.case.rows, self.case.width) for _ in range(2))
        return self._in_sequences(student), self._in_sequences(teacher)

    def run(self, function: Function) -> Outcome:
        loss = function()
        hidden, weight = torch.autograd.grad(loss, (self.student, self.weights[0]))
        return Outcome(loss, torch.cat([hidden.flatten(0, 1), weight[:CHECKED]]))

    def exact(self) -> Exact:
        student, teacher = (x.detach().flatten(0, 1).double() for x in (self.student, self.teacher))
        weight, head = (w.detach().double() for w in self.weights)
        share, loss, gradients = self._shares(), 0.0, []
        below = torch.zeros(CHECKED, self.case.width, dtype=torch.float64, device=student.device)
        for part in self._parts():
            logits = F.linear(student[part], weight).requires_grad_()
            value = share(logits, F.linear(teacher[part], head), part)
            (gradient,) = torch.autograd.grad(value, logits)
            loss += float(value.detach())
            gradients.append(gradient @ weight)
            below += gradient[:, :CHECKED].t() @ student[part]
        chosen = torch.cat([spread_out(self.case.rows), self.case.rows + torch.arange(CHECKED)])
        return Exact(loss, chosen, torch.cat([*gradients, below])[chosen.to(student.device)], 0)
