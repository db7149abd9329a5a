"""How often the host waits for the device in a step: told by CUDA itself on a GPU, by a count of operators on a CPU.

It knows nothing of what the step computes. Next: train.py, which asks.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Their results, or the sizes of their results, are numbers that a GPU would have to send to the host first.
WAITING = {
    aten._local_scalar_dense,  # item(), bool(), float(), tolist()
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten._unique2,
    aten.bincount,
    aten.multinomial,  # checks its probabilities
}
BY_MASK = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # wait if an index is a mask


def host_syncs(function: Callable[[], object], device: str) -> int:
    """How many times `function` makes the host wait for `device`, "cuda" or "cpu".

    On a CPU nothing waits, and what is counted are the operators that would make a GPU's host wait, forward and
    backward. What happens inside one operator is not seen there, those of distil_fast included, nor are copies between
    devices; a compiled function is not traced anew for this, and what it calls is seen as it runs.
    """
    if device == "cuda":
        return _told_by_cuda(function)
    counter = OperatorCounter()
    with counter:
        function()
    return counter.seen.total()


class OperatorCounter(TorchDispatchMode):
    """Counts, by name, the operators that would make a GPU's host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket
        if packet in WAITING or (packet in BY_MASK and any(map(_is_mask, args[1]))):
            self.seen[str(packet)] += 1
        return func(*args, **(kwargs or {}))


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _told_by_cuda(function: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(warning.message) for warning in told)
