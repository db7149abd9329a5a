"""The C++ core on its own: how exact its functions are, on each instruction set, and that it is clean under sanitizers.

Compiles with the flags of CMakeLists.txt, which CMake is asked for. Next: cpp/math_test.cpp, cpp/sanitized_test.cpp.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES, CORE = ROOT / "tests" / "cpp", ROOT / "csrc"
LACKING = 77  # exit status: the processor has no such instructions

Command = list[str]


def run(command: Command, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **environment}
    )


def succeed(command: Command) -> None:
    done = run(command)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    """Compiler and flags of each file of the core, by its name; without input and output."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake, ninja = (shutil.which(tool, path=tools) for tool in ("cmake", "ninja"))
    if cmake is None or ninja is None:
        pytest.skip("cmake and ninja are needed to know the core's flags")
    build = tmp_path_factory.mktemp("flags")
    options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    succeed([cmake, *options, "-S", str(ROOT), "-B", str(build)])
    found = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        words = shlex.split(entry["command"])
        flags = words[1 : words.index("-o")]
        found[Path(entry["file"]).name] = [words[0], *flags]
    return found


MATH = {
    "avx512": ("sweeps_avx512.cpp", ['-DDISTIL_FAST_VEC="vec_avx512.h"']),
    "avx2": ("sweeps_avx2.cpp", ['-DDISTIL_FAST_VEC="vec_avx2.h"']),
    "portable": ("sweeps_portable.cpp", ['-DDISTIL_FAST_VEC="vec_portable.h"', "-DDISTIL_FAST_PORTABLE"]),
    "double": ("sweeps_portable.cpp", ['-DDISTIL_FAST_VEC="vec_portable.h"', "-DDISTIL_FAST_DOUBLE"]),
}


@pytest.mark.parametrize("isa", MATH)
def test_exp_expm1_and_log1p(isa: str, commands: dict[str, Command], tmp_path: Path) -> None:
    """`pytest -s` shows the table."""
    source, defines = MATH[isa]
    if source not in commands:
        pytest.skip(f"{isa} is not compiled for this processor's family")
    program = tmp_path / "math_test"
    flags = [*commands[source], *defines, f"-I{CORE / 'cpu'}", "-Wno-unused-function"]
    succeed([*flags, str(SOURCES / "math_test.cpp"), "-o", str(program)])
    done = run([str(program)])
    if done.returncode == LACKING:
        pytest.skip(f"this processor lacks {isa}")
    print(f"\n{isa}\n{done.stdout}")
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_clean_under_address_and_undefined_behaviour_sanitizers(commands: dict[str, Command], tmp_path: Path) -> None:
    sanitize = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compilations = [
        [*flags, *sanitize, "-c", str(CORE / "cpu" / name), "-o", str(tmp_path / f"{name}.o")]
        for name, flags in commands.items()
    ]
    driver = [*commands["row_loss.cpp"], *sanitize, f"-I{CORE}", "-c", str(SOURCES / "sanitized_test.cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(succeed, [*compilations, [*driver, "-o", str(tmp_path / "sanitized_test.o")]]))
    program = tmp_path / "sanitized_test"
    objects = sorted(str(path) for path in tmp_path.glob("*.o"))
    succeed([*commands["row_loss.cpp"], *sanitize, *objects, "-o", str(program)])
    done = run([str(program)], ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "portable: clean" in done.stdout
