"""The precision that a run computes in: which one "auto" means, and the autocast around a forward pass.

Weights, gradients, moments and losses are float32 whatever it is. It knows devices; nothing of models. Next: health.py
for the loss scale that fp16 needs, trainer.py.
"""

from __future__ import annotations

import torch

from distil_fast.training.settings import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Without these instructions torch multiplies bf16 matrices on a CPU more slowly than fp32 ones.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16")


def resolve_precision(precision: str, device: torch.device) -> str:
    """One of "fp32", "bf16" and "fp16"; "auto" is bf16 where the processor multiplies bf16 matrices natively, or fp32.

    Raises:
        InputError: not one of these.
    """
    if precision in DTYPES:
        return precision
    if precision != "auto":
        raise InputError(f"precision: expected auto, {', '.join(DTYPES)}, got {precision!r}.")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(name) for name in BF16_INSTRUCTIONS)
    return "bf16" if native else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass in a resolved precision."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")
