"""The CUDA kernels under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer, and bugs that must be seen.

Each bug is planted into a copy of the kernels. Some give wrong numbers on fibres, or with copies that arrive early, or
leave threads waiting for ever; those that would go well by luck, ThreadSanitizer sees. Next: sanitized_test.cpp, the
program that is run; emu.h, the emulated device.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cuda import emulated
from tests.parts import part

PROGRAM = emulated.HERE / "sanitized_test.cpp"
PLAIN = ("-O1",)
THREADS = ("-O1", "-g1", "-fsanitize=thread", "-DEMU_THREADS")
ADDRESSES = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TIME_LIMIT = 280.0  # seconds; what takes longer hangs


@pytest.fixture(autouse=True)
def emulation() -> None:
    """These are programs of their own: nothing is put in the place of the native core."""
    if emulated.compiler() is None:
        pytest.skip("a C++ compiler is needed")


def verdict(flags: tuple[str, ...], core: Path = emulated.CORE, **environment: str) -> str:
    """ "clean", or what the program or a sanitizer says."""
    sources = [*sorted((core / "cuda").glob("*.cu")), PROGRAM]
    program = emulated.build(sources, [emulated.SMALL, *flags], [], "sanitized_test", core)
    options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    try:
        done = subprocess.run(
            [str(program)],
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            check=False,
            env={**os.environ, **options, **environment},
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    if done.returncode == 0 and done.stdout == "clean\n":
        return "clean"
    return done.stdout + done.stderr or f"exit status {done.returncode}"


@pytest.mark.parametrize("environment", [{}, {"EMU_EAGER": "1"}, {"EMU_SEED": "3"}], ids=["late", "early", "shuffled"])
def test_right_on_fibres(environment: dict[str, str]) -> None:
    assert verdict(PLAIN, **environment) == "clean"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [THREADS, ADDRESSES], ids=["threads", "addresses and undefined behaviour"])
def test_clean_under_sanitizers(flags: tuple[str, ...]) -> None:
    assert verdict(flags, EMU_EAGER="1") == "clean"


@dataclass(frozen=True)
class Bug:
    """A replacement in one file of the kernels, and what shows it."""

    file: str
    old: str
    new: str
    flags: tuple[str, ...] = PLAIN
    eager: bool = False


DESTROYS = "    if (hw::ranks() > 1) hw::cluster_sync();  // in place, the gradient destroys what peers read\n"
WRITES = "    hw::sync();  // in place, a group is read whole by its thread, the columns of ids too\n"
AGAIN = "#pragma unroll\n    for (int k = 0; k < n; ++k) v[k] = total[k];"
ALIGNED = "(reinterpret_cast<uintptr_t>(from) - slice.shift * size) % 16 == 0"
RELEASE = "    if (count) hw::Arrival::release();\n"
TAIL = "for (int i = tail + hw::thread(); i < slice.n;"
BUGS = {
    "no barrier before a block's total": Bug("reduce.cuh", "hw::sync();\n    if (thread < 32)", "if (thread < 32)"),
    "no barrier after a block's total": Bug("reduce.cuh", f"    hw::sync();\n{AGAIN}", AGAIN),
    "no barrier of the cluster": Bug("reduce.cuh", "        hw::cluster_sync();\n", ""),
    "one place for all totals": Bug("reduce.cuh", "    turn_ ^= 1;\n", "", THREADS),
    "a peer's total left out": Bug("reduce.cuh", "peer = 0; peer < hw::ranks()", "peer = 1; peer < hw::ranks()"),
    "blocks leave while peers read": Bug(
        "stage.cuh", "  if (hw::ranks() > 1) hw::cluster_sync();  //", "  //", THREADS
    ),
    "no wait for what is copied": Bug("stage.cuh", "arrivals[s].wait(count == 2 ? turn / 2 % 2 : turn % 2);", ""),
    "wrong parity": Bug("stage.cuh", "turn / 2 % 2 : turn % 2", "turn % 2 : turn % 2"),
    "no barrier after the wait": Bug("stage.cuh", "turn % 2);\n      hw::sync();", "turn % 2);"),
    "a stage used again too soon": Bug("stage.cuh", RELEASE, "", THREADS, eager=True),
    "a stage too few": Bug("stage.cuh", "(turn + count - 1) % count", "0 * turn", eager=True),
    "tail not copied": Bug("stage.cuh", TAIL, TAIL.replace("slice.n", "0")),
    "head not copied": Bug("stage.cuh", "i = hw::thread(); i < head;", "i = hw::thread(); i < head - 1;"),
    "columns behind the last not masked": Bug("stage.cuh", "(thread < end - slice.n)", "(thread < end - slice.n - 1)"),
    "columns before the first not masked": Bug("stage.cuh", "(thread < slice.shift)", "(thread < slice.shift - 1)"),
    "misaligned copies": Bug("stage.cuh", ALIGNED, "true"),
    "a pair of tensors' gradient for the whole row": Bug(
        "pair.cuh", "student + slice.begin * static_cast<int64_t>(sizeof(S))", "student"
    ),
    "digits of a sum left out": Bug("pair.cuh", "i + 1 < count; ++i) {", "i + 1 < 1; ++i) {"),
    "ids written while groups are read": Bug("topk.cuh", WRITES, "", THREADS),
    "bits set before they are cleared": Bug("topk.cuh", "bits()[w] = 0;\n    hw::sync();", "bits()[w] = 0;"),
    "a peer's columns destroyed in place": Bug("topk.cuh", DESTROYS, "", THREADS),
    "a row that is no distribution, read on": Bug("row_loss.cuh", "!(r.mass <= a_.any.most)", "false"),
    "a column too many": Bug("slice.cuh", "W - shift, cols);", "W - shift, cols + 1);"),
}


@pytest.mark.slow
@pytest.mark.parametrize("bug", part(list(BUGS)))
def test_a_planted_bug_is_seen(bug: str, tmp_path: Path) -> None:
    plan = BUGS[bug]
    core = tmp_path / "csrc"
    shutil.copytree(emulated.CORE, core)
    file = core / "cuda" / plan.file
    text = file.read_text()
    assert text.count(plan.old) == 1, f"{plan.file} has changed: {plan.old!r} occurs {text.count(plan.old)} times"
    file.write_text(text.replace(plan.old, plan.new))
    environment = {"EMU_EAGER": "1"} if plan.eager else {}
    said = verdict((*plan.flags, "-w"), core, **environment)
    assert said != "clean"
    if plan.flags == THREADS:
        assert "data race" in said or "wrong" in said or said == "hangs"
