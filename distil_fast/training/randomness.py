"""The states of all random number generators of a process, as tensors and JSON data, and back.

It knows generators only. Next: snapshot.py, which keeps them; trainer.py, which holds them still over an evaluation.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Randomness(NamedTuple):
    """torch's generators as uint8 tensors by the kind of device; Python's and NumPy's as numbers."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def capture(device: torch.device) -> Randomness:
    """Of the host and of one device."""
    tensors = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    generator = numpy["state"]
    numbers = {
        "python": [version, list(words), gauss],
        "numpy": {
            "bit_generator": numpy["bit_generator"],
            "state": {"key": generator["key"].tolist(), "pos": int(generator["pos"])},
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
    }
    return Randomness(tensors, numbers)


def restore(randomness: Randomness, device: torch.device) -> None:
    """What comes next is what came next after `capture`."""
    tensors, numbers = randomness
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)
    version, words, gauss = numbers["python"]
    random.setstate((version, tuple(words), gauss))
    generator = numbers["numpy"]["state"]
    key = np.array(generator["key"], dtype=np.uint32)
    np.random.set_state(numbers["numpy"] | {"state": generator | {"key": key}})
