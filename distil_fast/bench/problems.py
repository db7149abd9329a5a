"""What the cases compute: for each operation its inputs, torch's formula, ours, and the answer in float64.

It knows nothing of time, nor of who calls it how. Inputs are random and the same in every run. The last two rows are
those of a student that nearly agrees with its teacher, where formulas that round on the way lose their gradient.
Next: correctness.py, which compares with the answer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import distil_fast
from distil_fast import reference
from distil_fast.bench.cases import Case
from distil_fast.bench.host_problem import HiddenHostProblem, HostProblem
from distil_fast.bench.hosts import HOSTS
from distil_fast.bench.linear import LinearKLAndCrossEntropy
from distil_fast.bench.problem import (
    DIFFERENCE,
    HARD_WEIGHT,
    NEAR,
    ORACLE_ROWS,
    SOFT_WEIGHT,
    Exact,
    Function,
    Outcome,
    Problem,
    normal_numbers,
    spread_out,
)


class LossProblem(Problem):
    """A loss of rows of a student (and a teacher), and its gradient in the student."""

    spread: ClassVar[float]  # standard deviation of the inputs

    def __init__(self, case: Case) -> None:
        self.case = case
        self.temperature = 1.0 if case.temperature is None else case.temperature
        normal, generator = normal_numbers(case, seed=0)
        teacher, student = (normal(case.rows, case.cols).mul_(self.spread) for _ in range(2))
        student[-NEAR:] = teacher[-NEAR:] + DIFFERENCE * normal(NEAR, case.cols)
        self.student = _laid_out(student, case).requires_grad_()
        self.teacher = _laid_out(teacher, case)
        overwritten = case.inplace or "liger" in case.contenders  # Liger's cross-entropy always works in place
        self.pristine = self.student.detach().clone() if overwritten else self.student.detach()
        self.labels = torch.randint(case.cols, (case.rows,), generator=generator, device=case.device)
        self.labels[-NEAR:] = -100  # so that their gradient is that of the divergence alone
        self.grad_output = torch.tensor(case.grad_output, device=case.device)
        self.inputs = (self.student, self.teacher, self.labels.view(self.student.shape[:-1]))

    @abstractmethod
    def definition(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """The share of some rows in the loss, by distil_fast.reference."""

    def prepare(self, function: Function) -> None:
        if self.pristine.data_ptr() != self.student.data_ptr():
            with torch.no_grad():
                self.student.copy_(self.pristine)

    def run(self, function: Function) -> Outcome:
        loss = function(*self.inputs)
        scaled = loss if self.case.grad_output == 1.0 else loss * self.grad_output
        (gradient,) = torch.autograd.grad(scaled, self.student)
        return Outcome(loss, gradient)

    def exact(self) -> Exact:
        data = (_rows(self.pristine), _rows(self.teacher), self.labels)
        loss = sum(
            float(self.definition(student.double(), teacher.double(), labels))
            for student, teacher, labels in zip(*(t.split(ORACLE_ROWS) for t in data), strict=True)
        )
        near = torch.arange(self.case.rows - NEAR, self.case.rows)
        chosen = torch.cat([spread_out(self.case.rows - NEAR), near])
        student, teacher, labels = (t[chosen] for t in data)
        student = student.double().requires_grad_()
        share = self.definition(student, teacher.double(), labels) * self.case.grad_output
        return Exact(loss, chosen, torch.autograd.grad(share, student)[0], NEAR)


class KLAndCrossEntropy(LossProblem):
    """0.5 T^2 KL(teacher || student) at temperature T + 0.5 cross-entropy; every row but the last two has a label."""

    spread = 3.0

    def formula(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        s, t, temperature = student.flatten(0, -2), teacher.flatten(0, -2), self.temperature
        soft = F.kl_div(F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1), reduction="batchmean")
        return soft * (temperature**2 * SOFT_WEIGHT) + F.cross_entropy(s, labels.flatten()) * HARD_WEIGHT

    def ours(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return distil_fast.distillation_loss(
            student,
            teacher,
            labels,
            temperature=self.temperature,
            soft_weight=SOFT_WEIGHT,
            hard_weight=HARD_WEIGHT,
            inplace=self.case.inplace,
            backend=self.backend,
        ).loss

    def definition(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        rows = self.case.rows
        return reference.distillation_loss(
            student,
            teacher,
            labels,
            temperature=self.temperature,
            soft_weight=SOFT_WEIGHT,
            hard_weight=HARD_WEIGHT,
            soft_count=rows,
            hard_count=rows - NEAR,
        ).loss


class KLAndCrossEntropyValue(KLAndCrossEntropy):
    """The same, without a gradient."""

    arrays = 2

    def run(self, function: Function) -> Outcome:
        with torch.no_grad():
            return Outcome(loss := function(*self.inputs), loss.view(1, 1))

    def exact(self) -> Exact:
        loss = super().exact().loss
        return Exact(loss, torch.zeros(1, dtype=torch.long), self.labels.new_tensor([[loss]], dtype=torch.float64), 0)


class KL(LossProblem):
    """T^2 KL(teacher || student) at temperature T alone."""

    spread = 3.0

    def formula(self, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
        t = self.temperature
        return F.kl_div(F.log_softmax(student / t, -1), F.softmax(teacher / t, -1), reduction="batchmean") * t**2

    def ours(self, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
        t = self.temperature
        return distil_fast.divergence_loss(student, teacher, temperature=t, t_squared=True, backend=self.backend)

    def definition(self, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
        t = self.temperature
        return reference.divergence_loss(student, teacher, temperature=t, t_squared=True, count=self.case.rows)


class CrossEntropy(LossProblem):
    """Cross-entropy of the student; the teacher is not read."""

    arrays = 2
    spread = 3.0

    def formula(self, student: Tensor, _: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(student, labels)

    def ours(self, student: Tensor, _: Tensor, labels: Tensor) -> Tensor:
        return distil_fast.cross_entropy(student, labels, backend=self.backend)

    def definition(self, student: Tensor, _: Tensor, labels: Tensor) -> Tensor:
        return reference.cross_entropy(student, labels, count=self.case.rows - NEAR)


class Cosine(LossProblem):
    """1 - cos of hidden states, averaged."""

    spread = 1.0

    def formula(self, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
        return F.cosine_embedding_loss(student, teacher, student.new_ones(len(student)))

    def ours(self, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
        return distil_fast.cosine_loss(student, teacher, backend=self.backend)

    def definition(self, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
        return reference.cosine_loss(student, teacher, count=self.case.rows)


class Softmax(Problem):
    """softmax of rows at T = 1, without a gradient."""

    arrays = 2

    def __init__(self, case: Case) -> None:
        self.logits = normal_numbers(case, seed=0)[0](case.rows, case.cols).mul_(3.0).to(case.dtype)
        self.inputs = (self.logits,)

    def formula(self, logits: Tensor) -> Tensor:
        return F.softmax(logits, -1)

    def ours(self, logits: Tensor) -> Tensor:
        return distil_fast.softmax(logits, backend=self.backend)

    def run(self, function: Function) -> Outcome:
        return Outcome(None, function(self.logits))

    def exact(self) -> Exact:
        chosen = spread_out(len(self.logits))
        return Exact(None, chosen, reference.softmax(self.logits[chosen].double()), 0)


class SoftmaxBackward(Softmax):
    """The backward of softmax, from its output and the output's gradient."""

    arrays = 3

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.logits.requires_grad_()
        self.upstream = normal_numbers(case, seed=1)[0](*self.logits.shape).to(case.dtype)

    def prepare(self, function: Function) -> None:
        self.out = function(self.logits)

    def run(self, function: Function) -> Outcome:
        return Outcome(None, torch.autograd.grad(self.out, self.logits, self.upstream)[0])

    def exact(self) -> Exact:
        chosen = spread_out(len(self.logits))
        logits = self.logits.detach()[chosen].double().requires_grad_()
        (gradient,) = torch.autograd.grad(reference.softmax(logits), logits, self.upstream[chosen].double())
        return Exact(None, chosen, gradient, 0)


PROBLEMS: dict[str, Callable[[Case], Problem]] = {
    "KL+CE": KLAndCrossEntropy,
    "KL+CE value": KLAndCrossEntropyValue,
    "KL": KL,
    "CE": CrossEntropy,
    "cosine": Cosine,
    "linear KL+CE": LinearKLAndCrossEntropy,
    "softmax": Softmax,
    "softmax backward": SoftmaxBackward,
    **{host.name: HiddenHostProblem if host.hidden else HostProblem for host in HOSTS},
}


def make(case: Case) -> Problem:
    """The problem of a case, its inputs filled."""
    return PROBLEMS[case.problem](case)


def _laid_out(values: Tensor, case: Case) -> Tensor:
    """Values [rows, cols] in the case's dtype and layout."""
    if not case.shifted:
        return values.to(case.dtype)
    logits = torch.zeros(4, case.rows // 4 + 1, case.cols, dtype=case.dtype, device=case.device)
    logits[:, :-1] = values.view(4, -1, case.cols)
    return logits[:, :-1]


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])
