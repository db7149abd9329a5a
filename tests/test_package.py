"""The package as a whole: who imports whom, what an import costs and does, and what the native objects hold.

What must be seen in a fresh process runs in one. It knows no formula. Next: docs/design.md, which says why.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import distil_fast
from distil_fast import _C, reference

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "distil_fast"

# ------------------------------------------------------------------------------------------------ arrows

PUBLIC = {"distil_fast", "functional", "hidden", "linear", "modules", "parallel", "reference", "teachers"}

# part -> the parts that it may import; `distil_fast` is the package's face, distil_fast/__init__.py
ARROWS: dict[str, set[str]] = {
    "reference_pairs": set(),
    "reference_divergences": {"reference_pairs"},
    "reference": {"reference_divergences", "reference_pairs"},
    "reference_topk": {"reference"},
    "checks": set(),
    "kernels": set(),
    "backends": {"_C", "kernels", "reference", "reference_pairs"},
    "ops": {"backends"},
    "teachers": set(),
    "options": {"backends", "checks", "reference", "teachers"},
    "pairs": {"backends", "checks", "ops", "reference"},
    "hidden": {"checks", "pairs"},
    "products": set(),
    "heads": {"backends", "products"},
    "chunks": {"backends", "heads", "products"},
    "linear_ops": {"backends", "chunks", "heads", "ops"},
    "linear": {"backends", "checks", "linear_ops", "options", "reference", "reference_topk", "teachers"},
    "functional": {
        "backends",
        "checks",
        "linear",
        "ops",
        "options",
        "pairs",
        "reference",
        "reference_topk",
        "teachers",
    },
    "parallel": {"backends", "checks", "heads", "ops", "options", "reference", "reference_pairs"},
    "modules": {"functional", "hidden", "reference", "teachers"},
    "linear_modules": {"linear", "modules", "reference", "teachers"},
    "parallel_modules": {"modules", "parallel", "reference"},
    "distil_fast": {
        "functional",
        "hidden",
        "linear",
        "linear_modules",
        "modules",
        "parallel",
        "parallel_modules",
        "reference",
        "teachers",
    },
    "training": PUBLIC | {"backends", "products"},  # who serves a device; matrix products for models too
    "integrations": PUBLIC,
    "bench": PUBLIC
    | {"_C", "backends", "integrations", "training"},  # which name what serves, and choose another to measure it
    "cli": {"bench", "training"},
}

# what each part may need beyond the standard library
RUNTIME = {"torch", "numpy"}
NEEDS: dict[str, set[str]] = {
    "kernels": {"torch", "triton"},
    "training": RUNTIME
    | {"accelerate", "transformers", "datasets", "pyarrow", "filelock", "jsonargparse", "yaml", "safetensors"}
    | {"rich", "matplotlib"},
    "integrations": RUNTIME
    | {"transformers", "trl", "torchtune", "textbrewer", "modelopt", "sentence_transformers", "lightning"},
    "bench": RUNTIME
    | {"rich", "matplotlib", "transformers"}
    | {"liger_kernel", "fla", "cut_cross_entropy", "quack", "trl", "torchtune", "textbrewer", "modelopt"},
    "cli": {"rich"},
}


def sources() -> Iterator[tuple[str, Path]]:
    """Every Python file that a wheel would hold, with the part that it belongs to."""
    for folder, parts in ((PACKAGE, None), (ROOT / "kernels", "kernels")):
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder).parts[0].removesuffix(".py")
            yield parts or ("distil_fast" if name == "__init__" else name), path


def imports(path: Path) -> Iterator[str]:
    """The full names of all that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here, so that this test can read them"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(name: str) -> str:
    """The part that an imported name of ours belongs to."""
    second = [*name.split("."), ""][1]
    return second if second in ARROWS or second == "_C" else "distil_fast"


@pytest.mark.parametrize(("part", "path"), [pytest.param(*s, id=str(s[1].relative_to(ROOT))) for s in sources()])
def test_imports_point_one_way(part: str, path: Path) -> None:
    assert part in ARROWS, f"{path}: a new part of the package belongs into the table of arrows"
    for name in imports(path):
        top = name.split(".")[0]
        if top == "distil_fast":
            assert part_of(name) in ARROWS[part] | {part}, f"{path} imports {name}"
        elif top not in sys.stdlib_module_names:
            assert top in NEEDS.get(part, RUNTIME), f"{path} imports {name}"


def test_the_arrows_have_no_cycle() -> None:
    order: list[str] = ["_C"]
    rest = {part: targets - {part} for part, targets in ARROWS.items()}
    while rest:
        free = [part for part, targets in rest.items() if targets <= set(order)]
        assert free, f"a cycle among {sorted(rest)}"
        order += free
        rest = {part: targets for part, targets in rest.items() if part not in free}


def test_the_walk_sees_imports() -> None:
    """The table is held against real imports, of which there are many."""
    seen = {part_of(name) for _, path in sources() for name in imports(path) if name.split(".")[0] == "distil_fast"}
    assert {"_C", "backends", "checks", "distil_fast", "functional", "modules", "ops", "reference", "training"} <= seen


def test_the_package_imports_neither_tests_nor_benchmarks() -> None:
    tops = {name.split(".")[0] for _, path in sources() for name in imports(path)}
    assert "torch" in tops
    assert not tops & {"tests", "benchmarks", "pytest", "hypothesis"}


def test_kernels_is_no_regular_package() -> None:
    """With an __init__.py, a script started in the repository would import it in place of Hugging Face's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


# ------------------------------------------------------------------------------------------------ native sources


def cpp_sources() -> list[Path]:
    return [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]


def test_the_core_includes_no_torch() -> None:
    assert len(cpp_sources()) > 10
    for path in cpp_sources():
        for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE):
            assert not re.match(r"(torch|ATen|c10|caffe2)/", header), f"{path} includes {header}"
            if header.startswith(("Python.h", "pybind11/")):
                assert path.parent.name == "python", f"{path} includes {header}"


def test_the_maths_includes_nothing() -> None:
    assert "#include" not in (ROOT / "csrc" / "divergences.h").read_text()


def test_both_tables_of_divergences_have_the_same_names() -> None:
    assert sorted(_C.DIVERGENCES) == sorted(reference.DIVERGENCES)
    for name, kind in reference.DIVERGENCES.items():
        assert kind.name == name


def objects() -> list[Path]:
    return sorted((ROOT / "build").glob("**/cpu.dir/**/sweeps_*.o"))


@pytest.mark.skipif(not objects(), reason="no build tree here: objects are only left by an editable install")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm, of binutils, is not installed")
def test_what_is_compiled_for_one_instruction_set_is_shared_with_none() -> None:
    """Of a weak symbol the linker keeps any one copy: perhaps the one with instructions that the processor lacks."""
    for path in objects():
        listing = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines()
        symbols = [line[17:] for line in listing]  # behind the address: the kind, and the name
        assert any("table_" in symbol for symbol in symbols), path
        weak = [symbol for symbol in symbols if symbol[0] in "WwVvu"]
        assert not weak, f"{path.name}: {weak}"
        shared = [symbol for symbol in symbols if symbol[0].isupper() and symbol[0] != "U" and "table_" not in symbol]
        assert not shared, f"{path.name}: {shared}"


# ------------------------------------------------------------------------------------------------ importing

PROBE = """
import sys, time
import torch
before = set(sys.modules)
state = (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), torch.is_grad_enabled(),
         torch.are_deterministic_algorithms_enabled(), len(__import__("warnings").filters))
start = time.perf_counter()
import distil_fast
seconds = time.perf_counter() - start
after = (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), torch.is_grad_enabled(),
         torch.are_deterministic_algorithms_enabled(), len(__import__("warnings").filters))
import json
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before), "same": state == after}))
"""


def in_a_process(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def probes() -> list[dict[str, object]]:
    return [json.loads(in_a_process(PROBE)) for _ in range(3)]


def test_an_import_is_quick(probes: list[dict[str, float]]) -> None:
    """Beyond torch's own import, which takes seconds."""
    assert statistics.median(probe["seconds"] for probe in probes) < 0.2


def test_an_import_brings_in_nothing_else(probes: list[dict[str, list[str]]]) -> None:
    foreign = {name.split(".")[0] for name in probes[0]["modules"]} - set(sys.stdlib_module_names)
    assert foreign <= {"distil_fast", "torch"}
    loaded = {part_of(name) for name in probes[0]["modules"] if name.startswith("distil_fast")}
    assert not loaded & {"training", "bench", "cli", "integrations"}
    assert not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in probes[0]["modules"])


def test_an_import_changes_nothing(probes: list[dict[str, bool]]) -> None:
    assert probes[0]["same"]


def test_every_public_name_is_there() -> None:
    assert sorted(distil_fast.__all__, key=str.lower) == sorted(set(distil_fast.__all__), key=str.lower)
    for name in distil_fast.__all__:
        assert getattr(distil_fast, name).__doc__, name
    functions = {name for name in dir(reference) if name in distil_fast.__all__ and name.islower()}
    assert {
        "distillation_loss",
        "divergence_loss",
        "cross_entropy",
        "softmax",
        "cosine_loss",
        "mse_loss",
        "logit_mse",
        "hidden_loss",
        "attention_loss",
        "triple_loss",
    } <= functions


RUNTIMES = """
import {first}
import {second}
import torch, distil_fast
torch.set_num_threads(2)
s, t = torch.full((64, 30000), 0.5), torch.zeros(64, 30000)
distil_fast.divergence_loss(s, t)
(s + t).exp().sum()
for line in open("/proc/self/maps"):
    print(line.rsplit(" ", 1)[-1].strip())
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
@pytest.mark.parametrize("order", [("torch", "distil_fast"), ("distil_fast", "torch"), ("distil_fast._C", "torch")])
def test_exactly_one_openmp_runtime(order: tuple[str, str]) -> None:
    """Two of them spin against each other: every parallel region, torch's and ours, took 44 times as long."""
    mapped = set(in_a_process(RUNTIMES.format(first=order[0], second=order[1])).splitlines())
    assert any("/_C." in path for path in mapped)
    runtimes = {path for path in mapped if re.search(r"/lib(gomp|omp|iomp5)[^/]*\.so", path)}
    assert len(runtimes) == 1, runtimes
