"""Two tensors compared row by row: the checks, the choice of a backend and the op of every such public function.

It knows neither layers nor formulae. Next: functional.py and hidden.py, the public functions; ops.py.
"""

from __future__ import annotations

from torch import Tensor

from distil_fast import backends, checks, ops, reference


def compare(
    function: str,
    kind: str,
    what: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    count: float | Tensor | None,
    reduction: str,
    backend: str | None,
    *,
    scale: float = 1.0,
    weight: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """The weighted loss, and the detached term before its weight.

    function and what: the public function, and the arguments student_<what> and teacher_<what>, for errors. kind and
    scale: what a row comes to, as `reference.pair_loss` has it.
    """
    checks.check_values(f"student_{what}", student)
    checks.check_pair(what, student, teacher)
    checks.check_reduction(reduction, count=count)
    checks.check_mask("mask", mask, student)
    weight = checks.check_quantity("weight", weight, student)
    number = checks.check_count("count", count, student)
    chosen = backends.for_call(student, function, backend)
    if chosen == "reference":
        term = reference.pair_loss(kind, student, teacher, mask, count, reduction, scale)
        return weight * term, term.detach()
    return ops.pair_loss(student, teacher, mask, weight, number, (kind, scale, reduction, chosen))
