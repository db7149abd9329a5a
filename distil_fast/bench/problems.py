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
from distil_fast.bench.formulas import BETA, LOG_SPACE_SLACK, Kind, eager_divergence, eager_top_k
from distil_fast.bench.host_problem import HiddenHostProblem, HostProblem
from distil_fast.bench.hosts import HOSTS
from distil_fast.bench.linear import LinearCrossEntropy, LinearJSD, LinearKL, LinearKLAndCrossEntropy
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
    taking_part,
)


class LossProblem(Problem):
    """A loss of rows of a student (and a teacher), and its gradient in the student.

    Where a loss has a hard term, the last two rows have no label, so that their gradient is that of the divergence.
    `near`: student and teacher nearly agree in every row.
    """

    spread: ClassVar[float] = 3.0  # standard deviation of the inputs
    unlabelled: ClassVar[int] = NEAR  # rows at the end

    def __init__(self, case: Case, *, near: bool = False) -> None:
        self.case = case
        self.temperature = 1.0 if case.temperature is None else case.temperature
        normal, generator = normal_numbers(case, seed=0)
        teacher, student = (normal(case.rows, case.cols).mul_(self.spread) for _ in range(2))
        close = case.rows if near else NEAR
        student[-close:] = teacher[-close:] + DIFFERENCE * normal(close, case.cols)
        self.student = _laid_out(student, case).requires_grad_()
        self.teacher = _laid_out(teacher, case)
        # Liger's cross-entropy always works in place
        overwritten = case.inplace or ("liger" in case.contenders and case.device == "cuda")
        self.pristine = self.student.detach().clone() if overwritten else self.student.detach()
        self.labels = torch.randint(case.cols, (case.rows,), generator=generator, device=case.device)
        self.labels[case.rows - self.unlabelled :] = -100
        self.mask = taking_part(case, always=NEAR)
        self.rows = None if self.mask is None else self.mask.nonzero().flatten()
        if self.mask is not None:
            self.labels[~self.mask] = -100
        self.grad_output = torch.tensor(case.grad_output, device=case.device)
        self.inputs = (self.student, self.teacher, self.labels.view(self.student.shape[:-1]))

    @abstractmethod
    def definition(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """The share of some rows in the loss, by distil_fast.reference; `mask`: those that take part."""

    @property
    def count(self) -> int:
        """How many rows take part."""
        return self.case.rows if self.rows is None else len(self.rows)

    def chosen(self, values: Tensor) -> Tensor:
        """Values `[..., size]` of the rows that take part, `[count, size]`."""
        flat = values.flatten(0, -2)
        return flat if self.rows is None else flat[self.rows]

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
        mask = torch.ones_like(self.labels, dtype=torch.bool) if self.mask is None else self.mask
        data = (_rows(self.pristine), _rows(self.teacher), self.labels, mask)
        loss = sum(
            float(self.definition(student.double(), teacher.double(), labels, part))
            for student, teacher, labels, part in zip(*(t.split(ORACLE_ROWS) for t in data), strict=True)
        )
        chosen = self._checked()
        student, teacher, labels, part = (t[chosen] for t in data)
        student = student.double().requires_grad_()
        share = self.definition(student, teacher.double(), labels, part) * self.case.grad_output
        return Exact(loss, chosen, torch.autograd.grad(share, student)[0], NEAR)

    def _checked(self) -> Tensor:
        """The numbers of the rows whose gradient is compared, the last two of all at the end."""
        far = spread_out(self.case.rows - NEAR)
        if self.rows is not None:  # as many of those that take part, beside a few that may not
            among = self.rows[:-NEAR].cpu()
            far = torch.cat([among[spread_out(len(among))], far])
        return torch.cat([far, torch.arange(self.case.rows - NEAR, self.case.rows)])


class KLAndCrossEntropy(LossProblem):
    """0.5 T^2 KL(teacher || student) at temperature T + 0.5 cross-entropy; every row but the last two has a label."""

    def formula(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        s, t, temperature = self.chosen(student), self.chosen(teacher), self.temperature
        y = labels.flatten() if self.rows is None else labels.flatten()[self.rows]
        soft = eager_divergence("forward_kl", s, t, temperature)
        return soft * (temperature**2 * SOFT_WEIGHT) + F.cross_entropy(s, y) * HARD_WEIGHT

    def ours(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return distil_fast.distillation_loss(
            student,
            teacher,
            labels,
            temperature=self.temperature,
            soft_weight=SOFT_WEIGHT,
            hard_weight=HARD_WEIGHT,
            soft_mask=self.mask,
            inplace=self.case.inplace,
            backend=self.backend,
        ).loss

    def definition(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return reference.distillation_loss(
            student,
            teacher,
            labels,
            temperature=self.temperature,
            soft_weight=SOFT_WEIGHT,
            hard_weight=HARD_WEIGHT,
            soft_mask=mask,
            soft_count=self.count,
            hard_count=self.count - NEAR,
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


class Divergence(LossProblem):
    """A divergence alone, mean over the rows that take part. Their labels say which, to those who have no mask."""

    unlabelled = 0
    kind: ClassVar[Kind]
    t_squared: ClassVar[bool] = False

    def nearby(self) -> Problem:
        return type(self)(self.case, near=True)

    def formula(self, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
        t = self.temperature
        loss = eager_divergence(self.kind, self.chosen(student), self.chosen(teacher), t)
        return loss * t**2 if self.t_squared else loss

    def ours(self, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
        return distil_fast.divergence_loss(
            student,
            teacher,
            divergence=self.kind,
            temperature=self.temperature,
            mask=self.mask,
            t_squared=self.t_squared,
            backend=self.backend,
        )

    def definition(self, student: Tensor, teacher: Tensor, _: Tensor, mask: Tensor) -> Tensor:
        return reference.divergence_loss(
            student,
            teacher,
            divergence=self.kind,
            temperature=self.temperature,
            mask=mask,
            count=self.count,
            t_squared=self.t_squared,
        )


class KL(Divergence):
    """T^2 KL(teacher || student) at temperature T alone."""

    kind = "forward_kl"
    t_squared = True


class ReverseKL(Divergence):
    """KL(student || teacher)."""

    kind = "reverse_kl"
    slack = LOG_SPACE_SLACK


class JensenShannon(Divergence):
    """The generalised Jensen-Shannon divergence at beta 0.5, as GKD trains with it (Agarwal et al. 2023)."""

    kind = distil_fast.JSD(BETA)
    slack = LOG_SPACE_SLACK


class SoftCrossEntropy(Divergence):
    """Cross-entropy with the teacher's distribution: the KL without the teacher's entropy, as torchtune has it."""

    kind = "soft_cross_entropy"


class TopKKL(LossProblem):
    """sum_k p (log p - log q) over the k likeliest columns of a teacher that is known there alone."""

    arrays = 2
    unlabelled = 0

    def __init__(self, case: Case, *, near: bool = False) -> None:
        super().__init__(case, near=near)
        topk = distil_fast.TopK.from_logits(self.teacher, case.top_k, self.temperature, tail="ignore")
        self.inputs = (self.student, topk.ids, topk.log_probs)
        self.teacher = torch.cat([topk.ids.double(), topk.log_probs.double()], -1)  # as rows, for the definition

    def nearby(self) -> Problem:
        return type(self)(self.case, near=True)

    def formula(self, student: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
        return eager_top_k(self.chosen(student), self.chosen(ids), self.chosen(log_probs), self.temperature)

    def ours(self, student: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
        teacher = distil_fast.TopK(ids, log_probs, tail="ignore")
        return distil_fast.divergence_loss(
            student, teacher, temperature=self.temperature, mask=self.mask, backend=self.backend
        )

    def definition(self, student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        ids, log_probs = teacher.chunk(2, -1)
        log_q = reference.log_softmax(student, self.temperature).gather(-1, ids.long())
        rows = (log_probs.exp() * (log_probs - log_q)).sum(-1)
        return torch.where(mask, rows, 0.0).sum() / self.count


class CrossEntropy(LossProblem):
    """Cross-entropy of the student; the teacher is not read."""

    arrays = 2

    def formula(self, student: Tensor, _: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(student, labels)

    def ours(self, student: Tensor, _: Tensor, labels: Tensor) -> Tensor:
        return distil_fast.cross_entropy(student, labels, backend=self.backend)

    def definition(self, student: Tensor, _: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return reference.cross_entropy(student, labels, count=self.count - NEAR)


class Cosine(LossProblem):
    """1 - cos of hidden states, averaged over the rows that take part."""

    spread = 1.0

    def formula(self, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
        return F.cosine_embedding_loss(self.chosen(student), self.chosen(teacher), student.new_ones(self.count))

    def ours(self, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
        return distil_fast.cosine_loss(student, teacher, self.mask, backend=self.backend)

    def definition(self, student: Tensor, teacher: Tensor, _: Tensor, mask: Tensor) -> Tensor:
        return reference.cosine_loss(student, teacher, mask, count=self.count)


class MeanSquaredError(LossProblem):
    """Mean squared error of hidden states over the rows that take part."""

    spread = 1.0

    def formula(self, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
        return F.mse_loss(self.chosen(student), self.chosen(teacher))

    def ours(self, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
        return distil_fast.mse_loss(student, teacher, self.mask, backend=self.backend)

    def definition(self, student: Tensor, teacher: Tensor, _: Tensor, mask: Tensor) -> Tensor:
        return reference.mse_loss(student, teacher, mask, count=self.count)


class AttentionKL(LossProblem):
    """KL(teacher || student) of attention maps, which are probabilities: the rows are queries of one head."""

    spread = 1.0

    def __init__(self, case: Case, *, near: bool = False) -> None:
        super().__init__(case, near=near)
        self.student = self.student.detach().softmax(-1).requires_grad_()
        self.pristine, self.teacher = self.student.detach(), self.teacher.softmax(-1)
        self.inputs = (self.student, self.teacher, self.labels)

    def formula(self, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
        return F.kl_div(self.chosen(student).log(), self.chosen(teacher), reduction="batchmean")

    def ours(self, student: Tensor, teacher: Tensor, _: Tensor) -> Tensor:
        mask = None if self.mask is None else self.mask[None]
        return distil_fast.attention_loss(*_maps(student, teacher), mask, kind="kl", backend=self.backend)

    def definition(self, student: Tensor, teacher: Tensor, _: Tensor, mask: Tensor) -> Tensor:
        return reference.attention_loss(*_maps(student, teacher), mask[None], kind="kl", count=self.count)


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
    "reverse KL": ReverseKL,
    "JSD": JensenShannon,
    "soft CE": SoftCrossEntropy,
    "top-k KL": TopKKL,
    "CE": CrossEntropy,
    "cosine": Cosine,
    "MSE": MeanSquaredError,
    "attention KL": AttentionKL,
    "linear KL+CE": LinearKLAndCrossEntropy,
    "linear KL": LinearKL,
    "linear JSD": LinearJSD,
    "linear CE": LinearCrossEntropy,
    "softmax": Softmax,
    "softmax backward": SoftmaxBackward,
}
OF_HOSTS: dict[str, Callable[[Case], Problem]] = {
    host.name: HiddenHostProblem if host.hidden else HostProblem for host in HOSTS
}


def make(case: Case) -> Problem:
    """The problem of a case, its inputs filled."""
    return (OF_HOSTS | PROBLEMS)[case.problem](case)


def _maps(student: Tensor, teacher: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Rows `[queries, keys]` as the attention maps of one layer with one head."""
    return [student[None, None]], [teacher[None, None]]


def _laid_out(values: Tensor, case: Case) -> Tensor:
    """Values [rows, cols] in the case's dtype and layout."""
    if not case.shifted:
        return values.to(case.dtype)
    logits = torch.zeros(4, case.rows // 4 + 1, case.cols, dtype=case.dtype, device=case.device)
    logits[:, :-1] = values.view(4, -1, case.cols)
    return logits[:, :-1]


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])
