"""DistillKit's KL, JSD and TVD over our kernels, for its dense (whole logits) and sparse (top-k) signals.

The classes follow the protocol of its `LossFunctionBase` without importing it; `apply(trainer)` puts them into a
trainer. They know nothing of signal sources. Next: replaced.py; docs/integrations.md, docs/math.md "A top-k teacher".
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from distil_fast import TopK, divergence_loss
from distil_fast.integrations.replaced import HostChangedError, Replaced, expect_parameters

MISSING = ("zero", "symmetric_uniform")


class _DivergenceLoss:
    """Common to the three: T^2 D(p, q) at T, summed over the tokens under the mask, over their number."""

    _name: ClassVar[str]
    _divergence: ClassVar[str]

    def __init__(self, temperature: float, missing_probability_handling: Any = "zero") -> None:
        """
        Args:
            temperature: T > 0.
            missing_probability_handling: what a top-k teacher has outside its k, a name or DistillKit's enum. "zero":
                nothing, and its k are renormalised. "symmetric_uniform": one more outcome, compared with the student's
                mass outside the k. Dense signals do not look at it.

        Raises:
            ValueError: another name; a temperature that is not above 0.
        """
        missing = getattr(missing_probability_handling, "value", missing_probability_handling)
        if missing not in MISSING:
            raise ValueError(f"missing_probability_handling: expected one of {', '.join(MISSING)}, got {missing!r}.")
        if not temperature > 0.0:
            raise ValueError(f"temperature: expected a number > 0, got {temperature}.")
        self.temperature = temperature
        self.missing = missing

    @classmethod
    def name(cls) -> str:
        """The name in DistillKit's configuration."""
        return cls._name

    def requires_hidden_states(self) -> bool:
        return False

    def __call__(
        self,
        student_outputs: Any,
        signal: Any,
        mask: Tensor | None = None,
        hidden_state_mapping: Any = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            student_outputs: with `.logits` `[B, S, V]`.
            signal: with `.logits` `[B, S, V]`; or with `.sparse_ids` and `.sparse_values` `[B, S, k]`, `.log_values`
                (False: values are logits, for "zero" only) and `.generation_temperature`, that of the values.
            mask: `[B, S, 1]` or `[B, S]`, bool. None: every token.
            hidden_state_mapping: not looked at.
            num_items_in_batch: replaces the number of tokens under the mask.

        Returns:
            float32 (float64 for float64 logits), 0-d; 0 without a token.

        Raises:
            ValueError, TypeError: as `distil_fast.divergence_loss`; logits as values with "symmetric_uniform".
            HostChangedError: a signal that is neither dense nor sparse.
        """
        if mask is not None and mask.dim() == 3:
            mask = mask.squeeze(-1)
        return divergence_loss(
            student_outputs.logits,
            signal.logits if hasattr(signal, "logits") else self._top_k(signal, student_outputs.logits.dtype),
            divergence=self._divergence,
            temperature=self.temperature,
            t_squared=True,
            mask=mask,
            count=num_items_in_batch,
        )

    def _top_k(self, signal: Any, dtype: torch.dtype) -> TopK:
        """The signal's k columns, at this loss's temperature."""
        if not hasattr(signal, "sparse_ids") or not hasattr(signal, "sparse_values"):
            raise HostChangedError(
                f"DistillKit: expected a signal with logits, or with sparse_ids and sparse_values, got "
                f"{type(signal).__name__}. docs/integrations.md names the version that was tested."
            )
        if self.missing == "symmetric_uniform" and not signal.log_values:
            raise ValueError(
                "missing_probability_handling: expected 'zero' beside values that are logits, which do not say what is "
                "missing, got 'symmetric_uniform'."
            )
        values = signal.sparse_values.to(torch.promote_types(dtype, torch.float32))
        power = signal.generation_temperature / self.temperature
        if self.missing == "symmetric_uniform":
            return TopK(signal.sparse_ids, _at_power(values, power), "bucket")
        log_probs = (power * values).log_softmax(-1)
        if self._divergence == "forward_kl":  # what the teacher does not have adds nothing: no tail to compare
            return TopK(signal.sparse_ids, log_probs, "ignore")
        # Mass that rounding leaves over would be taken for the teacher's outside the k, where it has none: see to it
        # that the sum does not fall below 1.
        return TopK(signal.sparse_ids, log_probs + 4.0 * torch.finfo(values.dtype).eps, "bucket")


class KLDLoss(_DivergenceLoss):
    """DistillKit's "kl": T^2 KL(teacher || student)."""

    _name = "kl"
    _divergence = "forward_kl"


class JSDLoss(_DivergenceLoss):
    """DistillKit's "jsd": T^2 (KL(teacher || m) + KL(student || m)) / 2, m the mean of both."""

    _name = "jsd"
    _divergence = "jsd"


class TVDLoss(_DivergenceLoss):
    """DistillKit's "tvd": T^2 sum_j |p_j - q_j| / 2; the T^2 is DistillKit's."""

    _name = "tvd"
    _divergence = "total_variation"


def apply(trainer: Any) -> Replaced:
    """Replace those of a trainer's loss functions that we have: "kl", "jsd" and "tvd".

    Args:
        trainer: DistillKit's `DistillationTrainer`. Its other losses stay, and the weights too.

    Returns:
        Replaced, whose `undo()` puts DistillKit's losses back.

    Raises:
        HostChangedError: the trainer has none of the three, or they are no longer called or configured as expected.
    """
    theirs = list(getattr(trainer, "loss_functions", ()))
    ours = [_ours(loss) for loss in theirs]
    if all(new is old for new, old in zip(ours, theirs, strict=True)):
        raise HostChangedError(
            f"DistillKit: expected {type(trainer).__name__}.loss_functions with one of {', '.join(_CLASSES)}, got "
            f"{[type(loss).__name__ for loss in theirs]}. Is it ours already?"
        )
    return Replaced(trainer, loss_functions=ours)


def _ours(loss: Any) -> Any:
    """Our loss in the place of one of DistillKit's, or that one."""
    ours = _CLASSES.get(loss.name()) if hasattr(loss, "name") else None
    if ours is None or isinstance(loss, _DivergenceLoss):
        return loss
    if not hasattr(loss, "temperature") or not hasattr(loss, "missing"):
        raise HostChangedError(
            f"DistillKit: expected {type(loss).__name__} to have temperature and missing, which this version does not. "
            "docs/integrations.md names the version that was tested."
        )
    expect_parameters(type(loss).__call__, ("student_outputs", "signal", "mask", "num_items_in_batch"), "DistillKit")
    return ours(loss.temperature, loss.missing)


def _at_power(log_probs: Tensor, power: float) -> Tensor:
    """log of p^power / (sum p^power + missing^power): a teacher's k and its missing mass, at another temperature."""
    if math.isclose(power, 1.0):
        return log_probs
    missing = (1.0 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=0.0)
    powers = torch.cat([power * log_probs, power * missing.log()], -1)
    return power * log_probs - powers.logsumexp(-1, keepdim=True)


_CLASSES: dict[str, type[_DivergenceLoss]] = {loss.name(): loss for loss in (KLDLoss, JSDLoss, TVDLoss)}
