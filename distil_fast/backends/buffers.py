"""Memory for gradients and other outputs of the logits' size: reused from step to step where that saves page faults.

Knows nothing of what is computed. Next: csrc/cpu/buffers.h, which keeps the memory, and docs/performance.md for why.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distil_fast import _C

WORTH_KEEPING = 32 << 20  # bytes; a freed block that is smaller, the C library keeps by itself


def empty_like_rows(values: Tensor) -> Tensor:
    """An uninitialised contiguous CPU tensor of the values' shape and dtype."""
    bytes_needed = values.nbytes
    if bytes_needed < WORTH_KEEPING:
        return torch.empty_like(values, memory_format=torch.contiguous_format)
    storage = torch.frombuffer(_C.Buffer(bytes_needed), dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=values.dtype).set_(storage, 0, values.shape)  # type: ignore[call-overload]
