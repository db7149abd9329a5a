"""What is recorded of the machine: what the numbers depend on, and no one's name."""

from __future__ import annotations

import getpass
import platform
from pathlib import Path

import torch

from distil_fast import _C
from distil_fast.bench import machine


def test_sizes_of_caches() -> None:
    assert [machine._size(text) for text in ("48K", "32768K", "2M", "1G", "512")] == [
        48 << 10,
        32 << 20,
        2 << 20,
        1 << 30,
        512,
    ]
    assert machine.last_level_cache_bytes() >= 1 << 16


def test_description() -> None:
    described = machine.describe()
    assert described["cpu"]
    assert described["threads"] == torch.get_num_threads()
    assert described["instruction_set"] == _C.instruction_set()
    assert described["torch"] == torch.__version__
    text = " ".join(str(value) for value in described.values())
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    assert platform.node() not in text.split()
    assert getpass.getuser() not in text.split()
