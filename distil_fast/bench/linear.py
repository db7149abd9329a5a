"""The fused heads' problem: hidden states and weights of both models in, loss and the student's two gradients out.

Its yardstick is not a copy of memory but the four matrix products alone, as torch.mm makes them. It knows nothing of
time. Next: problem.py, whose interface this is; contenders.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import distil_fast
from distil_fast import reference
from distil_fast.bench.cases import Case
from distil_fast.bench.problem import (
    CHECKED,
    HARD_WEIGHT,
    ORACLE_ROWS,
    SOFT_WEIGHT,
    Exact,
    Function,
    Outcome,
    Problem,
    normal_numbers,
    spread_out,
)


class LinearKLAndCrossEntropy(Problem):
    """0.5 T^2 KL + 0.5 cross-entropy of logits hidden weight^T, every row labelled. The array of an outcome is the
    gradient of the hidden states, and below it that of the first CHECKED rows of the weights."""

    arrays = 0  # its floor is in products

    def __init__(self, case: Case) -> None:
        self.case = case
        self.temperature = 2.0 if case.temperature is None else case.temperature
        self.precision = "exact"  # of distil_fast, for the next call of `ours`
        normal, generator = normal_numbers(case, seed=0)
        widths = case.width, case.teacher_width or case.width

        def model(width: int) -> tuple[Tensor, Tensor]:
            hidden, weight = normal(case.rows, width), normal(case.cols, width).mul_(3.0 * width**-0.5)
            return hidden.to(case.dtype), weight.to(case.dtype)

        (self.hidden, self.weight), (teacher, teacher_weight) = (model(width) for width in widths)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()
        labels = torch.randint(case.cols, (case.rows,), generator=generator, device=case.device)
        self.inputs = self.hidden, self.weight, teacher, teacher_weight, labels

    def formula(self, hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        t = self.temperature
        student_logits = F.linear(hidden, weight).float()
        with torch.no_grad():
            teacher_logits = F.linear(teacher, head).float()
        soft = F.kl_div(F.log_softmax(student_logits / t, -1), F.softmax(teacher_logits / t, -1), reduction="batchmean")
        return soft * (t**2 * SOFT_WEIGHT) + F.cross_entropy(student_logits, labels) * HARD_WEIGHT

    def ours(self, *inputs: Any) -> Tensor:
        return distil_fast.linear_distillation_loss(
            *inputs,
            temperature=self.temperature,
            soft_weight=SOFT_WEIGHT,
            hard_weight=HARD_WEIGHT,
            precision=self.precision,
            backend=self.backend,
        ).loss

    def run(self, function: Function) -> Outcome:
        loss = function(*self.inputs)
        hidden, weight = torch.autograd.grad(loss, (self.hidden, self.weight))
        return Outcome(loss, torch.cat([hidden, weight[:CHECKED]]))

    def products(self) -> Outcome:
        """The four matrix products alone, of logits that are whole in memory."""
        hidden, weight, teacher, head, _ = (x.detach() for x in self.inputs)
        student_logits = torch.mm(hidden, weight.t())
        teacher_logits = torch.mm(teacher, head.t())
        del teacher_logits
        torch.mm(student_logits.t(), hidden)
        return Outcome(None, torch.mm(student_logits, weight))

    def exact(self) -> Exact:
        hidden, weight, teacher, head, labels = (x.detach() for x in self.inputs)
        wide, wide_head = weight.double(), head.double()
        rows, loss = self.case.rows, 0.0
        below = torch.zeros(CHECKED, self.case.width, dtype=torch.float64, device=hidden.device)
        gradients = []
        for part in torch.arange(rows, device=hidden.device).split(ORACLE_ROWS):
            states = hidden[part].double()
            logits = F.linear(states, wide).requires_grad_()
            share = reference.distillation_loss(
                logits,
                F.linear(teacher[part].double(), wide_head),
                labels[part],
                temperature=self.temperature,
                soft_weight=SOFT_WEIGHT,
                hard_weight=HARD_WEIGHT,
                soft_count=rows,
                hard_count=rows,
            ).loss
            (gradient,) = torch.autograd.grad(share, logits)
            loss += float(share.detach())
            gradients.append(gradient @ wide)
            below += gradient[:, :CHECKED].t() @ states
        chosen = torch.cat([spread_out(rows), rows + torch.arange(CHECKED)])
        return Exact(loss, chosen, torch.cat([*gradients, below])[chosen.to(hidden.device)], 0)
