"""Compiles the kernels ahead of time, for GPUs that are not there, and reads what they take: registers, spills, loads.

A call of the backend on CPU tensors is recorded instead of launched; what would have been launched is then compiled
for a target, with exactly the specialisations that Triton would have chosen. Needs nothing but Triton's wheel, which
carries the disassembler; not for processes with TRITON_INTERPRET=1. As a script, it prints a table:

    python -m tests.kernels.aot

It knows no kernel by name. Next: test_aot.py, which holds the budgets.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from distil_fast.backends import triton as backend
from distil_fast.backends import triton_launch
from distil_fast.backends.settings import RowSettings

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments that the backend gave it."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


def record(call: Callable[[], object], target: str = "sm_90") -> list[Launch]:
    """What a call of the backend would launch on a GPU of this kind."""
    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(kernel, args, kwargs))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(triton_launch, "WAVE", TARGETS[target].warp_size),
    ):
        call()
    return launches


@functools.cache
def _binder(kernel: Any, target: str) -> tuple[Any, Any]:
    compiler = make_backend(TARGETS[target])
    return compiler, create_function_from_signature(kernel.signature, kernel.params, compiler)


def cache_key(launch: Launch, target: str = "sm_90") -> object:
    """What Triton looks a compiled kernel up by: two launches with the same key share one compilation."""
    _, bind = _binder(launch.kernel, target)
    _, specialization, options = bind(*launch.args, debug=False, **launch.kwargs)
    return launch.name, compute_cache_key({}, specialization, options)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes."""

    registers: int  # per thread
    spilled: int  # bytes or registers that went to memory
    wide_loads: int  # instructions in the code, 16 bytes a thread
    narrow_loads: int  # of less, those of scalars included
    wide_stores: int
    narrow_stores: int


def compile_for(launch: Launch, target: str) -> Resources:
    """Compiles, or takes it from Triton's cache on disk."""
    compiler, bind = _binder(launch.kernel, target)
    kwargs = {"debug": False, **launch.kwargs}
    bound, specialization, options = bind(*launch.args, **kwargs)
    options, signature, constexprs, attrs = launch.kernel._pack_args(compiler, kwargs, bound, specialization, options)
    source = ASTSource(launch.kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=TARGETS[target], options=options.__dict__)
    return _of_cubin(compiled.asm["cubin"]) if "cubin" in compiled.asm else _of_amdgcn(compiled.asm["amdgcn"])


def _of_cubin(cubin: bytes) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, *how, file.name], capture_output=True, text=True, check=True).stdout
            for tool, how in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
        )
    used = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    loads, stores = (re.findall(rf"\b{kind}\.[A-Z0-9._]*", code) for kind in ("LDG", "STG"))
    return Resources(
        used["REG"], used["STACK"] + used["LOCAL"] + spills, *_widths(loads, r"\.128"), *_widths(stores, r"\.128")
    )


def _of_amdgcn(code: str) -> Resources:
    """Scalar registers that spill go to lanes of vector registers, not to memory, and are counted with those."""
    used = {
        n: int(x) for n, x in re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", code)
    }
    loads, stores = (re.findall(rf"\b(?:global|buffer)_{kind}_\w+", code) for kind in ("load", "store"))
    spilled = used["vgpr_spill_count"] + used["private_segment_fixed_size"]
    return Resources(used["vgpr_count"], spilled, *_widths(loads, "dwordx4"), *_widths(stores, "dwordx4"))


def _widths(instructions: list[str], wide: str) -> tuple[int, int]:
    count = sum(bool(re.search(wide, i)) for i in instructions)
    return count, len(instructions) - count


# ------------------------------------------------------------------------------------------------ the variants

HALVES = (torch.float32, torch.bfloat16, torch.float16)
ODD = 30523  # columns: rows begin anywhere


def rows(dtype: torch.dtype, cols: int = ODD, padding: int = 0) -> torch.Tensor:
    return torch.empty(4, cols + padding, dtype=dtype)[:, :cols]


def row_loss(
    student: torch.dtype,
    teacher: torch.dtype,
    divergence: str = "forward_kl",
    terms: tuple[float, float] = (0.5, 0.5),
    *,
    cols: int = ODD,
    padding: int = 0,
    target: str = "sm_90",
    options: dict[str, Any] | None = None,
    class_weights: torch.Tensor | None = None,
    **how: Any,
) -> list[Launch]:
    """The launches of one row loss; `padding` makes the teacher's rows incongruent to the student's, `options` are
    further settings."""
    labels = torch.zeros(4, dtype=torch.int64)
    settings = RowSettings(divergence=divergence, parameters=(0.5, 0.5), label_smoothing=0.1, **(options or {}))
    pair = rows(student, cols), rows(teacher, cols, padding)
    args = (*pair, labels, None, class_weights, 2.0, *terms, -1.0, -1.0, settings)
    return record(lambda: backend.row_loss(*args, **{"gradient": "fresh", **how}), target)


def topk_loss(
    student: torch.dtype,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    k: int = 64,
    *,
    cols: int = ODD,
    terms: tuple[float, float] = (0.5, 0.5),
    target: str = "sm_90",
    options: dict[str, Any] | None = None,
    gradient: str = "fresh",
) -> list[Launch]:
    """The launches of one loss with a top-k teacher."""
    settings = RowSettings(divergence=divergence, parameters=(0.5, 0.5), label_smoothing=0.1, **(options or {}))
    entries = torch.zeros(4, k, dtype=torch.int64), torch.zeros(4, k)
    labels = torch.zeros(4, dtype=torch.int64)
    args = (rows(student, cols), *entries, labels, None, None, 2.0, *terms, -1.0, -1.0, settings, 1.0, tail)
    return record(lambda: backend.topk_loss(*args, gradient=gradient), target)


def softmaxes(dtype: torch.dtype, logarithm: bool, target: str = "sm_90", padding: int = 0) -> list[Launch]:
    x, y = rows(dtype, padding=padding), rows(dtype)
    return record(
        lambda: (backend.softmax(x, 2.0, logarithm), backend.softmax_backward(y, y, torch.ones(4), logarithm)), target
    )


def pair(
    kind: str, student: torch.dtype, teacher: torch.dtype, cols: int = 768, target: str = "sm_90", scale: float = 1.0
) -> list[Launch]:
    pair, mask = (rows(student, cols), rows(teacher, cols)), torch.ones(4, dtype=torch.bool)
    return record(lambda: backend.pair_loss(*pair, mask, 1.0, -1.0, kind, scale, "mean", gradient=True), target)


def rescale(dtype: torch.dtype, target: str = "sm_90") -> list[Launch]:
    return record(lambda: backend.rescale(rows(dtype), torch.ones(()), torch.ones(())), target)


if __name__ == "__main__":
    for name in TARGETS:
        for launch in [
            *row_loss(torch.bfloat16, torch.bfloat16, target=name),
            *row_loss(torch.float32, torch.float32, target=name)[1:2],
            *row_loss(torch.bfloat16, torch.bfloat16, "reverse_kl", target=name)[1:2],
            *row_loss(torch.bfloat16, torch.bfloat16, "jsd", target=name)[1:2],
            *row_loss(torch.bfloat16, torch.bfloat16, padding=1, target=name)[1:2],
            *softmaxes(torch.bfloat16, False, name),
            *(pair(kind, torch.bfloat16, torch.bfloat16, target=name)[1] for kind in ("cosine", "squared", "kl")),
            *rescale(torch.bfloat16, name),
        ]:
            print(f"{name:8}{launch.name:26}{compile_for(launch, name)}")
