"""The table of wrong arguments of `distillation_loss`, one at a time: the error's type, and what it must say.

It knows no formula and calls nothing. Next: test_checks.py, which makes the calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distil_fast import JSD, LogProbs, Probs

ROWS, V = 4, 11


def arguments() -> dict[str, Any]:
    """Valid arguments of distillation_loss, to spoil one at a time."""
    g = torch.Generator().manual_seed(5)
    return {
        "student_logits": torch.randn(ROWS, V, generator=g).requires_grad_(),
        "teacher_logits": torch.randn(ROWS, V, generator=g),
        "labels": torch.randint(0, V, (ROWS,), generator=g),
    }


@dataclass(frozen=True)
class Wrong:
    """Arguments to replace, and the error: its type, and patterns for what was expected, what came, what to do."""

    spoil: Callable[[], dict[str, Any]]
    error: type[Exception]
    says: tuple[str, ...]
    traceable: bool = True  # torch.compile gets as far as our check


def number(name: str, values: list[Any], error: type[Exception], *says: str) -> dict[str, Wrong]:
    return {f"{name}={v!r}"[:40]: Wrong(lambda v=v: {name: v}, error, (name, *says)) for v in values}


def values(name: str, kind: str, tensors: list[Tensor], *says: str) -> dict[str, Wrong]:
    """Tensors whose values are wrong, which only the kernel sees."""
    return {
        f"{name}-{kind}-{i}": Wrong(lambda t=t: {name: t}, ValueError, (name, *says)) for i, t in enumerate(tensors)
    }


def rows(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float32)


def label_rows(row: int, label: int) -> Tensor:
    labels = torch.zeros(ROWS, dtype=torch.int64)
    labels[row] = label
    return labels


INF, NAN = float("inf"), float("nan")
LEAF = {"requires_grad": True}

WRONG: dict[str, Wrong] = {
    # ---- the pair of logits
    "student-list": Wrong(lambda: {"student_logits": [[1.0]]}, TypeError, ("student_logits", "tensor", "list")),
    "student-int": Wrong(
        lambda: {"student_logits": torch.ones(ROWS, V, dtype=torch.int64)},
        TypeError,
        ("student_logits", "float32", "int64", r"\.float\(\)"),
    ),
    "student-0-d": Wrong(
        lambda: {"student_logits": torch.ones(())}, ValueError, ("student_logits", r"\[\.\.\., size\]", r"\(\)")
    ),
    "student-V=0": Wrong(lambda: {"student_logits": torch.ones(ROWS, 0)}, ValueError, ("size >= 1", r"\(4, 0\)")),
    "teacher-int": Wrong(
        lambda: {"teacher_logits": torch.ones(ROWS, V, dtype=torch.int32)}, TypeError, ("teacher_logits", "int32")
    ),
    "teacher-rows": Wrong(
        lambda: {"teacher_logits": torch.ones(ROWS + 1, V)}, ValueError, ("teacher_logits", r"\(4, 11\)", r"\(5, 11\)")
    ),
    "teacher-dimensions": Wrong(
        lambda: {"teacher_logits": torch.ones(2, 2, V)}, ValueError, ("teacher_logits", r"\(4, 11\)", r"\(2, 2, 11\)")
    ),
    "teacher-padded": Wrong(
        lambda: {"teacher_logits": torch.ones(ROWS, V + 5)},
        ValueError,
        (r"\(4, 16\)", "vocab_size", "at most 11"),
    ),
    "student-padded": Wrong(
        lambda: {"teacher_logits": torch.ones(ROWS, V - 3)}, ValueError, (r"\(4, 8\)", "vocab_size", "at most 8")
    ),
    "teacher-device": Wrong(
        lambda: {"teacher_logits": torch.ones(ROWS, V, device="meta")}, ValueError, ("cpu", "meta", r"\.to\('cpu'\)")
    ),
    "teacher-float64": Wrong(
        lambda: {"teacher_logits": torch.ones(ROWS, V).double()}, TypeError, ("float64", "float32", "Convert")
    ),
    "teacher-requires-grad": Wrong(
        lambda: {"teacher_logits": torch.ones(ROWS, V, **LEAF)},
        ValueError,
        ("teacher_logits requires grad", "no_grad", "inference_mode", r"detach\(\)"),
    ),
    # ---- labels
    "labels-list": Wrong(lambda: {"labels": [0] * ROWS}, TypeError, ("labels", "tensor of integers", "list")),
    "labels-float": Wrong(lambda: {"labels": torch.zeros(ROWS)}, TypeError, ("labels", "float32", r"\.long\(\)")),
    "labels-bool": Wrong(lambda: {"labels": torch.zeros(ROWS).bool()}, TypeError, ("labels", "bool", r"\.long\(\)")),
    "labels-shape": Wrong(
        lambda: {"labels": torch.zeros(ROWS, 1).long()}, ValueError, ("labels", r"\(4,\)", r"\(4, 1\)")
    ),
    "labels-device": Wrong(
        lambda: {"labels": torch.zeros(ROWS, device="meta").int()},
        ValueError,
        ("labels", "cpu", "meta", r"\.to\('cpu'\)"),
    ),
    **{
        f"label-{label}-in-row-{row}": Wrong(
            lambda row=row, label=label: {"labels": label_rows(row, label)},
            ValueError,
            ("labels", rf"0 <= label < {V}", f"got {label} in row {row}", "ignore_index"),
        )
        for row in (0, ROWS - 1)
        for label in (-1, -101, V, V + 1, 2**31, 2**53, -(2**53))
    },
    # ---- temperature
    **number("temperature", [0, 0.0, -1.0, NAN, INF, -INF, 1e-16, 1e16], ValueError, "> 0", "got"),
    **number("temperature", ["2", None, [2.0]], TypeError, "number or a tensor", "got"),
    "temperature-shape": Wrong(
        lambda: {"temperature": torch.ones(ROWS, 1)}, ValueError, ("temperature", r"\(4,\)", r"\(4, 1\)")
    ),
    "temperature-device": Wrong(
        lambda: {"temperature": torch.ones(ROWS, device="meta")}, ValueError, ("temperature", "cpu", "meta", r"\.to")
    ),
    "temperature-complex": Wrong(
        lambda: {"temperature": torch.ones(ROWS, dtype=torch.complex64)}, TypeError, ("temperature", "complex64")
    ),
    **values("temperature", "0-d", [torch.tensor(x) for x in (0.0, -1.0, NAN, INF)], "> 0", "got"),
    **values("temperature", "row", [rows(1, 1, x, 1) for x in (0.0, -1.0, NAN, INF)], "> 0", "got .* in row 2"),
    # ---- masks
    "soft_mask-list": Wrong(lambda: {"soft_mask": [1] * ROWS}, TypeError, ("soft_mask", "tensor", "list")),
    "soft_mask-int": Wrong(
        lambda: {"soft_mask": torch.ones(ROWS).int()}, TypeError, ("soft_mask", "bool", "int32", r"\.bool\(\)")
    ),
    "soft_mask-shape": Wrong(
        lambda: {"soft_mask": torch.ones(ROWS, V)}, ValueError, ("soft_mask", r"\(4,\)", r"\(4, 11\)")
    ),
    "soft_mask-device": Wrong(
        lambda: {"soft_mask": torch.ones(ROWS, device="meta")},
        ValueError,
        ("soft_mask", "cpu", "meta", r"\.to\('cpu'\)"),
    ),
    **values("soft_mask", "entry", [rows(1, 1, 1, x) for x in (-1.0, -1e-30, NAN, INF)], ">= 0", "got .* in row 3"),
    # ---- weights and counts
    **number("soft_weight", [NAN, INF, -INF], ValueError, "finite number", "got"),
    **number("hard_weight", [NAN, INF, -INF], ValueError, "finite number", "got"),
    **number("soft_count", [-1, -1.0, NAN, INF], ValueError, ">= 0", "got"),
    **number("hard_count", [-1, -0.5, NAN, INF], ValueError, ">= 0", "got"),
    **number("soft_weight", ["1", None], TypeError, "number or a tensor", "got"),
    **number("hard_count", ["1", [1]], TypeError, "number or a tensor", "got"),
    **values("soft_weight", "0-d", [torch.tensor(x) for x in (NAN, INF)], "finite number", "got"),
    **values("hard_weight", "0-d", [torch.tensor(x) for x in (NAN, INF)], "finite number", "got"),
    **values("soft_count", "0-d", [torch.tensor(x) for x in (-1.0, -2.0, NAN, INF)], ">= 0", "got"),
    **values("hard_count", "0-d", [torch.tensor(x) for x in (-1.0, -2.0, NAN, INF)], ">= 0", "got"),
    **{
        f"{name}-shape": Wrong(lambda name=name: {name: torch.ones(1)}, ValueError, (name, "0-d", r"\(1,\)"))
        for name in ("soft_weight", "hard_weight", "soft_count", "hard_count")
    },
    **{
        f"{name}-device": Wrong(
            lambda name=name: {name: torch.ones((), device="meta")}, ValueError, (name, "cpu", "meta", r"\.to\('cpu'\)")
        )
        for name in ("soft_weight", "hard_weight", "soft_count", "hard_count")
    },
    **{
        f"{name}-requires-grad": Wrong(
            lambda name=name, shape=shape: {name: torch.ones(shape, **LEAF)},
            ValueError,
            (f"{name} requires grad", rf"{name}\.detach\(\)"),
        )
        for name, shape in [
            *((name, ()) for name in ("soft_weight", "hard_weight", "soft_count", "hard_count", "temperature")),
            ("temperature", (ROWS,)),
            ("soft_mask", (ROWS,)),
        ]
    },
    # ---- settings
    **number("reduction", ["avg", "", "Mean", "batchmean", None, 0], ValueError, "mean, sum, none", "got"),
    **number("divergence", ["kl", "", "JSD"], ValueError, "forward_kl, reverse_kl, jsd", "got"),
    # ---- the hard term's extras
    **number("z_loss", [-1.0, NAN, INF], ValueError, ">= 0", "got"),
    **number("z_loss", ["1", None, [1.0]], TypeError, "number", "got"),
    **{
        f"{name}-without-labels": Wrong(
            lambda name=name, value=value: {"labels": None, name: value},
            ValueError,
            (name, "without labels", "Pass labels"),
        )
        for name, value in (("z_loss", 0.1), ("class_weights", torch.ones(V)))
    },
    **number("class_weights", [1.0, [1.0] * V], TypeError, "tensor", "got"),
    "class_weights-int": Wrong(
        lambda: {"class_weights": torch.ones(V).int()}, TypeError, ("class_weights", "floating-point", "int32")
    ),
    "class_weights-shape": Wrong(
        lambda: {"class_weights": torch.ones(V + 1)}, ValueError, ("class_weights", r"\(11,\)", r"\(12,\)")
    ),
    "class_weights-of-what-is-cut": Wrong(
        lambda: {"class_weights": torch.ones(V), "vocab_size": V - 1, "labels": label_rows(0, 0)},
        ValueError,
        ("class_weights", r"\(10,\)", r"\(11,\)"),
    ),
    "class_weights-device": Wrong(
        lambda: {"class_weights": torch.ones(V, device="meta")},
        ValueError,
        ("class_weights", "cpu", "meta", r"\.to\('cpu'\)"),
    ),
    "class_weights-requires-grad": Wrong(
        lambda: {"class_weights": torch.ones(V, **LEAF)},
        ValueError,
        ("class_weights requires grad", r"class_weights\.detach\(\)"),
    ),
    "class_weights-and-smoothing": Wrong(
        lambda: {"class_weights": torch.ones(V), "label_smoothing": 0.1},
        ValueError,
        ("class_weights", "label_smoothing=0", "Use one"),
    ),
    **{
        f"class_weights-of-{x}": Wrong(
            lambda x=x: {"class_weights": torch.ones(V).index_fill(0, torch.tensor([3, 7]), x)},
            ValueError,
            ("class_weights", ">= 0", f"got {x}", "for class 3"),
        )
        for x in (-1.0, NAN, INF)
    },
    # ---- transforms
    **{
        key: case
        for name in ("student_logit_scale", "teacher_logit_scale", "student_softcap", "teacher_softcap")
        for key, case in {
            **number(name, [0.0, -1.0, NAN, INF, 1e-16, 1e16], ValueError, "> 0", "got"),
            **number(name, ["1", [1.0]], TypeError, "number", "got"),
        }.items()
    },
    # ---- forms of teacher, and widths
    **{
        f"{form.__name__}-and-{name}": Wrong(
            lambda form=form, name=name: {"teacher_logits": form(torch.full((ROWS, V), 1e-3)), name: 2.0},
            ValueError,
            ("teacher_logit_scale", "teacher_softcap", "given by its logits", "Leave them out"),
        )
        for form in (LogProbs, Probs)
        for name in ("teacher_logit_scale", "teacher_softcap")
    },
    **{
        f"{form.__name__}-{what}": Wrong(lambda form=form, given=given: {"teacher_logits": form(given)}, error, says)
        for form in (LogProbs, Probs)
        for what, given, error, says in (
            ("list", [[1.0]], TypeError, ("teacher_logits", "tensor", "list")),
            ("rows", torch.zeros(ROWS + 1, V), ValueError, ("teacher_logits", r"\(4, 11\)", r"\(5, 11\)")),
            ("requires-grad", torch.zeros(ROWS, V, **LEAF), ValueError, ("requires grad", "no_grad", r"detach\(\)")),
        )
    },
    **number("vocab_size", [0, -1, V + 1], ValueError, "1 to 11", "got"),
    **number("vocab_size", [True, 2.0, "3"], TypeError, "integer", "got"),
    "vocab_size-of-the-wider": Wrong(
        lambda: {"teacher_logits": torch.ones(ROWS, V - 3), "vocab_size": V},
        ValueError,
        ("vocab_size", "1 to 8", "both models", "got 11"),
    ),
    "label-beyond-vocab_size": Wrong(
        lambda: {"labels": label_rows(1, V - 1), "vocab_size": V - 1},
        ValueError,
        ("labels", "0 <= label < 10", "got 10 in row 1", "ignore_index"),
    ),
    **number("divergence", [None, 0.5, JSD], TypeError, r"JSD\(0\.5\)", "got", "forward_kl, reverse_kl, jsd"),
    **number("label_smoothing", [-0.1, 1.1, NAN], ValueError, r"\[0, 1\]", "got"),
    **number("label_smoothing", ["0.1", None], TypeError, "number", "got"),
    **number("ignore_index", [1.5, None, "x", 2**70], TypeError, "integer", "got"),
    "hard_weight-without-labels": Wrong(
        lambda: {"labels": None, "hard_weight": 1.0}, ValueError, ("hard_weight", "without labels", "Pass labels")
    ),
    "hard_count-without-labels": Wrong(
        lambda: {"labels": None, "hard_count": 3}, ValueError, ("hard_count", "without labels", "Pass labels")
    ),
    "too-large-a-number": Wrong(
        lambda: {"soft_weight": 10**400}, ValueError, ("soft_weight", "finite", "got"), traceable=False
    ),
}
