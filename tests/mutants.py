"""Plants wrong kernels and wrong formulae into a copy of the repository, one at a time: the suite must fail for each.

    python -m tests.mutants [part of a name ...]

The copy lives in a temporary folder and is built there, with its own native module; the repository is not touched. It
knows no test by name, only which files are quick and to the point. Next: MUTANTS below; test_mutants.py runs it all.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.parts import part

ROOT = Path(__file__).parent.parent
COPIED = ("csrc", "distil_fast", "kernels", "tests", "CMakeLists.txt", "pyproject.toml")
QUICK = (
    "functional",
    "row_loss",
    "row_loss_options",
    "topk",
    "topk_checks",
    "ops",
    "inplace",
    "triple_loss",
    "accumulation",
    "checks",
    "gradients",
    "regressions",
)
TESTS = [f"tests/test_{name}.py" for name in (*QUICK, "softmax", "cosine", "pairs", "hidden", "row_loss_values")]
TIME_LIMIT = 400.0  # seconds for the tests of one mutant; what takes longer hangs


@dataclass(frozen=True)
class Mutant:
    """Replacements in one file: each text, whatever its white space, must occur exactly once."""

    name: str
    file: str
    replacements: tuple[tuple[str, str], ...]


def mutant(name: str, file: str, *replacements: str) -> Mutant:
    """Of old and new texts in turn."""
    return Mutant(name, file, tuple(zip(replacements[::2], replacements[1::2], strict=True)))


ROW_LOSS, SWEEPS, DIVERGENCES = "csrc/cpu/row_loss.cpp", "csrc/cpu/sweeps.h", "csrc/divergences.h"
SHARES, SOFTMAX, PAIR = "csrc/cpu/shares.h", "csrc/cpu/softmax.h", "csrc/cpu/pair.h"
PAIRS, PAIR_LOSS, HIDDEN = "csrc/pairs.h", "csrc/cpu/pair_loss.cpp", "distil_fast/hidden.py"
ROW_CALL, TOPK, OUTCOMES = "csrc/cpu/row_call.h", "csrc/cpu/topk.cpp", "csrc/cpu/topk_outcomes.h"
HARD, PREPARE, SCRATCH = "csrc/cpu/hard_term.h", "csrc/cpu/prepare.h", "csrc/cpu/row_scratch.h"
NATIVE, OPS, FUNCTIONAL = "distil_fast/backends/native.py", "distil_fast/ops.py", "distil_fast/functional.py"

MUTANTS = [
    # ---- the gradient
    mutant("zero gradient", ROW_LOSS, "{soft_w / unit_, hard_w / unit_}", "{0.0, 0.0}"),
    mutant(
        "half gradient", ROW_LOSS, "{soft_w / unit_, hard_w / unit_}", "{0.5 * soft_w / unit_, 0.5 * hard_w / unit_}"
    ),
    mutant(
        "projection dropped: sum of g is 0", ROW_LOSS, "soft_[row] = f; return g;", "soft_[row] = f; return 0.0 * g;"
    ),
    mutant("-1 at the label dropped", HARD, "return smoothing_ + constant()", "return 1.0 + smoothing_ + constant()"),
    mutant("no label smoothing in the gradient", HARD, "-smoothing_ / static_cast<double>(cols_)", "-0.0 * smoothing_"),
    mutant("no z-loss in the gradient at the label", HARD, "(z_slope() * own_ - rest_)", "(0.0 - rest_)"),
    mutant(
        "no soft weight in the gradient", ROW_CALL, "share * c_.soft_weight * upstream(row)", "share * upstream(row)"
    ),
    mutant("upstream gradient of row 0 for all", ROW_CALL, "(c_.upstream)[row]", "(c_.upstream)[row * 0]"),
    mutant("unused rows' gradient not written", ROW_LOSS, "std::memset(out, 0, c_.cols * size_);", ""),
    mutant("grad_output ignored", NATIVE, "factor = grad_output.item() * unit", "factor = unit"),
    mutant("fp16 unit not applied", NATIVE, "factor = grad_output.item() * unit", "factor = grad_output.item()"),
    mutant("no version bump in place", OPS, "torch.autograd.graph.increment_version(student)", "pass"),
    # ---- the formulae
    mutant(
        "T dropped from the exponent",
        SWEEPS,
        "V e = at_t(sj - ref_s), u = at_t(tj - ref_t);",
        "V e = at_one(sj - ref_s), u = at_one(tj - ref_t);",
    ),
    mutant("T^2 dropped", ROW_CALL, "share * t * t", "share"),
    mutant(
        "KL turned round",
        DIVERGENCES,
        "X(forward_kl, ForwardKL) \\ X(reverse_kl, ReverseKL)",
        "X(forward_kl, ReverseKL) X(reverse_kl, ForwardKL)",
    ),
    mutant("JSD's beta swapped", DIVERGENCES, "b = V(beta), c = V(1.0 - beta)", "b = V(1.0 - beta), c = V(beta)"),
    mutant(
        "r as the difference of two rounded logarithms",  # of the size of log p: 10
        SWEEPS,
        "V r = fms(load(difference + j), inverse_t, rho);",
        "V r = (fms(load(difference + j), inverse_t, rho) + V(10)) - V(10);",
    ),
    mutant("p - q by subtraction where they are close", DIVERGENCES, "p * (r + tail), gap)}", "gap, gap)}"),
    mutant("skewed KL with alpha and 1 - alpha swapped", DIVERGENCES, "mixture(alpha, r)", "mixture(1.0 - alpha, r)"),
    mutant(
        "alpha-beta's parameters swapped", DIVERGENCES, "double alpha, beta, centre;", "double beta, alpha, centre;"
    ),
    # ---- transforms and forms of teacher
    mutant("softcap's slope dropped", PREPARE, "(scale * tanh_slope(x * to_unit))", "scale"),
    mutant(
        "a masked column capped", PREPARE, "select(x < lowest, x, cap * tanh(x * to_unit))", "cap * tanh(x * to_unit)"
    ),
    mutant("log-probabilities not times T", ROW_LOSS, "Prepare{t, 0.0,", "Prepare{1.0, 0.0,"),
    mutant(
        "a teacher's mass not checked",
        ROW_LOSS,
        "if (mass <= mass_limit(c_.teacher.dtype)) return false;",
        "if (mass == mass || mass != mass) return false;",
    ),
    # ---- rows, blocks, columns
    mutant(
        "tail columns dropped",
        SWEEPS,
        "if (whole < n) step(whole, load(s + whole, n - whole, none), load(t + whole, n - whole, none));",
        "",
    ),
    mutant(
        "blocks' references ignored",
        SCRATCH,
        "block_ref == row_ref ? 1.0 : std::exp((block_ref - row_ref) / t)",
        "block_ref == row_ref ? 1.0 : t / t",
    ),
    mutant(
        "wrong row stride", "csrc/cpu/dispatch.h", "row % inner * m.row_stride", "row % inner * m.outer_stride / inner"
    ),
    # ---- masks, labels and denominators
    mutant("mask ignored", SHARES, "if (!data) return 1.0;", "if (row >= 0) return 1.0;"),
    mutant(
        "ignore_index ignored",
        SHARES,
        "if (label == labels.ignore_index) continue;",
        "if (label == -100) continue;",
        "if (data[row] == ignore_index) return 0.0;",
        "if (data[row] == -100) return 0.0;",
    ),
    mutant("class weights missing from the denominator", SHARES, "*counted += labels[row];", "*counted += 1.0;"),
    mutant(
        "the terms' denominators swapped",
        ROW_CALL,
        "scale_of(c_.reduction, c_.soft_count, tokens)",
        "scale_of(c_.reduction, c_.soft_count, labelled)",
        "scale_of(c_.reduction, c_.hard_count, labelled)",
        "scale_of(c_.reduction, c_.hard_count, tokens)",
    ),
    mutant(
        "ignored rows in the denominator",
        ROW_CALL,
        "scale_of(c_.reduction, c_.hard_count, labelled)",
        "scale_of(c_.reduction, c_.hard_count, double(rows_))",
    ),
    mutant("a given count ignored", SHARES, "given_count >= 0 ? given_count : counted", "counted"),
    mutant("negative labels not refused", SHARES, "label < 0 || label >= cols", "label >= cols"),
    mutant(
        "DistilBERT's cosine over the labels",
        FUNCTIONAL,
        "student_hidden, teacher_hidden, attention, cos_count",
        "student_hidden, teacher_hidden, labels != -100, cos_count",
    ),
    # ---- a top-k teacher
    mutant("ids left in the tail", TOPK, "put_at_ids(w.es, 0.0);", ""),
    mutant("a faint tail lost", TOPK, "if (!(z < faint) || e.found->n == c_.cols)", "if (z == z || z != z)"),
    mutant(
        "ids that stand twice unnoticed", TOPK, "if (seen[ids[i] / 64] & bit)", "if (seen[ids[i] / 64] & bit & ~bit)"
    ),
    mutant("teacher not renormalised over the ids", OUTCOMES, "ref_p + std::log(z_p))", "0.0 * z_p * ref_p)"),
    mutant("a truncated sum with the divergence's shift", OUTCOMES, "call_.shift - over.centre", "0.0 * over.centre"),
    mutant(
        "mass that rounding took away as an outcome", OUTCOMES, "!(outside.z == 0.0 && missing <= negligible)", "true"
    ),
    # ---- softmax and cosine
    mutant("softmax backward without its sum", SOFTMAX, "return yj * (gj - all) * scale;", "return yj * gj * scale;"),
    mutant(
        "log_softmax backward without its sum", SOFTMAX, "return (gj - at_one(yj) * all) * scale;", "return gj * scale;"
    ),
    mutant("cosine gradient without its projection", PAIR, "b * (sj * is)); };", "V(0) * b); };"),
    # ---- squared distance and KL of probabilities
    mutant("half the squared distance's gradient", PAIRS, "return {e * e, V(0), e + e};", "return {e * e, V(0), e};"),
    mutant(
        "masked in one taken for masked in both",
        PAIRS,
        "select(s < V(lowest), t, V(0))",
        "select(s < V(lowest), s, V(0))",
    ),
    mutant("KL's first order dropped", PAIRS, "select(close, p - q, V(0))", "V(0)"),
    mutant("KL's first order summed in floats", PAIR, "lost = lost + ((whole - (next - back)) + (x - back));", ""),
    mutant("KL by two logarithms where they are close", PAIRS, "abs(x) < V(0.25)", "abs(x) < V(0)"),
    mutant("a probability of 0 is no exception", PAIRS, "auto none = is_zero(p);", "auto none = is_zero(p + V(1));"),
    mutant("tiny probabilities count as zero", PAIR_LOSS, "KeepSubnormals keep;", ""),
    mutant(
        "scale dropped from the gradient",
        PAIR_LOSS,
        "c_.weight * c_.scale * upstream(row)",
        "c_.weight * upstream(row)",
    ),
    mutant(
        "scale dropped from the fp16 unit", PAIR_LOSS, "(share(row) * c_.weight * c_.scale)", "(share(row) * c_.weight)"
    ),
    mutant(
        "a pair's last entries dropped",
        PAIR,
        "V g = step(load(s + whole, n - whole, 0.0)",
        "V g = step(V(0) * load(s + whole, n - whole, 0.0)",
    ),
    mutant(
        "layers of the map swapped",
        HIDDEN,
        "student, teacher = student_states[s], teacher_states[t]",
        "student, teacher = student_states[t], teacher_states[s]",
    ),
    mutant("heads multiply the loss", HIDDEN, "queries * student.shape[1]", "queries"),
    mutant("no mean over layers of attention", HIDDEN, "weight = 1.0 / len(layers)\n", "weight = 1.0\n"),
]


class ScriptError(Exception):
    """The script cannot do its work: a text that is not there, code that does not compile, tests that do not start."""


def mutated(source: str, mutant: Mutant) -> str:
    for old, new in mutant.replacements:
        pattern = r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", old)))
        source, count = re.subn(pattern, lambda _, new=new: new, source)
        if count != 1:
            raise ScriptError(f"{mutant.name}: {old!r} occurs {count} times in {mutant.file}, expected once")
    return source


class Copy:
    """A copy of the repository, with a build of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            elif source.exists():
                shutil.copy(source, folder / name)
        # an editable install finds its package before PYTHONPATH is asked
        (folder / "sitecustomize.py").write_text(
            "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
        )
        scripts = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",  # a mutant's replacement may have the length and the second of the original
        }
        pybind11 = self.run([sys.executable, "-m", "pybind11", "--cmakedir"]).strip()
        options = [
            "SKBUILD=ON",
            "CMAKE_BUILD_TYPE=Release",
            "DISTIL_FAST_CUDA=OFF",
            f"Python_EXECUTABLE={sys.executable}",
            f"pybind11_DIR={pybind11}",
        ]
        ninja = ["-G", "Ninja"] if shutil.which("ninja", path=self.environment["PATH"]) else []
        self.run(["cmake", "-S", ".", "-B", "build", *ninja, *(f"-D{option}" for option in options)])
        self.build()
        where = self.run([sys.executable, "-c", "import distil_fast._C as c; print(c.__file__)"]).strip()
        if not Path(where).is_relative_to(folder.resolve()):
            raise ScriptError(f"the tests would import {where}, not the copy")

    def run(self, command: list[str]) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise ScriptError(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-3000:]}")
        return done.stdout

    def build(self) -> None:
        self.run(["cmake", "--build", "build", "--parallel", "1"])
        for module in (self.folder / "build").glob("_C*.so"):
            target = self.folder / "distil_fast" / module.name
            target.unlink(missing_ok=True)
            shutil.copy(module, target)

    @contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        """The mutant in place of the original, which returns afterwards."""
        path = self.folder / mutant.file
        original = path.read_text()
        path.write_text(mutated(original, mutant))
        try:
            self.build()  # of a Python file too: the module may still hold the mutant before
            yield
        finally:
            path.write_text(original)

    def killer(self) -> str | None:
        """The first test to fail, None if all pass."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-rf", *TESTS]
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=TIME_LIMIT
            )
        except subprocess.TimeoutExpired:
            return "hung"
        failed = re.search(r"^FAILED tests/(\S+)", done.stdout, re.MULTILINE)
        if done.returncode == 0:
            return None
        if done.returncode < 0:
            return f"crashed with signal {-done.returncode}"
        if failed is None:
            raise ScriptError(f"pytest did not get as far as a test:\n{(done.stdout + done.stderr)[-3000:]}")
        return failed[1]


def main(wanted: list[str]) -> int:
    chosen = [m for m in part(MUTANTS) if not wanted or any(word in m.name for word in wanted)]
    for m in MUTANTS:  # a stale text is found before a minute is spent
        mutated((ROOT / m.file).read_text(), m)
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        start = time.monotonic()
        copy = Copy(Path(folder))
        if (failed := copy.killer()) is not None:
            raise ScriptError(f"without any mutant the tests must pass, but {failed}")
        print(f"{'(none)':46} passes{time.monotonic() - start:8.1f} s", flush=True)
        for m in chosen:
            start = time.monotonic()
            with copy.planted(m):
                killed_by = copy.killer()
            survivors += [] if killed_by else [m.name]
            verdict = f"killed by {killed_by}" if killed_by else "SURVIVED"
            print(f"{m.name:46} {time.monotonic() - start:6.1f} s  {verdict}", flush=True)
    print(
        f"{len(chosen) - len(survivors)} of {len(chosen)} mutants killed"
        + "".join(f"\nsurvived: {s}" for s in survivors)
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ScriptError as error:
        sys.exit(f"mutants.py: {error}")
