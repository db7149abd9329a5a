"""What `distil-fast env` shows is what is there; a missing extra is said, and nobody's name is."""

from __future__ import annotations

import getpass
import io
import json
import platform
import socket
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from rich.console import Console

import distil_fast
from distil_fast.training import environment as module
from distil_fast.training.environment import environment, missing_extras, table


def test_it_is_what_is_there() -> None:
    found = environment()
    assert found.versions["torch"] == torch.__version__
    assert found.versions["distil_fast"] == distil_fast.__version__
    assert found.threads == torch.get_num_threads()
    assert found.devices[0].name == "cpu"
    name, why = found.devices[0].backends["float32"]
    assert name == "native"
    assert "C++ core" in why
    assert len(found.devices) == 1 + torch.cuda.device_count()
    assert json.loads(json.dumps(found.as_dict()))["devices"][0]["name"] == "cpu"


def test_a_table_of_it() -> None:
    screen = io.StringIO()
    Console(file=screen, width=200).print(table(environment()))
    for words in ("torch", platform.python_version(), "native: the C++ core", "extra train", "cache"):
        assert words in screen.getvalue()
    for name in (socket.gethostname(), getpass.getuser()):
        assert name not in screen.getvalue().replace(environment().cache, "")


def test_missing_requirements_are_named_by_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(missing_extras()) == {"train", "bench", "integrations", "dev", "docs"}
    assert missing_extras()["train"] == []
    real = metadata.version

    def version(name: str) -> str:
        if name in ("datasets", "matplotlib"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(module.metadata, "version", version)
    assert missing_extras()["train"] == ["datasets", "matplotlib"]
    assert missing_extras()["bench"] == ["matplotlib"]
    assert environment().versions["datasets"] == "not installed"
    screen = io.StringIO()
    Console(file=screen, width=200).print(table(environment()))
    assert "missing datasets, matplotlib: pip install 'distil-fast[train]'" in screen.getvalue()


def test_a_backend_that_cannot_is_told_and_does_not_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distil_fast.backends._forced", "cuda")
    assert environment().devices[0].backends["float32"][0] == "none"


def test_it_needs_none_of_the_extras() -> None:
    script = """
import sys
for name in ("transformers", "rich", "datasets", "accelerate", "matplotlib", "yaml"):
    sys.modules[name] = None
from distil_fast.training.environment import environment
print(environment().devices[0].name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "cpu\n"
