"""A trainer of the DistilBERT recipe on top of the fused losses: `distil-fast train`, `eval`, `env` and `demo`.

Each file knows one thing, and its header says which. `train(TrainConfig(...))` is the command from Python, `Trainer`
the loop alone. Needs the extra `train`. Next: settings.py for the choices, run.py for the order of things, trainer.py.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distil_fast.training.run import train as train
    from distil_fast.training.settings import TrainConfig as TrainConfig
    from distil_fast.training.trainer import Trainer as Trainer

_HOMES = {"Trainer": "trainer", "TrainConfig": "settings", "train": "run"}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: parts of this package need less than all of the extra."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
