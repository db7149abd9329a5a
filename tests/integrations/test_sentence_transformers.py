"""The recipe for sentence-transformers, examples/sentence_transformers_embeddings.py, against the host's own losses.

Value and gradients of a small random encoder, in float32 and bfloat16. Next: test_examples.py, which trains with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, EmbedDistillLoss, MSELoss

from distil_fast import cosine_loss, divergence_loss, mse_loss
from tests.integrations.recipes import example
from tests.training.families import relative_error

recipe = example("sentence_transformers_embeddings")
TEXT = (["ab cd", "hello", "x"], ["some words here", "no", "yes or no"], ["zebra", "tea", "abc abc abc"])


@pytest.fixture(scope="module")
def student() -> Any:
    return recipe.encoder(1, seed=1).eval()  # no dropout


@pytest.fixture(scope="module")
def targets() -> dict[str, Tensor]:
    """The teacher's embeddings [B, H] of the first column, and scores [B, N] of a query's candidates."""
    g = torch.Generator().manual_seed(0)
    return {"embeddings": torch.randn(3, 64, generator=g), "scores": 3 * torch.randn(3, 2, generator=g)}


def value_and_gradients(loss: nn.Module, labels: Tensor, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the student's weights, as one vector; in bf16 by autocast, as the host's trainer has it."""
    model: Any = loss.model
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        value = loss([model.preprocess(text) for text in TEXT[:columns]], labels)
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


CASES: dict[str, tuple[Callable[[Any], nn.Module], Callable[[Any], nn.Module], str, int]] = {
    "cosine": (
        lambda m: EmbedDistillLoss(m, "cosine"),
        lambda m: recipe.EmbeddingLoss(m, cosine_loss),
        "embeddings",
        1,
    ),
    "columns": (lambda m: EmbedDistillLoss(m), lambda m: recipe.EmbeddingLoss(m), "embeddings", 3),
    "mse": (lambda m: MSELoss(m), lambda m: recipe.EmbeddingLoss(m, mse_loss), "embeddings", 1),
    "kl": (lambda m: DistillKLDivLoss(m), lambda m: recipe.ScoreLoss(m), "scores", 3),
    "kl at 2": (lambda m: DistillKLDivLoss(m, temperature=2.0), lambda m: recipe.ScoreLoss(m, 2.0), "scores", 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_hosts_loss(case: str, dtype: torch.dtype, student: Any, targets: dict[str, Tensor]) -> None:
    theirs, ours, labels, columns = CASES[case]
    expected = value_and_gradients(theirs(student), targets[labels], columns, dtype)
    actual = value_and_gradients(ours(student), targets[labels], columns, dtype)
    bounds = (2e-6, 2e-5) if dtype == torch.float32 else (1e-2, 2e-2)  # bf16: where each rounds what the encoder made
    assert expected[1].norm() > 0
    for a, e, bound in zip(actual, expected, bounds, strict=True):
        assert relative_error(a, e) < bound


def test_another_temperature_is_another_loss(student: Any, targets: dict[str, Tensor]) -> None:
    one, two = (
        value_and_gradients(recipe.ScoreLoss(student, t), targets["scores"], 3, torch.float32) for t in (1.0, 2.0)
    )
    assert relative_error(one[1], two[1]) > 1e-2


def test_two_temperatures_are_a_scale_of_the_teachers_scores(student: Any) -> None:
    g = torch.Generator().manual_seed(1)
    embeddings = [torch.randn(4, 8, generator=g) for _ in range(4)]
    labels = torch.randn(4, 3, generator=g)
    host = DistillKLDivLoss(student, student_temperature=2.0, teacher_temperature=0.5)
    scores = torch.stack([(embeddings[0] * other).sum(1) for other in embeddings[1:]], 1)
    ours = divergence_loss(scores, labels, temperature=2.0, teacher_logit_scale=2.0 / 0.5, t_squared=True)
    torch.testing.assert_close(ours, host.compute_loss_from_embeddings(embeddings, labels), rtol=2e-6, atol=0)
