"""The CUDA kernels as nvcc compiles them: no spills on any architecture, and what sm_90 has is used. Nothing is run.

Also: a module built with CUDA answers cleanly where there is no driver. Next: csrc/cuda/hw.cuh.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from distil_fast import _C
from distil_fast.backends import cuda
from tests.cuda import emulated

SOURCES = {path.stem: path for path in emulated.KERNELS}
STANDARD = ["-O3", "-std=c++17"]
FUNCTION = re.compile(r"Function : (\S+)")


@pytest.fixture(autouse=True)
def emulation() -> None:
    """Nothing is emulated here."""


def disassembler() -> str | None:
    """cuobjdump, of the toolkit or as Triton's wheel carries it."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
        found = shutil.which("cuobjdump", path=str(bundled))
    return found


def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("nvcc is needed")
    return found


def compile_for(architecture: str, code: str, source: Path, out: Path) -> str:
    """What ptxas says."""
    target = f"arch=compute_{architecture},code={code}"
    command = [nvcc(), *STANDARD, "-gencode", target, "-Xptxas=-v", "-c", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stderr


def resources(report: str) -> Iterator[tuple[str, int, int]]:
    """Each kernel's name, the bytes that it spills, and its registers."""
    for entry in report.split("Compiling entry function")[1:]:
        name = entry.split("'")[1]
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", entry))
        (registers,) = re.findall(r"Used (\d+) registers", entry)
        yield name, max(stack, stores, loads), int(registers)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "spills"), [("80", 0), ("90a", 0), ("120", 96)])
def test_no_kernel_spills(architecture: str, spills: int, tmp_path: Path) -> None:
    """512 threads of 128 registers are all that a multiprocessor has. What sm_120 runs is compiled from PTX later; this
    ptxas lacks a few registers there, once a row."""

    def compile_one(stem: str) -> str:
        return compile_for(architecture, f"sm_{architecture}", SOURCES[stem], tmp_path / f"{stem}.o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(compile_one, SOURCES))
    kernels = [kernel for report in reports for kernel in resources(report)]
    assert len(kernels) == 39 + 3 + 2 + 6 + 10 + 3  # rows, top-k, weights, softmax, pairs, rescale
    assert [(name, bytes_) for name, bytes_, _ in kernels if bytes_ > spills] == []
    assert max(registers for *_, registers in kernels) <= 128


@pytest.mark.slow
def test_ptx_for_later_architectures(tmp_path: Path) -> None:
    """The instructions of clusters and bulk copies are in the PTX too: they are not sm_90a's alone."""
    out = tmp_path / "row_loss.ptx"
    command = [nvcc(), *STANDARD, "-arch=compute_120", "-ptx", str(SOURCES["row_loss_bf16"]), "-o", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    text = out.read_text()
    assert ".target sm_120" in text
    assert "cp.async.bulk.shared" in text
    assert "barrier.cluster.arrive" in text


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of bf16's row kernels, what sm_90a executes, by the kernel's name."""
    tool = disassembler()
    if tool is None:
        pytest.skip("cuobjdump is needed")
    out = tmp_path_factory.mktemp("sass") / "row_loss_bf16.cubin"
    compile_for("90a", "sm_90a", SOURCES["row_loss_bf16"], out.with_suffix(".o"))
    path = f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"
    listing = subprocess.run(
        [tool, "-sass", str(out.with_suffix(".o"))], capture_output=True, text=True, check=True, env={"PATH": path}
    ).stdout
    names = FUNCTION.findall(listing)
    return dict(zip(names, FUNCTION.split(listing)[2::2], strict=True))


@pytest.mark.slow
def test_rows_are_held_in_clusters_by_bulk_copies(instructions: dict[str, str]) -> None:
    kept = {name: code for name, code in instructions.items() if "4KindE0E" in name}
    assert len(kept) == 9
    for name, code in kept.items():
        for wanted in (
            "UBLKCP",  # bulk copies from global memory,
            "SYNCS.ARRIVE",  # that a barrier in shared memory
            "SYNCS.PHASECHK",  # waits for
            "UCGABAR_ARV",  # the cluster's barrier
            "UCGABAR_WAIT",
            "MUFU.EX2",
            "LDS.128",
            r"STG\.E\S*\.128",
        ):
            assert re.search(wanted, code), f"{wanted} is missing in {name}"
        assert not re.search(r"\b(LDL|STL)\b", code), f"local memory in {name}"


# ------------------------------------------------------------------------------------------------ without a driver


def test_available_says_why_not() -> None:
    can, why = cuda.available(torch.device("cpu"), torch.float32)
    assert not can
    assert why == "the CUDA kernels are for NVIDIA's GPUs"
    assert not cuda.available(torch.device("cuda"), torch.float64)[0]


@pytest.mark.skipif(not hasattr(_C, "cuda_devices"), reason="built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_a_module_built_with_cuda_answers_without_a_driver() -> None:
    for _ in range(2):
        count, why = _C.cuda_devices()
        assert count == 0
        assert "driver" in why
    can, why = cuda.available(torch.device("cuda"), torch.float32)
    assert not can
    assert "driver" in why
    with pytest.raises(RuntimeError, match=r"distil_fast: CUDA: .*driver"):
        cuda.softmax(torch.zeros(2, 3), 1.0, False)


def test_a_module_built_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_C, "cuda_devices", raising=False)
    can, why = cuda.available(torch.device("cuda"), torch.float32)
    assert not can
    assert "built without CUDA" in why
