"""One call against the original distiller's loss block: value and gradient, fp32 and bf16, with each of its options.

Its mean-reduced terms are bench/original.py's, which was written after the authors' code; those that it lacks stand
here. Next: test_triple_loss.py, for the terms against their oracle.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

pytest.importorskip("transformers")

from distil_fast.bench.original import Original, Output
from distil_fast.integrations.distilbert import StepLosses, step_losses
from distil_fast.training.batch import IGNORED, MaskedBatch
from distil_fast.training.settings import LossConfig, OptimiserConfig
from tests.training.families import make_model, relative_error

BATCH, LENGTH, VOCABULARY, WIDTH = 4, 9, 61, 12
ALPHAS = {"alpha_ce": 5.0, "alpha_mlm": 2.0, "alpha_cos": 1.0}


def inputs(dtype: torch.dtype = torch.float32, labelled: float = 0.3) -> dict[str, Any]:
    """The block's arguments; padding on the right, labels on some real tokens."""
    g = torch.Generator().manual_seed(0)
    s, t = (2 * torch.randn(BATCH, LENGTH, VOCABULARY, generator=g) for _ in range(2))
    hs, ht = (torch.randn(BATCH, LENGTH, WIDTH, generator=g) for _ in range(2))
    attention_mask = torch.arange(LENGTH) < torch.tensor([9, 4, 6, 1]).unsqueeze(1)
    chosen = attention_mask & (torch.rand(BATCH, LENGTH, generator=g) < labelled)
    labels = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=g).where(chosen, torch.tensor(IGNORED))
    return {
        "s_logits": s.to(dtype),
        "t_logits": t.to(dtype),
        "s_hidden_states": (hs.to(dtype),),
        "t_hidden_states": (ht.to(dtype),),
        "attention_mask": attention_mask,
        "lm_labels": labels,
    }


def widened(given: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""

    def wide(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(wide, value))
        return value.double() if value.is_floating_point() else value

    return {name: wide(value) for name, value in given.items()}


def with_gradients(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The leaves: the student's logits and its last hidden states."""
    given["s_logits"].requires_grad_()
    given["s_hidden_states"][-1].requires_grad_()
    return given["s_logits"], given["s_hidden_states"][-1]


def original(given: dict[str, Any], positions: str, **alphas: float) -> tuple[Any, Tensor, Tensor]:
    """bench/original.py's losses, and the gradients."""
    config = LossConfig(temperature=2.0, positions=positions, **alphas)
    block = Original(make_model("bert"), make_model("bert"), config, OptimiserConfig(), steps=1)
    tokens = given["attention_mask"].flatten().nonzero().squeeze(1)
    labels = given["lm_labels"]
    batch = MaskedBatch(labels, given["attention_mask"], tokens, labels, tokens)
    leaves = with_gradients(given)
    student = Output(given["s_logits"], given["s_hidden_states"])
    losses = block.losses(student, Output(given["t_logits"], given["t_hidden_states"]), batch)
    return losses, *torch.autograd.grad(losses.loss, leaves)


def block_of_all(given: dict[str, Any], restrict: bool, alphas: dict[str, float]) -> tuple[dict[str, Tensor], Any]:
    """The block with every term: names and values, and the gradients."""
    s, t, labels, attention = (given[name] for name in ("s_logits", "t_logits", "lm_labels", "attention_mask"))
    leaves = with_gradients(given)
    mask = labels > -1 if restrict else attention
    ce = F.kl_div(F.log_softmax(s[mask] / 2, -1), F.softmax(t[mask] / 2, -1), reduction="batchmean") * 4
    terms = {
        "ce": ce,
        "mlm": F.cross_entropy(s.flatten(0, 1), labels.flatten()),
        "clm": F.cross_entropy(s[:, :-1].flatten(0, 1), labels[:, 1:].flatten()),
        "mse": nn.MSELoss(reduction="sum")(s[mask], t[mask]) / mask.sum(),
        "cos": nn.CosineEmbeddingLoss()(
            given["s_hidden_states"][-1][attention],
            given["t_hidden_states"][-1][attention],
            torch.ones(int(attention.sum())),
        ),
    }
    loss: Any = sum(alphas.get(f"alpha_{name}", 0.0) * term for name, term in terms.items())
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return {name: term.detach() for name, term in terms.items()} | {"loss": loss.detach()}, gradients


def ours(given: dict[str, Any], **options: Any) -> tuple[StepLosses, tuple[Tensor | None, ...]]:
    leaves = with_gradients(given)
    losses = step_losses(**given, **({"alpha_clm": 0.0} | options))
    return losses, torch.autograd.grad(losses.loss, leaves, allow_unused=True)


@pytest.mark.parametrize(("restrict", "dtype"), list(itertools.product([False, True], [torch.float32, torch.bfloat16])))
def test_it_is_the_originals_block(restrict: bool, dtype: torch.dtype) -> None:
    losses, gradients = ours(inputs(dtype), restrict_ce_to_mask=restrict, **ALPHAS)
    expected, *slopes = original(widened(inputs(dtype)), "masked" if restrict else "all", **ALPHAS)
    for name in ("loss", "ce", "mlm", "cos"):
        assert relative_error(getattr(losses, name).detach(), getattr(expected, name).detach()) < 2e-6, name
        assert getattr(losses, name).dtype == torch.float32
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert gradient is not None
        assert gradient.dtype == dtype
        assert relative_error(gradient, slope) < (1e-6 if dtype == torch.float32 else 2e-3)
    assert losses.clm == losses.mse == 0


def test_in_bf16_the_original_is_off_and_ours_is_not() -> None:
    """Its softmax and means are rounded to the logits' dtype, outside of autocast as its fp16 teacher is."""
    exact, *slopes = original(widened(inputs(torch.bfloat16)), "all", **ALPHAS)
    theirs, *rounded = original(inputs(torch.bfloat16), "all", **ALPHAS)
    losses, gradients = ours(inputs(torch.bfloat16), **ALPHAS)
    assert relative_error(theirs.loss.detach(), exact.loss.detach()) > 100 * relative_error(
        losses.loss.detach(), exact.loss.detach()
    )
    assert gradients[0] is not None
    assert relative_error(rounded[0], slopes[0]) > 2 * relative_error(gradients[0], slopes[0])


@pytest.mark.parametrize("restrict", [False, True])
@pytest.mark.parametrize("hard", ["alpha_mlm", "alpha_clm"])
def test_every_term_is_there(hard: str, restrict: bool) -> None:
    alphas = {"alpha_ce": 0.5, hard: 0.3, "alpha_mse": 0.01, "alpha_cos": 0.7}
    losses, gradients = ours(inputs(), restrict_ce_to_mask=restrict, **alphas)
    expected, slopes = block_of_all(widened(inputs()), restrict, alphas)
    for name in ("loss", "ce", "mse", "cos", hard.removeprefix("alpha_")):
        assert relative_error(getattr(losses, name).detach(), expected[name]) < 2e-6, name
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert gradient is not None
        assert relative_error(gradient, slope) < 1e-6


def test_its_defaults_are_the_originals() -> None:
    given = inputs() | {"s_hidden_states": None, "t_hidden_states": None}
    losses = step_losses(**given)
    expected, _ = block_of_all(widened(inputs()), False, {"alpha_ce": 0.5, "alpha_clm": 0.5})
    assert relative_error(losses.loss.detach(), expected["loss"]) < 2e-6


def test_without_a_masked_token_the_original_is_nan_and_ours_is_zero() -> None:
    losses, gradients = ours(inputs(labelled=0.0), restrict_ce_to_mask=True, **ALPHAS)
    theirs, _, _ = original(inputs(labelled=0.0), "masked", **ALPHAS)
    assert theirs.loss.isnan()
    assert losses.ce == losses.mlm == 0
    assert losses.loss == losses.cos
    assert gradients[0] is not None
    assert not gradients[0].any()


def test_what_the_original_excludes_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha_clm: expected 0 beside alpha_mlm"):
        step_losses(**inputs(), alpha_mlm=2.0)
    given = inputs() | {"s_hidden_states": None}
    with pytest.raises(ValueError, match="expected both for alpha_cos"):
        step_losses(**given, alpha_cos=1.0)
