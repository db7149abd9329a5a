"""A masked language model in its parts: encoder, head's transform, decoder; and the precision it computes in.

Kept apart so that the head, the larger half at a vocabulary of 30522, can run on a few positions, on stored hidden
states, or fused with a loss. It knows nothing of losses. Next: architectures.py, where the parts are; objective.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from distil_fast.training.architectures import architecture, layer_count

MaskedLM: TypeAlias = PreTrainedModel  # of a class in architectures.py

PRECISIONS = ("auto", "fp32", "bf16")
# Without these instructions torch multiplies bf16 matrices more slowly than fp32 ones.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16")


@overload
def encode(model: MaskedLM, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor: ...
@overload
def encode(
    model: MaskedLM, input_ids: Tensor, attention_mask: Tensor | None, layers: Sequence[int]
) -> list[Tensor]: ...
def encode(
    model: MaskedLM, input_ids: Tensor, attention_mask: Tensor | None, layers: Sequence[int] | None = None
) -> Tensor | list[Tensor]:
    """Hidden states [B, S, H] of int64 token ids [B, S], without waiting for the device.

    Args:
        model: its attention "eager" or "sdpa"; with another implementation transformers may ask the device.
        attention_mask: [B, S], 0 for padding; None: no padding at all, which is faster.
        layers: whose outputs, counted from 1, 0 for the embeddings', negative ones from the end.

    Returns:
        The last hidden states; or with `layers` a list of those, and the others are not kept.

    Raises:
        ValueError: a layer that is not there.
    """
    last = layer_count(model)
    if layers is not None and not all(-last <= layer + 1 <= last + 1 for layer in layers):
        raise ValueError(f"layers: expected numbers from {-last - 1} to {last}, got {list(layers)}.")
    wanted = [last] if layers is None else [layer % (last + 1) for layer in layers]
    # Newer versions of transformers take a list, and keep these; older ones take it for True.
    more = {} if set(wanted) == {last} else {"output_hidden_states": sorted(set(wanted))}
    output = model.base_model(input_ids=input_ids, attention_mask=_attention_bias(model, attention_mask), **more)
    if layers is None:
        hidden: Tensor = output.last_hidden_state
        return hidden
    return [output.last_hidden_state if layer == last else output.hidden_states[layer] for layer in wanted]


def _attention_bias(model: MaskedLM, attention_mask: Tensor | None) -> Tensor | None:
    """The mask in the form that attention takes, [B, 1, 1, S].

    Given [B, S], transformers would first ask the device whether there is any padding.
    """
    kind = getattr(model.config, "_attn_implementation", None)
    if attention_mask is None or kind not in ("eager", "sdpa"):
        return attention_mask
    mask = attention_mask[:, None, None, :].bool()
    if kind == "sdpa":
        return mask
    zero = torch.zeros((), dtype=model.dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(model.dtype).min)


def transform(model: MaskedLM, hidden: Tensor) -> Tensor:
    """What the decoder gets, [..., H'], of hidden states [..., H]; ELECTRA's H' is the width of its embeddings."""
    row = architecture(model)
    hidden = model.get_submodule(row.dense)(hidden)
    hidden = F.gelu(hidden) if row.activation is None else model.get_submodule(row.activation)(hidden)
    features: Tensor = model.get_submodule(row.norm)(hidden)
    return features


def decoder(model: MaskedLM) -> tuple[Tensor, Tensor | None]:
    """The decoder's weight [V, H'] and bias [V], the parameters themselves."""
    linear = model.get_submodule(architecture(model).decoder)
    assert isinstance(linear, nn.Linear)
    return linear.weight, linear.bias


def apply_head(model: MaskedLM, hidden: Tensor) -> Tensor:
    """The logits [..., V] of hidden states [..., H]."""
    return F.linear(transform(model, hidden), *decoder(model))


def resolve_precision(precision: str) -> str:
    """ "fp32" or "bf16"; "auto" is bf16 where the processor multiplies bf16 matrices natively.

    Raises:
        ValueError: not one of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if precision != "auto":
        return precision
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if any(capabilities.get(name) for name in BF16_INSTRUCTIONS) else "fp32"


def autocast(model: MaskedLM, precision: str) -> torch.autocast:
    """The context for forward passes of `model` in "fp32" or "bf16"; weights stay in fp32."""
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
