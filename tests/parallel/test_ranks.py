"""What ranks tell each other: how often, in which group, what one of them does wrong; and autograd, compiler, modules.

It knows no bound. Next: test_losses.py, the numbers; tests/world.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import distil_fast
from distil_fast import reference
from tests import world
from tests.parallel.sharded import COLS, WIDTHS, Sharded, pair, some_labels

# ------------------------------------------------------------------------------------------------ communication


def test_the_number_of_all_reduces(ranks: world.World) -> None:
    """Two for the cross-entropy and the KL divergences, three for the rest; none in backward."""
    student, teacher = (x.float() for x in pair("plain", 3))
    labels = some_labels(3)
    assert Sharded(ranks, student, None, labels, label_smoothing=0.1).reduces == (2, 0)
    for name in reference.DIVERGENCES:
        expected = 2 if name in ("forward_kl", "reverse_kl") else 3
        assert Sharded(ranks, student, teacher, labels, divergence=name).reduces == (expected, 0), name
    student, teacher = (x.float() for x in pair("plain", 5000, cols=4))
    widths = (3, 1) if ranks.size == 2 else (2, 1, 1)
    assert Sharded(ranks, student, teacher, some_labels(5000, 4), widths=widths).reduces == (2, 0)


def test_a_group_that_is_not_all(ranks: world.World) -> None:
    student, teacher = (x.float() for x in pair("plain", 3))
    answers = ranks.results(world.in_a_part, student, teacher)
    expected = distil_fast.divergence_loss(student, teacher)
    for answer in answers[:2]:
        torch.testing.assert_close(answer, expected, rtol=2e-6, atol=0.0)
    assert all("part of" in answer for answer in answers[2:])


def arguments(student: Tensor, teacher: Tensor | None, labels: Tensor | None, **options: Any) -> dict[str, Any]:
    return {"args": (student, teacher, labels), **options}


def a_rank(**changed: Any) -> dict[str, Any]:
    """One rank's arguments, alike on all ranks but for what is changed."""
    student, teacher = (x.float() for x in pair("plain", 4, cols=9))
    given = {"student": student, "teacher": teacher, "labels": torch.tensor([3, -100, 17, 0]), **changed}
    return arguments(**given)


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    # what the last rank does differently; the error there; what the others' says
    "no tensor": ({"student": None}, "TypeError", "raised an error"),
    "integers": ({"student": torch.zeros(4, 9, dtype=torch.int64)}, "TypeError", "raised an error"),
    "widths": ({"teacher": torch.zeros(4, 8)}, "ValueError", "raised an error"),
    "no columns": ({"student": torch.zeros(4, 0), "teacher": torch.zeros(4, 0)}, "ValueError", "raised an error"),
    "mask value": ({"soft_mask": torch.tensor([1.0, -1.0, 0.0, 1.0])}, "ValueError", "raised an error"),
    "temperature value": ({"temperature": torch.tensor([1.0, 0.0, 2.0, 1.0])}, "ValueError", "raised an error"),
    "weight value": ({"soft_weight": torch.tensor(math.nan)}, "ValueError", "raised an error"),
    "option": ({"divergence": "kl"}, "ValueError", "raised an error"),
    "strides": ({"student": torch.zeros(9, 4).t()}, "ValueError", "raised an error"),
    "dtype": ({"student": torch.zeros(4, 9, dtype=torch.bfloat16)}, "RuntimeError", "dtypes"),
    "other option": ({"temperature": 3.0}, "RuntimeError", "options"),
    "other divergence": ({"divergence": "jsd"}, "RuntimeError", "options"),
    "no teacher": ({"teacher": None}, "RuntimeError", "dtypes"),
    "no labels": ({"labels": None}, "RuntimeError", "options"),
    "other labels": ({"labels": torch.tensor([3, -100, 17, 1])}, "RuntimeError", "labels"),
    "labels' order": ({"labels": torch.tensor([17, -100, 3, 0])}, "RuntimeError", "labels"),
    "other mask": ({"soft_mask": torch.tensor([1.0, 0.5, 0.0, 1.0])}, "RuntimeError", "options"),
    "rows": (
        {"student": torch.zeros(5, 9), "teacher": torch.zeros(5, 9), "labels": torch.zeros(5).long()},
        "RuntimeError",
        "leading shapes",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_on_one_rank_is_an_error_on_all(ranks: world.World, name: str) -> None:
    changed, kind, elsewhere = WRONG[name]
    last = ranks.size - 1
    answers = ranks.run(
        world.call, per_rank=[a_rank(**(changed if rank == last else {})) for rank in range(ranks.size)]
    )
    assert all(isinstance(answer, world.Failure) for answer in answers), answers
    assert answers[last].kind == kind, answers[last].trace
    for answer in answers[:last]:
        assert answer.kind in ("RuntimeError", "RankError")
        assert elsewhere in answer.message
        if elsewhere == "raised an error":
            assert f"rank {last}" in answer.message
    # and the group still works
    assert len(set(map(float, ranks.results(world.call, per_rank=[a_rank()] * ranks.size)))) == 1


def test_labels_that_no_rank_has(ranks: world.World) -> None:
    for label in (9 * ranks.size, -1):
        wrong = a_rank(labels=torch.tensor([0, label, 1, 2]))
        answers = ranks.run(world.call, per_rank=[wrong] * ranks.size)
        for answer in answers:
            assert answer.kind == "ValueError"
            assert f"0 <= label < {9 * ranks.size} or ignore_index, got {label} in row 1" in answer.message


def test_class_weights_of_the_whole_vocabulary(ranks: world.World) -> None:
    answers = ranks.run(world.call, per_rank=[a_rank(class_weights=torch.ones(30))] * ranks.size)
    assert all(answer.kind == "ValueError" and f"({9 * ranks.size},)" in answer.message for answer in answers)


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        distil_fast.vocab_parallel_cross_entropy(torch.zeros(2, 3), torch.zeros(2).long())


# ------------------------------------------------------------------------------------------------ autograd, modules


def test_backward_twice_and_no_second_derivative(ranks: world.World) -> None:
    student, teacher = (x.float() for x in pair("plain", 3))
    for first, second, message in ranks.results(world.twice, WIDTHS[ranks.size], student, teacher):
        assert torch.equal(first, second)
        assert "first derivative only" in message


def test_compiled_code_breaks_here_or_says_so(ranks: world.World) -> None:
    if ranks.size > 2:
        pytest.skip("the compiler's import takes seconds, and the number of ranks is nothing to it")
    student, teacher = (x.float() for x in pair("plain", 3))
    expected = 2.0 * distil_fast.divergence_loss(student, teacher)
    for answer in ranks.results(world.compiled, WIDTHS[ranks.size], student, teacher, False):
        torch.testing.assert_close(answer, expected, rtol=2e-6, atol=0.0)
    for answer in ranks.run(world.compiled, WIDTHS[ranks.size], student, teacher, True):
        assert isinstance(answer, world.Failure)
        assert "look at each other's arguments" in answer.message


def test_modules(ranks: world.World) -> None:
    student, teacher = (x.float() for x in pair("plain", 4))
    labels, widths, weights = some_labels(4), WIDTHS[ranks.size], torch.linspace(0.5, 2.0, COLS)
    cases: list[tuple[str, dict[str, Any], tuple[Any, ...], Any]] = [
        ("DistillationLoss", {"temperature": 3.0}, (student, teacher, labels), distil_fast.distillation_loss),
        ("DivergenceLoss", {"divergence": "jsd"}, (student, teacher), distil_fast.divergence_loss),
        ("CrossEntropyLoss", {"label_smoothing": 0.1}, (student, labels), distil_fast.cross_entropy),
        ("CrossEntropyLoss", {"class_weights": weights}, (student, labels), distil_fast.cross_entropy),
    ]
    for name, settings, args, function in cases:
        expected = function(*args, **settings)
        expected = expected[0] if isinstance(expected, tuple) else expected
        for answer in ranks.results(world.module_loss, f"VocabParallel{name}", settings, args, widths):
            torch.testing.assert_close(answer, expected, rtol=3e-6, atol=0.0)
