"""Builds the CUDA kernels, unchanged, for the CPU: a module that distil_fast.backends.cuda can call, on CPU tensors.

Knows compilers and caches; nothing of numbers. Next: emu.h, the emulated device; conftest.py, the fixtures.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
CORE = HERE.parent.parent / "csrc"
KERNELS = sorted((CORE / "cuda").glob("*.cu"))
# A block of 32 threads keeps 1024 columns: the table of the device, for rows of a size that is quick to emulate.
SMALL = "-DDISTIL_FAST_SHAPES={8,32,1},{9,32,2},{9,32,4},{8,64,1},{9,32,8}"
FLAGS = ["-std=c++20", "-fPIC", "-pthread", "-DDISTIL_FAST_EMULATED", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", f"-I{HERE}"]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", tempfile.gettempdir())) / f"distil_fast_emulated_{os.getuid()}"


class CompileError(Exception):
    """The compiler's words."""


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build(sources: Sequence[Path], flags: Sequence[str], link: Sequence[str], name: str, core: Path = CORE) -> Path:
    """The linked file of sources that may lie in a copy of the core; from the cache if none of it has changed."""
    digest = hashlib.sha256(repr([*flags, *link]).encode())
    headers = (path for folder in (core, HERE) for path in sorted(folder.rglob("*.*h")))
    for path in (*sources, *headers):
        digest.update(path.read_bytes())
    target = CACHE / digest.hexdigest()[:16] / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    cxx = compiler()
    assert cxx is not None
    with tempfile.TemporaryDirectory() as scratch:
        objects = [Path(scratch) / f"{i}.o" for i in range(len(sources))]

        def compile_one(pair: tuple[Path, Path]) -> None:
            run([cxx, *FLAGS, f"-I{core}", *flags, "-x", "c++", "-c", str(pair[0]), "-o", str(pair[1])])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, zip(sources, objects, strict=True)))
        unfinished = Path(scratch) / name
        run([cxx, *flags, *link, "-pthread", *map(str, objects), "-o", str(unfinished)])
        shutil.move(unfinished, target)
    return target


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stderr}")


def module(name: str = "emulated_cuda", shapes: Sequence[str] = (SMALL,)) -> ModuleType:
    """The Python module of the kernels on fibres, with the SMALL table of launch shapes or, without it, their own."""
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = [*shapes, "-O1", "-fvisibility=hidden", f"-DEMU_MODULE={name}", *include]
    sources = [*KERNELS, CORE / "python" / "bindings_cuda.cpp", HERE / "emu_module.cpp"]
    path = build(sources, flags, ["-shared"], f"{name}.so")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
