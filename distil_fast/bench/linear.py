"""The fused heads' problems: hidden states and weights of both models in, loss and the student's two gradients out.

Their yardstick is not a copy of memory but the matrix products alone, as torch.mm makes them. They know nothing of
time. Next: problem.py, whose interface this is; contenders.py.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import distil_fast
from distil_fast import reference
from distil_fast.bench.cases import Case
from distil_fast.bench.formulas import BETA, LOG_SPACE_SLACK, Kind, eager_divergence
from distil_fast.bench.problem import (
    CHECKED,
    DIFFERENCE,
    HARD_WEIGHT,
    ORACLE_ROWS,
    SOFT_WEIGHT,
    Exact,
    Function,
    Outcome,
    Problem,
    normal_numbers,
    spread_out,
    taking_part,
)

SPREAD = 3.0  # standard deviation of the logits


class LinearProblem(Problem):
    """soft_weight T^2 D + hard_weight cross-entropy of logits hidden weight^T; a weight of 0 leaves a term out. The
    array of an outcome is the gradient of the hidden states, and below it that of the first CHECKED rows of the
    weights. `near`: the models' heads are equal, and their hidden states nearly."""

    arrays = 0  # its floor is in products
    default_temperature: ClassVar[float] = 1.0
    divergence: ClassVar[Kind] = "forward_kl"
    t_squared: ClassVar[bool] = True
    soft_weight: ClassVar[float] = 0.0
    hard_weight: ClassVar[float] = 0.0

    def __init__(self, case: Case, *, near: bool = False) -> None:
        self.case = case
        self.temperature = self.default_temperature if case.temperature is None else case.temperature
        normal, generator = normal_numbers(case, seed=0)
        widths = case.width, case.teacher_width or case.width

        def model(width: int) -> tuple[Tensor, Tensor]:
            return normal(case.rows, width), normal(case.cols, width).mul_(SPREAD * width**-0.5)

        (hidden, weight), (teacher, teacher_weight) = (model(width) for width in widths)
        if near:
            shared = min(widths)
            hidden[:, shared:], teacher[:, shared:] = 0.0, 0.0
            hidden[:, :shared] = teacher[:, :shared] + DIFFERENCE / SPREAD * normal(case.rows, shared)
            teacher_weight[:, :shared] = weight[:, :shared]
        self.hidden, self.weight = hidden.to(case.dtype).requires_grad_(), weight.to(case.dtype).requires_grad_()
        labels = torch.randint(case.cols, (case.rows,), generator=generator, device=case.device)
        self.mask = taking_part(case)
        self.rows = None if self.mask is None else self.mask.nonzero().flatten()
        if self.mask is not None:
            labels[~self.mask] = -100
        self.inputs = self.hidden, self.weight, teacher.to(case.dtype), teacher_weight.to(case.dtype), labels

    def formula(self, hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        if self.rows is not None:
            hidden, teacher, labels = hidden[self.rows], teacher[self.rows], labels[self.rows]
        student_logits = F.linear(hidden, weight).float()
        loss = student_logits.new_zeros(())
        if self.soft_weight:
            with torch.no_grad():
                teacher_logits = F.linear(teacher, head).float()
            soft = eager_divergence(self.divergence, student_logits, teacher_logits, self.temperature)
            loss = loss + soft * (self.soft_weight * (self.temperature**2 if self.t_squared else 1.0))
        if self.hard_weight:
            loss = loss + F.cross_entropy(student_logits, labels) * self.hard_weight
        return loss

    @abstractmethod
    def definition(self, logits: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor, count: int) -> Tensor:
        """The share of some rows in the loss, of which `count` take part, by distil_fast.reference."""

    def run(self, function: Function) -> Outcome:
        loss = function(*self.inputs)
        hidden, weight = torch.autograd.grad(loss, (self.hidden, self.weight))
        return Outcome(loss, torch.cat([hidden, weight[:CHECKED]]))

    def products(self) -> Outcome:
        """The matrix products alone, of logits that are whole in memory."""
        hidden, weight, teacher, head, _ = (x.detach() for x in self.inputs)
        if self.rows is not None:
            hidden, teacher = hidden[self.rows], teacher[self.rows]
        student_logits = torch.mm(hidden, weight.t())
        if self.soft_weight:
            torch.mm(teacher, head.t())
        torch.mm(student_logits.t(), hidden)
        return Outcome(None, torch.mm(student_logits, weight))

    def exact(self) -> Exact:
        hidden, weight, teacher, head, labels = (x.detach() for x in self.inputs)
        wide, wide_head = weight.double(), head.double()
        rows, loss = self.case.rows, 0.0
        mask = torch.ones_like(labels, dtype=torch.bool) if self.mask is None else self.mask
        count = int(mask.sum())
        below = torch.zeros(CHECKED, self.case.width, dtype=torch.float64, device=hidden.device)
        gradients = []
        for part in torch.arange(rows, device=hidden.device).split(ORACLE_ROWS):
            states = hidden[part].double()
            logits = F.linear(states, wide).requires_grad_()
            share = self.definition(
                logits, F.linear(teacher[part].double(), wide_head), labels[part], mask[part], count
            )
            (gradient,) = torch.autograd.grad(share, logits)
            loss += float(share.detach())
            gradients.append(gradient @ wide)
            below += gradient[:, :CHECKED].t() @ states
        chosen = torch.cat([spread_out(rows), rows + torch.arange(CHECKED)])
        if self.rows is not None:  # as many of those that take part, beside a few that may not
            chosen = torch.cat([self.rows[spread_out(len(self.rows))].cpu(), chosen])
        return Exact(loss, chosen, torch.cat([*gradients, below])[chosen.to(hidden.device)], 0)


class LinearKLAndCrossEntropy(LinearProblem):
    """0.5 T^2 KL + 0.5 cross-entropy."""

    default_temperature = 2.0
    soft_weight, hard_weight = SOFT_WEIGHT, HARD_WEIGHT

    def ours(self, *inputs: Any) -> Tensor:
        return distil_fast.linear_distillation_loss(
            *inputs,
            temperature=self.temperature,
            soft_weight=SOFT_WEIGHT,
            hard_weight=HARD_WEIGHT,
            soft_mask=self.mask,
            precision=self.precision,
            backend=self.backend,
        ).loss

    def definition(self, logits: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor, count: int) -> Tensor:
        return reference.distillation_loss(
            logits,
            teacher,
            labels,
            temperature=self.temperature,
            soft_weight=SOFT_WEIGHT,
            hard_weight=HARD_WEIGHT,
            soft_mask=mask,
            soft_count=count,
            hard_count=count,
        ).loss


class LinearKL(LinearProblem):
    """T^2 KL(teacher || student) alone."""

    soft_weight = 1.0

    def nearby(self) -> Problem:
        return type(self)(self.case, near=True)

    def ours(self, *inputs: Any) -> Tensor:
        return distil_fast.linear_divergence_loss(
            *inputs[:4],
            divergence=self.divergence,
            temperature=self.temperature,
            mask=self.mask,
            t_squared=self.t_squared,
            precision=self.precision,
            backend=self.backend,
        )

    def definition(self, logits: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor, count: int) -> Tensor:
        return reference.divergence_loss(
            logits,
            teacher,
            divergence=self.divergence,
            temperature=self.temperature,
            mask=mask,
            count=count,
            t_squared=self.t_squared,
        )


class LinearJSD(LinearKL):
    """The generalised Jensen-Shannon divergence at beta 0.5, alone and without T^2, as TRL and Liger have it."""

    divergence = distil_fast.JSD(BETA)
    slack = LOG_SPACE_SLACK
    t_squared = False


class LinearCrossEntropy(LinearProblem):
    """Cross-entropy of the student; the teacher is not read."""

    hard_weight = 1.0

    def ours(self, *inputs: Any) -> Tensor:
        hidden, weight, _, _, labels = inputs
        return distil_fast.linear_cross_entropy(hidden, weight, labels, precision=self.precision, backend=self.backend)

    def definition(self, logits: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor, count: int) -> Tensor:
        return reference.cross_entropy(logits, labels, count=count)
