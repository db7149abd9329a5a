"""Sharded vocabularies against the unsharded truth in fp64: worlds of 2 and 3 gloo processes, uneven shards.

Each world is started once. What is right is oracle.py's affair where it knows the case, else reference.py's in float64.
Next: world.py, which runs the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import distil_fast
from distil_fast import reference
from tests import oracle, world

WIDTHS = {2: (2101, 37), 3: (1, 1500, 637)}  # more than one block, less than a vector, one column
COLS = 2138


@pytest.fixture(scope="module", params=[2, 3], ids=["2-ranks", "3-ranks"])
def ranks(request: pytest.FixtureRequest) -> Iterator[world.World]:
    one = world.World(request.param)
    yield one
    one.close()


def pair(kind: str, rows: int, *seed: object, cols: int = COLS) -> tuple[Tensor, Tensor]:
    return oracle.logit_pair(kind, rows, cols, oracle.generator(kind, rows, cols, *seed))


def some_labels(rows: int, cols: int = COLS) -> Tensor:
    """On every shard, and one row without."""
    g = oracle.generator("labels", rows, cols)
    labels = torch.randint(0, cols, (rows,), generator=g)
    labels[:4] = torch.tensor([0, cols - 1, -100, cols // 2])[:rows]
    return labels


class Sharded:
    """A call's values, alike on every rank, and the whole gradient."""

    def __init__(self, ranks: world.World, student: Tensor, teacher: Tensor | None, *args: Any, **options: Any) -> None:
        labels, upstream = (*args, None, None)[:2]
        widths = options.pop("widths", WIDTHS[ranks.size])
        answers = ranks.results(world.logits_loss, widths, student, teacher, labels, upstream, options)
        self.values, self.reduces = answers[0]["values"], answers[0]["reduces"]
        for answer in answers[1:]:
            for name, value in self.values.items():
                assert torch.equal(value.nan_to_num(7.0), answer["values"][name].nan_to_num(7.0)), name
        self.grad = torch.cat([answer["grad"] for answer in answers], -1)


def check(ranks: world.World, student: Tensor, teacher: Tensor | None, *args: Any, **options: Any) -> Sharded:
    """Against the oracle's bounds."""
    exact = {name: x for name, x in options.items() if name not in ("backend", "widths")}
    truth = oracle.exact(student, teacher, *args, **exact)
    got = Sharded(ranks, student, teacher, *args, **options)
    where = f"{student.dtype} {tuple(student.shape)} {options}"
    oracle.check_values(got.values, truth, where)
    oracle.check_gradient(got.grad, truth, where)
    return got


# ------------------------------------------------------------------------------------------------ the matrix


@pytest.mark.parametrize("name", oracle.DIVERGENCES)
def test_every_divergence(ranks: world.World, name: str) -> None:
    divergence = oracle.DIVERGENCES[name]
    for kind in oracle.KINDS:
        student, teacher = (x.float() for x in pair(kind, 4, name))
        for temperature in (1.0, 2.0, 3.7):
            check(ranks, student, teacher, some_labels(4), divergence=divergence, temperature=temperature)


@pytest.mark.parametrize("name", oracle.DIVERGENCES)
def test_every_divergence_in_plain_torch(ranks: world.World, name: str) -> None:
    options: dict[str, Any] = {"divergence": oracle.DIVERGENCES[name], "backend": "reference"}
    for kind in oracle.KINDS:
        student, teacher = (x.float() for x in pair(kind, 3, name))
        check(ranks, student, teacher, some_labels(3), temperature=2.5, label_smoothing=0.1, **options)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_dtypes(ranks: world.World, student_dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        student, teacher = pair("close", 4)
        loss_scale = torch.full((4,), 1024.0)  # what a loss scaler multiplies with, before anything is rounded
        options: dict[str, Any] = {"divergence": divergence, "hard_weight": 0.1}
        args = student.to(student_dtype), teacher.to(teacher_dtype), some_labels(4), loss_scale
        check(ranks, *args, reduction="none", **options)


def test_float64(ranks: world.World) -> None:
    for name, divergence in oracle.DIVERGENCES.items():
        student, teacher = pair("plain", 3, name)
        for backend in ("native", "reference"):
            check(ranks, student, teacher, some_labels(3), divergence=divergence, backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masks_counts_weights(ranks: world.World, reduction: str, backend: str) -> None:
    g = oracle.generator("options")
    student, teacher = (x.float().view(3, 2, COLS) for x in pair("plain", 6))
    options: dict[str, Any] = {
        "temperature": 1.0 + 3.0 * torch.rand(3, 2, generator=g),
        "soft_mask": torch.tensor([[0.5, 0.0], [1.0, 2.0], [0.0, 0.25]]),
        "soft_weight": 0.3,
        "hard_weight": torch.tensor(1.7),
        "t_squared": False,
        "label_smoothing": 0.2,
        "reduction": reduction,
        "backend": backend,
    }
    labels = some_labels(6).view(3, 2)
    upstream = torch.rand(3, 2, generator=g) if reduction == "none" else None
    for divergence in ("forward_kl", "jsd"):
        check(ranks, student, teacher, labels, upstream, divergence=divergence, **options)
    if reduction == "mean":
        check(ranks, student, teacher, labels, soft_count=11.0, hard_count=torch.tensor(7.0), backend=backend)
        mask = torch.tensor([[True, False], [False, True], [True, True]])
        named = torch.where(labels == -100, 0, labels)
        check(ranks, student, teacher, named, soft_mask=mask, ignore_index=0, backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {"z_loss": 0.01},
        {"z_loss": 0.01, "label_smoothing": 0.3},
        {"class_weights": torch.linspace(0.0, 2.0, COLS)},
        {"student_logit_scale": 0.7, "student_softcap": 5.0, "teacher_softcap": 4.0, "z_loss": 0.1},
        {"teacher_logit_scale": 1.5, "divergence": "reverse_kl"},
    ],
    ids=["z_loss", "z_loss-smooth", "class_weights", "softcap", "scale"],
)
def test_the_rest_of_the_options(ranks: world.World, options: dict[str, Any], backend: str) -> None:
    student, teacher = (x.float() for x in pair("plain", 5))
    labels = some_labels(5)
    got = Sharded(ranks, student, teacher, labels, backend=backend, **options)
    whole = student.double().requires_grad_()
    terms = reference.distillation_loss(whole, teacher.double(), labels, **options)
    (grad,) = torch.autograd.grad(terms.loss, whole)
    for name, value in got.values.items():
        torch.testing.assert_close(value.double(), getattr(terms, name).detach(), rtol=3e-6, atol=0.0)
    assert (got.grad - grad).norm() <= 3e-6 * grad.norm()


# ------------------------------------------------------------------------------------------------ the hard term


def test_labels_on_every_shard(ranks: world.World) -> None:
    widths = WIDTHS[ranks.size]
    edges = [0, *torch.tensor(widths).cumsum(0).tolist()]
    labels = torch.tensor([edge + step for edge in edges for step in (-1, 0, 1) if 0 <= edge + step < COLS])
    student, _ = pair("plain", len(labels))
    upstream = torch.rand(len(labels), generator=oracle.generator("upstream"))
    check(ranks, student.float(), None, labels, upstream, reduction="none")
    check(ranks, student.float(), None, labels, label_smoothing=0.1)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_model_that_is_sure_of_the_label_keeps_its_digits(ranks: world.World, backend: str) -> None:
    """log1p(rest / own), whichever shard the label is on; a second column as high is no reason to count it out."""
    for label in (0, 1400, COLS - 1):
        student = pair("plain", 3)[0].float()
        student[:, label] = 40.0
        student[1, label // 2 + 1] = 40.0
        labels = torch.full((3,), label)
        got = Sharded(ranks, student, None, labels, torch.ones(3), reduction="none", backend=backend)
        whole = student.double().requires_grad_()
        others = whole.detach().clone()
        others[:, label] = -math.inf
        exact = torch.log1p((others.logsumexp(-1) - whole.detach()[:, label]).exp())
        assert exact[0] < 1e-9
        torch.testing.assert_close(got.values["loss"].double(), exact, rtol=2e-6, atol=0.0)
        torch.testing.assert_close(got.grad[:, label].double(), torch.expm1(-exact), rtol=2e-6, atol=0.0)


# ------------------------------------------------------------------------------------------------ edges


def masked_pairs(widths: tuple[int, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    """Columns that are masked in a model, single ones and all of a rank's."""
    first, last = slice(0, widths[0]), slice(COLS - widths[-1], COLS)
    pairs = {}
    for name, (in_student, in_teacher) in {"both": (1, 1), "teacher": (0, 1), "student": (1, 0)}.items():
        for place, what in {"column": slice(7, 8), "first": first, "last": last}.items():
            student, teacher = (x.float() for x in pair("plain", 3, name))
            if in_student:
                student[:2, what] = -math.inf
            if in_teacher:
                teacher[:2, what] = -math.inf
            pairs[f"{name}-{place}"] = student, teacher
    return pairs


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_masked_columns(ranks: world.World, divergence: str, backend: str) -> None:
    """As the unsharded loss: finite where it is, infinite where it is; a gradient wherever the loss is finite."""
    for name, (student, teacher) in masked_pairs(WIDTHS[ranks.size]).items():
        options: dict[str, Any] = {"divergence": divergence, "reduction": "none"}
        got = Sharded(ranks, student, teacher, None, torch.ones(3), backend=backend, **options)
        whole = student.clone().requires_grad_()
        loss = distil_fast.distillation_loss(whole, teacher, **options).loss
        (grad,) = torch.autograd.grad(loss.sum(), whole)
        torch.testing.assert_close(got.values["loss"], loss.detach(), rtol=2e-6, atol=1e-6, msg=lambda m, n=name: n + m)
        finite = loss.isfinite() | (divergence == "forward_kl")
        torch.testing.assert_close(got.grad[finite], grad[finite], rtol=1e-5, atol=2e-7, msg=lambda m, n=name: n + m)
        assert got.grad[~finite].isnan().any(-1).all()
        assert loss.isfinite().all() == (
            divergence == "jsd"
            or divergence == "total_variation"
            or "both" in name
            or ("teacher" in name) == (divergence == "forward_kl")
        )


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nan_stays_in_its_row(ranks: world.World, backend: str) -> None:
    student, teacher = (x.float() for x in pair("plain", 5))
    labels = torch.tensor([3, 4, 5, 6, 7])
    clean = Sharded(ranks, student, teacher, labels, torch.ones(5), reduction="none", backend=backend)
    student[1, 11] = math.nan
    student[2] = -math.inf
    teacher[3, COLS - 1] = math.inf
    got = Sharded(ranks, student, teacher, labels, torch.ones(5), reduction="none", backend=backend)
    assert got.values["loss"].isnan().tolist() == [False, True, True, True, False]
    for row in (0, 4):
        assert torch.equal(got.grad[row], clean.grad[row])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_unused_rows_are_never_read(ranks: world.World, backend: str) -> None:
    student, teacher = (x.float() for x in pair("plain", 4))
    labels, mask = torch.tensor([-100, 5, -100, -100]), torch.tensor([True, False, False, True])
    options: dict[str, Any] = {"soft_mask": mask, "backend": backend}
    clean = Sharded(ranks, student, teacher, labels, **options)
    student[2] = teacher[2] = math.nan
    teacher[1] = math.nan
    got = Sharded(ranks, student, teacher, labels, **options)
    assert got.values == clean.values
    assert torch.equal(got.grad, clean.grad)
    assert (got.grad[2] == 0).all()


def test_no_rows_and_no_used_rows(ranks: world.World) -> None:
    for rows in (0, 3):
        student, teacher = (x.float() for x in pair("plain", rows))
        for divergence in ("forward_kl", "jsd"):
            labels, mask = torch.full((rows,), -100), torch.zeros(rows, dtype=torch.bool)
            got = Sharded(ranks, student, teacher, labels, soft_mask=mask, divergence=divergence)
            assert all(value == 0 for value in got.values.values())
            assert got.grad.shape == student.shape
            assert (got.grad == 0).all()


def test_equal_models_have_no_gradient(ranks: world.World) -> None:
    student = pair("plain", 4)[0].float()
    for divergence in oracle.DIVERGENCES.values():
        got = Sharded(ranks, student, student.clone(), divergence=divergence)
        assert (got.grad == 0).all(), divergence


def test_wide_rows_few_rows_and_all_threads(ranks: world.World) -> None:
    widths = (40000, 9000, 7000)[: ranks.size]
    student, teacher = (x.float() for x in pair("close", 2, cols=sum(widths)))
    check(ranks, student, teacher, some_labels(2, sum(widths)), divergence="jsd", widths=widths)
    check(ranks, student.bfloat16(), teacher, some_labels(2, sum(widths)), divergence="reverse_kl", widths=widths)


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


# ------------------------------------------------------------------------------------------------ fused heads


def heads(rows: int, dtype: torch.dtype, bias: bool = True) -> dict[str, Tensor | None]:
    """Two models that are close, of different hidden sizes."""
    g = oracle.generator("heads", rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = normal(rows, 24), normal(COLS, 24) / 3.0
    return {
        "student_hidden": (hidden + 0.05 * normal(rows, 24)).to(dtype),
        "student_weight": (weight + 0.01 * normal(COLS, 24)).to(dtype),
        "student_bias": (0.1 * normal(COLS)).to(dtype) if bias else None,
        "teacher_hidden": torch.cat([hidden, normal(rows, 8)], -1).to(dtype),
        "teacher_weight": torch.cat([weight, 0.01 * normal(COLS, 8)], -1).to(dtype),
        "teacher_bias": (0.1 * normal(COLS)).to(dtype) if bias else None,
    }


class Whole:
    """The unsharded loss in float64, and its gradients."""

    def __init__(
        self, tensors: dict[str, Tensor | None], labels: Tensor | None, upstream: Tensor | None, **options: Any
    ) -> None:
        double = {name: None if x is None else x.double() for name, x in tensors.items()}
        wanted = {
            name: x.requires_grad_() for name, x in double.items() if x is not None and name.startswith("student")
        }

        def logits(model: str) -> Tensor:
            return torch.nn.functional.linear(*(double[f"{model}_{part}"] for part in ("hidden", "weight", "bias")))

        terms = reference.distillation_loss(logits("student"), logits("teacher").detach(), labels, **options)
        self.values = {name: value.detach() for name, value in terms._asdict().items()}
        upstream = None if upstream is None else upstream.double()
        grads = torch.autograd.grad(terms.loss, list(wanted.values()), upstream)
        self.grads = dict(zip(wanted, grads, strict=True))


def check_linear(
    ranks: world.World, tensors: dict[str, Tensor | None], labels: Tensor | None, upstream: Any = None, **options: Any
) -> tuple[int, int]:
    """Against float64; the hidden states' gradient is whole on every rank. Returns the numbers of all-reduces."""
    exact = Whole(
        tensors, labels, upstream, **{k: v for k, v in options.items() if k not in ("chunk_bytes", "backend")}
    )
    answers = ranks.results(world.linear_loss, WIDTHS[ranks.size], tensors, labels, upstream, options)
    dtype = tensors["student_hidden"].dtype  # type: ignore[union-attr]
    bound = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    for answer in answers:
        for name, value in answer["values"].items():
            close = {"rtol": 5e-6, "atol": 5e-7} if dtype != torch.float64 else {"rtol": 1e-12, "atol": 1e-13}
            torch.testing.assert_close(value.double(), exact.values[name], **close)
        hidden = answer["grads"]["student_hidden"].double()
        assert (hidden - exact.grads["student_hidden"]).norm() <= bound * exact.grads["student_hidden"].norm()
    for name in exact.grads.keys() - {"student_hidden"}:
        got = torch.cat([answer["grads"][name] for answer in answers]).double()
        assert (got - exact.grads[name]).norm() <= bound * exact.grads[name].norm(), name
    reduces: tuple[int, int] = answers[0]["reduces"]
    return reduces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_fused_heads(ranks: world.World, dtype: torch.dtype, divergence: str) -> None:
    tensors = heads(12, dtype)
    widest = max(WIDTHS[ranks.size])
    chunk_bytes = 2 * 5 * widest * (8 if dtype == torch.float64 else 4)  # 5 rows: chunks of 5, 5, 2
    sums = 2 if divergence != "jsd" else 3
    options: dict[str, Any] = {"divergence": divergence, "hard_weight": 0.5}
    reduces = check_linear(ranks, tensors, some_labels(12), chunk_bytes=chunk_bytes, **options)
    assert reduces == (1 + 3 * sums + 1, 0)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_fused_heads_with_options(ranks: world.World, backend: str) -> None:
    tensors = heads(12, torch.float32, bias=False)
    g = oracle.generator("linear options")
    mask = torch.rand(12, generator=g) * torch.tensor([1.0, 0.0, 0.0, 1.0] * 3)
    labels = some_labels(12)
    labels[5:] = -100
    options: dict[str, Any] = {
        "soft_mask": mask,
        "temperature": 1.0 + torch.rand(12, generator=g),
        "label_smoothing": 0.1,
        "backend": backend,
    }
    check_linear(ranks, tensors, labels, **options)
    check_linear(ranks, tensors, labels, z_loss=0.01, student_softcap=3.0, teacher_softcap=3.0, **options)
    upstream = torch.rand(12, generator=g)
    reduces = check_linear(ranks, tensors, labels, upstream, reduction="none", chunk_bytes=1, **options)
    used = int(((mask != 0) | (labels != -100)).sum())
    assert used < 12
    assert reduces == (1 + 2 * used, 1)


def test_fused_heads_without_used_rows(ranks: world.World) -> None:
    tensors = heads(4, torch.float32)
    mask, labels = torch.zeros(4, dtype=torch.bool), torch.full((4,), -100)
    for answer in ranks.results(world.linear_loss, WIDTHS[ranks.size], tensors, labels, None, {"soft_mask": mask}):
        assert answer["values"]["loss"] == 0
        assert all((grad == 0).all() for grad in answer["grads"].values())


@pytest.mark.parametrize(
    ("changed", "kind", "elsewhere"),
    [
        ({"args": (torch.zeros(4, 6), torch.zeros(3, 5), None, None, torch.zeros(4).long())}, "ValueError", "raised"),
        ({"args": (torch.zeros(4, 6), None, None, None, torch.zeros(4).long())}, "TypeError", "raised"),
        ({"chunk_bytes": 0}, "ValueError", "raised"),
        ({"chunk_bytes": 999}, "RuntimeError", "dtypes"),
        ({"student_bias": torch.zeros(4)}, "ValueError", "raised"),
    ],
    ids=["hidden", "no weight", "chunk", "other chunk", "bias"],
)
def test_a_wrong_head_on_one_rank(ranks: world.World, changed: dict[str, Any], kind: str, elsewhere: str) -> None:
    good = {"args": (torch.zeros(4, 6), torch.zeros(3, 6), None, None, torch.zeros(4).long())}
    function = {"function": "vocab_parallel_linear_distillation_loss"}
    per_rank = [{**good, **function, **(changed if rank == 0 else {})} for rank in range(ranks.size)]
    answers = ranks.run(world.call, per_rank=per_rank)
    assert all(isinstance(answer, world.Failure) for answer in answers), answers
    assert answers[0].kind == kind, answers[0].trace
    assert all(elsewhere in answer.message for answer in answers[1:])
