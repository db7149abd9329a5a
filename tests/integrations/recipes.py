"""Finds the scripts of examples/, and whether what they need is installed: each says so in a line `needs: a, b`.

Tests take a recipe's own classes from its script, so that what is shown is what is tested. Next: test_examples.py.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "examples"


def absent(code: str) -> list[str]:
    """Packages that the code says it needs and that are not here."""
    line = re.search(r"^(?:# )?needs: (.+)$", code, re.MULTILINE)
    names = line.group(1).split(",") if line else []
    return [name.strip() for name in names if importlib.util.find_spec(name.strip()) is None]


def example(name: str) -> ModuleType:
    """The script as a module, without running its `main`."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
