"""Prose is told from code, and the same installation gives the same text."""

from __future__ import annotations

import pytest

from distil_fast.training.corpus import documents_from_installed_packages, prose


def test_prose_is_kept_and_its_markup_removed() -> None:
    text = (
        """Return the ``value`` of the :class:`~package.Thing` that was
    """.rstrip()
        + """
given to this *function*, or the one that it had before, if `nothing` was given.

A second paragraph that is long enough to be kept, because it is a sentence of the kind that people read."""
    )
    assert prose(text) == [
        "Return the value of the package.Thing that was given to this function, or the one that it had before, if "
        "nothing was given.",
        "A second paragraph that is long enough to be kept, because it is a sentence of the kind that people read.",
    ]


@pytest.mark.parametrize(
    "block",
    [
        ">>> x = the.value(of, a, thing) if it is not None else the.other(that, is, in, the, list)",
        "x : array_like\n    The input of the function, which is one of the things that are to be added to the other.",
        "Too short to be of use.",
        "| column of the table | that is | not a sentence | but has the words of one | and | more | of | them |.",
        "no capital at the beginning of this sentence, which is otherwise as good as any that you can think of.",
        "Names only: alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma.",
    ],
)
def test_what_is_not_prose_is_dropped(block: str) -> None:
    assert prose(block) == []


@pytest.mark.slow
def test_installed_packages_hold_enough_text_in_a_fixed_order() -> None:
    documents = documents_from_installed_packages()
    assert sum(len(paragraph) for document in documents for paragraph in document) > 1_000_000
    assert documents == documents_from_installed_packages()
