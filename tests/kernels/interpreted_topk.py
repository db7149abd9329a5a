"""The kernels for top-k teachers against their fp64 definition: divergences x tails x dtypes, ragged rows, faults.

Run by test_interpreter.py. The cases and their bounds are tests/topk.py's. Next: interpreted_options.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distil_fast import TopK, backends
from distil_fast.backends import triton as backend
from distil_fast.backends.settings import TAILS
from tests import calls, oracle, topk
from tests.kernels.interpreter import HALVES, Guarded

NAN = math.nan


def run(student: Tensor, teacher: TopK, labels: Tensor | None = None, **settings: Any) -> calls.Result:
    return topk.by_backend(student, teacher, labels, backend=backend, **settings)


def check(student: Tensor, teacher: TopK, labels: Tensor | None = None, where: str = "", **settings: Any) -> Tensor:
    """The call against its truth; the gradient."""
    how = {name: settings.pop(name) for name in ("gradient",) if name in settings}
    upstream = settings.pop("upstream", None)
    truth = topk.exact(student.clone(), teacher, labels, upstream, **settings)
    result = run(student, teacher, labels, upstream=upstream, **how, **settings)
    result.check(truth, f"{where} {settings}")
    return result.grad


@pytest.mark.parametrize("divergence", oracle.DIVERGENCES)
def test_matrix_in_turns(divergence: str) -> None:
    turn = list(oracle.DIVERGENCES).index(divergence)
    for case in topk.cases(oracle.DIVERGENCES[divergence], HALVES)[turn % 7 :: 7]:
        run(case.student, case.teacher, case.labels, **case.settings).check(case.truth, case.where)


def test_gradient_stays_exact_as_the_student_meets_the_teacher() -> None:
    """r of 1e-3 is what is left of logarithms of -8: in float, it would have three digits, which the bounds allow."""
    g = oracle.generator("topk meets")
    noise, teacher = (torch.randn(2, 300, generator=g, dtype=torch.float64) for _ in range(2))
    log_probs, ids = (teacher / 2.0).log_softmax(-1).topk(40)
    student, given = (teacher + 1e-3 * noise).float(), TopK(ids, log_probs.float(), "renormalise")
    grad, truth = check(student, given, temperature=2.0).double(), topk.exact(student, given, temperature=2.0).grad
    assert ((grad - truth).norm(dim=-1) <= 1e-5 * truth.norm(dim=-1)).all()


def some(tail: str, cols: int = 67, k: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, TopK, Tensor]:
    """Four rows, of which the last has no entries; entries at both ends of a row, and one that is the label."""
    g = oracle.generator("topk", tail, cols, k)
    student, teacher = oracle.logit_pair("plain", 4, cols, g)
    ids = torch.rand(4, cols, generator=g).argsort(-1)[:, :k]
    ids[0, :2] = torch.tensor([0, cols - 1])
    ids[0, 2:] = torch.arange(3, 3 + k - 2)
    log_probs = (teacher / 2.0).log_softmax(-1).gather(-1, ids).float()
    ids[1, 2], ids[3] = -1, -1
    labels = torch.tensor([3, int(ids[1, 0]), -100, 7])
    return student.to(dtype), TopK(ids, log_probs, tail), labels


@pytest.mark.parametrize("tail", TAILS)
def test_every_option_between_canaries(tail: str) -> None:
    for dtype, layout, inplace in (
        (torch.float32, {"offset": 1, "gap": 3}, False),
        (torch.bfloat16, {"gap": 5}, True),
        (torch.float16, {"offset": 3}, True),
    ):
        student, teacher, labels = some(tail, dtype=dtype)
        given, how = Guarded(student, **layout), "inplace" if inplace else "fresh"
        grad = check(
            given.rows, teacher, labels, f"{dtype} {layout}", gradient=how, temperature=2.0, label_smoothing=0.1,
            z_loss=1e-2, soft_mask=torch.tensor([0.5, 1.0, 2.0, 1.0]), soft_weight=0.7, vocab_size=67,
        )  # fmt: skip
        assert (grad.data_ptr() == given.rows.data_ptr()) == inplace
        given.check()


@pytest.mark.parametrize("tail", TAILS)
def test_rows_of_one_term_and_of_none(tail: str) -> None:
    """The entries of row 1 are not used, nor anything of row 2: both hold what would be at fault."""
    student, teacher, labels = some(tail)
    mask, upstream = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([1.0, -2.0, 0.5, 3.0])
    settings: dict[str, Any] = {"soft_mask": mask, "reduction": "none", "divergence": "reverse_kl"}
    truth = topk.exact(student, teacher, labels, upstream, **settings)
    teacher.ids[1:3], teacher.log_probs[1:3], student[2] = 10**9, NAN, NAN
    run(student, teacher, labels, upstream=upstream, **settings).check(truth, "unused rows")
    alone = run(student, teacher, labels, soft_weight=0.0)
    assert alone.values["soft"] == 0


def test_a_softcap_reaches_the_entries() -> None:
    for tail in TAILS:
        student, teacher, _ = some(tail)
        capped = {"student_softcap": 3.0, "student_logit_scale": 1.5}
        grad = run(student, teacher, reduction="sum", **capped).grad
        truth = topk.exact(student, teacher, reduction="sum", **capped).grad
        assert ((grad.double() - truth).norm(dim=-1) <= 1e-5 * truth.norm(dim=-1)).all(), tail


def test_many_entries_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """More entries than a tile has columns, and tiles without one."""
    from distil_fast.kernels import launch

    monkeypatch.setattr(launch, "SHAPES", {math.inf: launch.Shape(64, 1)})
    student, teacher, labels = some("bucket", cols=1000, k=100)
    teacher.ids[0] = torch.arange(450, 550)
    check(student, teacher, labels, temperature=2.0)


# ------------------------------------------------------------------------------------------------ at fault

FAULTS: dict[str, tuple[str, int, float, str]] = {
    "too large": ("ids", 2, 67, "TopK.ids: .*got 67 in row 1"),
    "far outside": ("ids", 0, 2**40, f"TopK.ids: .*got {2**40} in row 1"),
    "negative": ("ids", 1, -2, "TopK.ids: .*got -2 in row 1"),
    "above 0": ("log_probs", 4, 0.5, r"TopK.log_probs: .*got 0\.5 in row 1"),
    "nan": ("log_probs", 3, NAN, "TopK.log_probs: .*got nan in row 1"),
    "above 1": ("log_probs", 0, 0.0, "teacher_logits: .*a sum of .* in row 1"),
}


@pytest.mark.parametrize("fault", [*FAULTS, "twice"])
def test_entries_at_fault(fault: str) -> None:
    """That row's loss is nan and its gradient 0, the others are as they were; an error in the checking mode."""
    student, teacher, labels = some("bucket")
    clean = run(student, teacher, labels, reduction="none", upstream=torch.ones(4))
    field, entry, value, message = FAULTS.get(
        fault, ("ids", 4, float(teacher.ids[1, 0]), "TopK.ids: .* twice in row 1")
    )
    getattr(teacher, field)[1, entry] = int(value) if field == "ids" else value
    result = run(student, teacher, labels, reduction="none", upstream=torch.ones(4))
    assert result.values["loss"].isnan().tolist() == [False, True, False, False]
    assert result.values["hard"].isnan().tolist() == [False, True, False, False]
    assert not result.grad[1].any()
    others = [0, 2, 3]
    assert torch.equal(result.grad[others], clean.grad[others])
    assert torch.equal(result.values["loss"][others], clean.values["loss"][others])
    with backends.checked(), pytest.raises(ValueError, match=message):
        run(student, teacher, labels)


def test_more_entries_than_are_compared() -> None:
    ids = torch.arange(1025).expand(2, 1025)
    with pytest.raises(ValueError, match="at most 1024 entries a row, got 1025"):
        run(torch.zeros(2, 2000), TopK(ids, torch.full(ids.shape, -9.0), "bucket"))
