"""TRL's distillation trainers with our losses: `apply(trainer)` for GKD, GOLD and DistillationTrainer, old and new.

By what the trainer has and not by its version: a `generalized_jsd_loss` of its own, or a method that calls its module's
`_chunked_divergence_loss`. Only the object is touched, never its class or module. Next: trl_losses.py, the losses;
docs/integrations.md.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from distil_fast.integrations.replaced import HostChangedError, Replaced, expect_parameters
from distil_fast.integrations.trl_losses import chunked_divergence_loss, generalized_jsd_loss

JSD_LOSS, CHUNKED_LOSS = "generalized_jsd_loss", "_chunked_divergence_loss"
FUSED_REDUCTIONS = ("batchmean", "sum", "mean")
ELSEWHERE = ("use_uld_loss", "use_liger_gkd_loss", "use_liger_loss")  # trainers that then never call JSD_LOSS


def apply(trainer: Any) -> Replaced:
    """Let a trainer of TRL compute its divergence by distil_fast; value, gradient and logs stay what TRL means.

    What stays TRL's own: `generalized_jsd_loss` on probabilities, over a top k, and elementwise where its `[..., V]`
    result may be used as such.

    Args:
        trainer: a `GKDTrainer`, `GOLDTrainer`, `IWOPDTrainer` or `DistillationTrainer`, or of a class derived from one.

    Returns:
        What puts TRL's code back, by `undo()` or at the end of a `with` block.

    Raises:
        HostChangedError: the trainer has neither of the two losses, or not with the parameters known here.
        ValueError: the trainer is set up to use another loss than the one that would be replaced.
    """
    replacements: dict[str, Any] = {}
    if hasattr(trainer, JSD_LOSS):
        _check_used(trainer)
        replacements[JSD_LOSS] = _jsd_loss(trainer)
    for name, method in _callers(trainer).items():
        replacements[name] = _rebound(trainer, method)
    if not replacements:
        raise HostChangedError(
            f"{type(trainer).__name__}: expected {JSD_LOSS}, or a method that calls its module's {CHUNKED_LOSS}; it "
            "has neither. docs/integrations.md names the trainers and versions that were tested."
        )
    return Replaced(trainer, **replacements)


# ------------------------------------------------------------------------------------------------ from logits


def _check_used(trainer: Any) -> None:
    for flag in ELSEWHERE:
        if getattr(trainer, flag, False):
            raise ValueError(
                f"{type(trainer).__name__}: expected {flag} to be off, got it on: the trainer then never calls "
                f"{JSD_LOSS}, and there is nothing to replace. Turn it off, or train as you are."
            )


def _jsd_loss(trainer: Any) -> Callable[..., Any]:
    """Ours in the place of the trainer's own, called with the host's signature."""
    host = getattr(trainer, JSD_LOSS)
    known = inspect.signature(generalized_jsd_loss).parameters
    expect_parameters(host, known, "TRL")
    signature = inspect.signature(host)
    _refuse_unknown(host, {*known, "logits_are_probs", "top_k", "add_tail"})
    rows_will_do = _sums_rows(trainer)

    @functools.wraps(host)
    def loss(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        fused = given["reduction"] in FUSED_REDUCTIONS or given["num_items_in_batch"] is not None
        if given.get("logits_are_probs") or given.get("top_k") or not (fused or rows_will_do):
            return host(*args, **kwargs)
        given = {name: given[name] for name in known}
        return generalized_jsd_loss(**(given if fused else {**given, "reduction": "rows"}))

    return loss


def _sums_rows(trainer: Any) -> bool:
    """Whether an elementwise result only goes through `_reduce_divergence_loss(jsd, completion_mask)`: masked by rows
    and summed, which a number a row serves as well."""
    reduce = getattr(trainer, "_reduce_divergence_loss", None)
    return reduce is not None and "completion_mask" in inspect.signature(reduce).parameters


# ------------------------------------------------------------------------------------------------ from hidden states


def _callers(trainer: Any) -> dict[str, FunctionType]:
    """The methods of the trainer that call CHUNKED_LOSS through their module's globals.

    Raises:
        HostChangedError: a class derived from theirs overrides one, which replacing it would put out of action.
    """
    found: dict[str, FunctionType] = {}
    for owner in type(trainer).__mro__:
        for name, method in vars(owner).items():
            if not isinstance(method, FunctionType) or CHUNKED_LOSS not in method.__code__.co_names:
                continue
            if CHUNKED_LOSS not in method.__globals__ or getattr(type(trainer), name) is not method:
                raise HostChangedError(
                    f"{type(trainer).__name__}.{name}: expected {owner.__name__}'s own method, which calls "
                    f"{CHUNKED_LOSS} of its module; it is overridden, or the function is gone. Apply to a trainer that "
                    "does not override it."
                )
            found[name] = method
    return found


def _rebound(trainer: Any, method: FunctionType) -> MethodType:
    """The method, bound to the trainer, with one global changed for it alone: the name of the loss means ours."""
    host = method.__globals__[CHUNKED_LOSS]
    known = inspect.signature(chunked_divergence_loss).parameters
    expect_parameters(host, known, "TRL")
    signature = inspect.signature(host)
    _refuse_unknown(host, {*known, "chunk_size"})

    @functools.wraps(host)
    def loss(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        given.pop("chunk_size", None)  # says how TRL's own goes about it
        return chunked_divergence_loss(**given)

    names = {**method.__globals__, CHUNKED_LOSS: loss}
    copy = FunctionType(method.__code__, names, method.__name__, method.__defaults__, method.__closure__)
    copy.__kwdefaults__ = method.__kwdefaults__
    return MethodType(functools.update_wrapper(copy, method), trainer)


def _refuse_unknown(host: Callable[..., Any], known: set[str]) -> None:
    """A parameter that is not known here may change what the loss means."""
    unknown = [name for name in inspect.signature(host).parameters if name not in known]
    if unknown:
        raise HostChangedError(
            f"TRL: expected {host.__qualname__} without {', '.join(unknown)}, whose meaning is not known here. "
            "docs/integrations.md names the versions that were tested."
        )
