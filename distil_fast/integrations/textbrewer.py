"""TextBrewer's KD losses and hidden-state losses over our kernels: for a distiller at hand, or by name in a config.

`apply(distiller)` replaces what it computes; `register()` adds names such as 'distil_fast_ce' to TextBrewer's tables.
It knows nothing of adaptors and models. Next: replaced.py; docs/integrations.md, which names what has no op of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distil_fast import cosine_loss, divergence_loss, mse_loss
from distil_fast.integrations.replaced import HostChangedError, Replaced


def kd_ce_loss(logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1.0) -> Tensor:  # noqa: N803
    """TextBrewer's 'ce': the mean over rows of -sum_j p_j log q_j, p and q at T, without T^2.

    Args:
        logits_S, logits_T: `[..., V]`, the student's and the teacher's.
        temperature: a number, or one per row `[...]` as TextBrewer's 'flsw' and 'cwsm' schedules make it.

    Returns:
        float32 (float64 for float64 logits), 0-d; 0 without a row.

    Raises:
        ValueError, TypeError: as `distil_fast.divergence_loss`.
    """
    return divergence_loss(logits_S, logits_T, divergence="soft_cross_entropy", temperature=temperature)


def kd_mse_loss(logits_S: Tensor, logits_T: Tensor, temperature: float | Tensor = 1.0) -> Tensor:  # noqa: N803
    """TextBrewer's 'mse': the mean over all elements of (s / T - t / T)^2.

    Args, returns and raises: as `kd_ce_loss`.
    """
    if not isinstance(temperature, Tensor) or temperature.dim() == 0:
        return mse_loss(logits_S, logits_T) / temperature**2
    rows = logits_S.shape[:-1].numel()  # each counts 1, and weighs 1 / T^2
    weights = temperature.to(torch.promote_types(temperature.dtype, torch.float32)) ** -2
    return mse_loss(logits_S, logits_T, mask=weights, count=rows)


def hid_mse_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:  # noqa: N803
    """TextBrewer's 'hidden_mse': the mean squared error over the tokens under the mask, and over their elements.

    Args:
        state_S, state_T: `[B, S, H]`, the student's (after its projection) and the teacher's.
        mask: `[B, S]`, of any dtype; None: every token.

    Returns:
        float32 (float64 for float64 states), 0-d; 0 without a token.

    Raises:
        ValueError, TypeError: as `distil_fast.mse_loss`.
    """
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        mask = mask.float()
    return mse_loss(state_S, state_T, mask=mask)


def cos_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:  # noqa: N803
    """TextBrewer's 'cos': the mean of 1 - cos over the tokens where the mask is not 0. Else as `hid_mse_loss`."""
    return cosine_loss(state_S, state_T, mask=None if mask is None else mask.bool())


def pkd_loss(state_S: Tensor, state_T: Tensor, mask: Tensor | None = None) -> Tensor:  # noqa: N803
    """TextBrewer's 'pkd': the squared distance of the unit vectors at position 0, which is 2 (1 - cos), over the batch.

    Sun et al. 2019 (PKD), equation 7. States are `[B, S, H]` or `[B, H]`; the mask is not looked at, as in TextBrewer.
    """
    first_S, first_T = (state[:, 0] if state.dim() == 3 else state for state in (state_S, state_T))  # noqa: N806
    return 2.0 * cosine_loss(first_S, first_T)


_KD: dict[str, Callable[..., Tensor]] = {"ce": kd_ce_loss, "mse": kd_mse_loss}
_MATCH: dict[str, Callable[..., Tensor]] = {"hidden_mse": hid_mse_loss, "cos": cos_loss, "pkd": pkd_loss}
_PREFIX = "distil_fast_"


def register() -> tuple[str, ...]:
    """Add our losses to TextBrewer's tables, and change nothing that stands there. Calling it again does nothing.

    Returns:
        the names: distil_fast_ce and distil_fast_mse for `DistillationConfig(kd_loss_type=...)`, and
        distil_fast_hidden_mse, distil_fast_cos and distil_fast_pkd for the `loss` of its `intermediate_matches`.

    Raises:
        HostChangedError: TextBrewer has no such tables, or lacks a loss that ours stands for.
    """
    for table, losses in zip(_tables(), (_KD, _MATCH), strict=True):
        table.update({_PREFIX + name: loss for name, loss in losses.items()})
    return tuple(_PREFIX + name for name in (*_KD, *_MATCH))


def apply(distiller: Any) -> Replaced:
    """Replace the losses of a distiller for which we have an op: its KD loss, and those of its intermediate matches.

    The matches are those of its `DistillationConfig`: another distiller that shares this takes ours for them too. They
    are looked up by name in every step, so `register()` is called, and their entries in the distiller's dictionary of
    losses change name with them: `unweighted_hidden_cos_0_0` becomes `unweighted_hidden_distil_fast_cos_0_0`.

    Args:
        distiller: one of TextBrewer's, such as `GeneralDistiller`. Losses without an op of ours stay.

    Returns:
        Replaced, whose `undo()` puts TextBrewer's losses back.

    Raises:
        HostChangedError: none of the distiller's losses is one that we have, or TextBrewer has changed shape.
    """
    kd_table, _ = _tables()
    if not hasattr(distiller, "kd_loss") or not hasattr(distiller, "d_config"):
        raise HostChangedError(
            f"TextBrewer: expected a distiller with kd_loss and d_config, got {type(distiller).__name__}. "
            "docs/integrations.md names the versions that were tested."
        )
    kd_loss = next((_KD[name] for name in _KD if distiller.kd_loss is kd_table[name]), None)
    matches = [
        match for match in getattr(distiller.d_config, "intermediate_matches", None) or () if match.loss in _MATCH
    ]
    if kd_loss is None and not matches:
        raise HostChangedError(
            f"TextBrewer: expected a KD loss among {', '.join(_KD)} or matches by {', '.join(_MATCH)}, and this "
            f"{type(distiller).__name__} has neither. Is it ours already?"
        )
    register()
    return _InDistiller(distiller, kd_loss or distiller.kd_loss, matches)


class _InDistiller(Replaced):
    """A distiller's KD loss and the names of its matches' losses."""

    def __init__(self, distiller: Any, kd_loss: Any, matches: list[Any]) -> None:
        super().__init__(distiller, kd_loss=kd_loss)
        self._matches = [Replaced(match, loss=_PREFIX + match.loss) for match in matches]

    def undo(self) -> None:
        super().undo()
        for match in self._matches:
            match.undo()


def _tables() -> tuple[dict[str, Any], dict[str, Any]]:
    """TextBrewer's KD losses and match losses by name, with those in them that ours stand for."""
    from textbrewer import presets  # type: ignore[import-not-found, unused-ignore]

    tables = getattr(presets, "KD_LOSS_MAP", {}), getattr(presets, "MATCH_LOSS_MAP", {})
    each = zip(tables, (_KD, _MATCH), strict=True)
    missing = [name for table, losses in each for name in losses if name not in table]
    if missing:
        raise HostChangedError(
            f"TextBrewer: expected losses named {', '.join(missing)} in textbrewer.presets, which this version does "
            "not have. docs/integrations.md names the versions that were tested."
        )
    return tables
