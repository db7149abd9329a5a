"""What the GPU backends share: the dtypes they serve, the device that launches go to, the checking mode's questions.

It knows neither CUDA's kernels nor Triton's, and no formula. Next: cuda.py and triton.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from distil_fast import backends
from distil_fast.backends.layout import raise_fault
from distil_fast.backends.values import check_temperatures

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the current stream of the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def raise_if_checking(fault: Tensor, cols: int, mask_name: str) -> None:
    """In the checking mode: wait for the prologue's verdict on values that only the device sees."""
    if backends.checking():
        record = fault.tolist()
        if record[0]:
            raise_fault(record, cols=cols, mask_name=mask_name)


def check_temperature(temperature: float | Tensor) -> None:
    """In the checking mode: raise for what a kernel without a prologue answers with nan."""
    if backends.checking() and isinstance(temperature, Tensor):
        check_temperatures(temperature.flatten().float())
