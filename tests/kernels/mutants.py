"""Plants wrong kernels, one at a time, in a copy of kernels/: the interpreter's tests must fail for each.

    python tests/kernels/mutants.py [part of a name ...]

The repository is not touched: a finder in each process of tests hands out the copy. Next: MUTANTS below;
test_mutants.py, which runs it all.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TIME_LIMIT = 170.0  # seconds for the tests of one mutant

# Run in the process of the tests: the modules of distil_fast.kernels come from the folder named first.
START = """
import importlib.util, pathlib, sys, pytest
folder, *arguments = sys.argv[1:]
class Copy:
    @staticmethod
    def find_spec(name, path=None, target=None):
        package, _, module = name.rpartition(".")
        if package != "distil_fast.kernels":
            return None
        return importlib.util.spec_from_file_location(name, pathlib.Path(folder, module + ".py"))
sys.meta_path.insert(0, Copy)
import distil_fast.kernels.rows as rows
assert rows.__file__.startswith(folder), rows.__file__
sys.exit(pytest.main(arguments))
"""


@dataclass(frozen=True)
class Mutant:
    """One replacement in one file; the old text must occur exactly once."""

    name: str
    file: str
    old: str
    new: str
    tests: str = "row_loss"


MUTANTS = [
    Mutant("KL's sign turned", "divergences", "gap = q - p", "gap = p - q"),
    Mutant("KL turned round", "divergences", '"forward_kl": forward_kl', '"forward_kl": reverse_kl'),
    Mutant("p - q by subtraction where close", "divergences", "tl.where(close, p * (r + tail), gap)", "gap"),
    Mutant(
        "JSD's beta swapped",
        "divergences",
        "tl.where(q_larger, first, other)",
        "tl.where(q_larger, other, first)",
    ),
    Mutant("TwoSum dropped", "maths", "tl.where(lost == lost, lost, 0.0)", "0.0"),
    Mutant("T dropped from the sums", "rows", "k = (1.0 / temperature) * LOG2E", "k = LOG2E"),
    Mutant("T dropped from the gradient", "rows", "soft_weight_ * scale * inverse_t", "soft_weight_ * scale"),
    Mutant("T^2 dropped", "prologue", "share *= t * t", "share *= 1.0"),
    Mutant("projection dropped", "rows", "of_g * (g - q * g_sum)", "of_g * g"),
    Mutant(
        "1 - p by subtraction",
        "rows",
        "weight * (how[0] - (rest - pull * own) / z)",
        "weight * (how[0] + (own * (1.0 + pull) / z - 1.0))",
    ),
    Mutant("smoothing dropped from the gradient", "rows", "- weight * how[0] / cols", ""),
    Mutant("square taken for the exponential", "sums", "tl.where(kind == SQUARE, e * e, e)", "e"),
    Mutant("maxima not merged", "sums", "z * tl.exp2((m - top) * k) + tl.sum(tl.exp2", "z + tl.sum(tl.exp2"),
    Mutant(
        "tail mask missing",
        "tiles",
        "inside = (first >= lead) & (first + VEC <= lead + cols)",
        "inside = (first >= lead) & (first < lead + cols)",
    ),
    Mutant(
        "head mask missing",
        "tiles",
        "inside = (first >= lead) & (first + VEC <= lead + cols)",
        "inside = first + VEC <= lead + cols",
    ),
    Mutant("ends of rows dropped", "tiles", "(once & ~whole)[:, None]", "(once & ~whole & (end > 1))[:, None]"),
    Mutant("a single group counted twice", "tiles", "once = (end == 0) | (last > 0)", "once = end >= 0"),
    Mutant(
        "offsets of 32 bits",
        "tiles",
        "start.to(tl.int64) + (row // inner) * outer_stride + (row % inner) * row_stride",
        "start + ((row // inner) * outer_stride + (row % inner) * row_stride).to(tl.int32)",
    ),
    Mutant("ignore_index ignored", "prologue", "given = inside & (label != ignore_index)", "given = inside"),
    Mutant(
        "a term's denominator swapped",
        "prologue",
        "hard_share = weight * hard_scale",
        "hard_share = weight * soft_scale",
    ),
    Mutant("a given count ignored", "prologue", "given = tl.where(given < 0.0, counted, given)", "given = counted"),
    Mutant("fp16 unit not applied", "rows", "scale = 1.0 / tl.load(unit)", "scale = 1.0"),
    Mutant(
        "no soft weight in the gradient", "prologue", "soft_share * scalar(soft_weight) * factor", "soft_share * factor"
    ),
    Mutant(
        "upstream ignored",
        "prologue",
        "factor *= tl.load(upstream + row, mask=inside, other=0.0).to(tl.float32)",
        "factor *= 1.0",
    ),
    Mutant("negative labels pass", "prologue", "((label < 0) | (label >= cols))", "(label >= cols)", "conventions"),
    Mutant(
        "rows at fault share nothing",
        "prologue",
        'tl.where(fault_here & has_hard, float("nan"), hard_share)',
        "tl.where(fault_here, 0.0, hard_share)",
        "conventions",
    ),
    Mutant(
        "unused rows' gradient not written",
        "rows",
        "    elif grad is not None:\n        write_zeros(grad, row_start",
        "    elif rows < 0:\n        write_zeros(grad, row_start",
        "conventions",
    ),
    Mutant(
        "unused rows' soft gradient not left out",
        "rows",
        "x = tl.where(used, of_g * (g - q * g_sum), 0.0)",
        "x = of_g * (g - q * g_sum) + 0.0 * tl.where(used, 0.0, t)",
        "conventions",
    ),
    Mutant(
        "0 times infinity", "maths", "tl.where(weight == 0.0, 0.0, weight * factor)", "weight * factor", "conventions"
    ),
    Mutant(
        "mixture: alpha swapped",
        "divergences",
        "weight + other * ratio, 1.0 + excess",
        "other + weight * ratio, 1.0 + excess",
    ),
    Mutant("skewed: 1 - alpha once", "divergences", "times(other * other * gap", "times(other * gap"),
    Mutant(
        "alpha-beta: exponents swapped",
        "divergences",
        "tl.where(r > 0.0, first, second), tl.where(r > 0.0, second, first)",
        "tl.where(r > 0.0, second, first), tl.where(r > 0.0, first, second)",
    ),
    Mutant("Hellinger by subtraction", "divergences", "less = expm1(h)", "less = exp(h) - 1.0"),
    Mutant(
        "z-loss dropped from the gradient", "rows", "times(z_loss, 2.0 * lse)", "times(z_loss, 0.0 * lse)", "options"
    ),
    Mutant(
        "class weights not counted",
        "prologue",
        "labelled += weight",
        "labelled += tl.where(weight != 0.0, 1.0, 0.0)",
        "options",
    ),
    Mutant(
        "the cap's slope by subtraction",
        "transforms",
        "y = 4.0 * factor * cap * e / ((1.0 + e) * (1.0 + e))",
        "t = tanh(factor * x)\n        y = factor * cap * (1.0 - t * t)",
        "options",
    ),
    Mutant(
        "tanh by subtraction", "transforms", "e = expm1(-2.0 * tl.abs(x))", "e = exp(-2.0 * tl.abs(x)) - 1.0", "options"
    ),
    Mutant(
        "log-probabilities not multiplied by T", "rows", "of_t = temperature", "of_t = t_factor * 0.0 + 1.0", "options"
    ),
    Mutant(
        "probabilities above 1 pass",
        "faults",
        "return ~(mass <= 1.0 + rounding_of(teacher))",
        "return mass != mass",
        "options",
    ),
    Mutant(
        "top-k: a tail without its last digits",
        "topk",
        "top, z_out = outside",
        "top, z_out = outside\n    z_out = (z_out + 1e4) - 1e4",
        "topk",
    ),
    Mutant("top-k: entries not left out", "topk", "ordered += 1\n", "ordered += 2\n", "topk"),
    Mutant(
        "top-k: an entry in the last group not left out", "topk", "entries > 0, float", "entries > 1, float", "topk"
    ),
    Mutant(
        "top-k: ignored tail keeps the shift",
        "topk",
        "value -= shift * (q_ids - p_sum).to(tl.float32)",
        "value -= 0.0 * shift",
        "topk",
    ),
    Mutant(
        "top-k: entries' gradient not written",
        "topk",
        "x.to(grad.dtype.element_ty), mask=valid)",
        "x.to(grad.dtype.element_ty), mask=valid & (column < 0))",
        "topk",
    ),
    Mutant("top-k: duplicates pass", "order", "(valid & (same > 0))", "(valid & (same > 99))", "topk"),
    Mutant(
        "top-k: r in float",
        "topk",
        "(s.to(tl.float64) - ref.to(tl.float64)) / wide_t\n    e =",
        "(s - ref).to(tl.float64) / wide_t\n    e =",
        "topk",
    ),
    Mutant("softmax: projection dropped", "softmax", "y * (u - total) * inverse_t", "y * u * inverse_t", "softmax"),
    Mutant(
        "log_softmax: T dropped", "softmax", "(x - ref) * inverse_t - tl.log(z)", "(x - ref) - tl.log(z)", "softmax"
    ),
    Mutant(
        "cosine: 1 - cos by subtraction", "cosine", "value = 0.5 * (ee + EPS / ss + EPS / tt)", "value = -ue", "softmax"
    ),
    Mutant("cosine: along u dropped", "cosine", "of_u = of_e * (EPS / ss - ue)", "of_u = of_e * 0.0", "softmax"),
    Mutant("half the squared distance's gradient", "pairs", "e * e, 0.0, e + e", "e * e, 0.0, e", "pairs"),
    Mutant(
        "masked in one taken for masked in both",
        "pairs",
        '(s == float("-inf")) & (t == float("-inf"))',
        '(s == float("-inf"))',
        "pairs",
    ),
    Mutant("KL's first order dropped", "pairs", "tl.where(close, p - q, 0.0)", "0.0 * p", "pairs"),
    Mutant("KL by two logarithms", "pairs", "close = tl.abs(x) < 0.25", "close = tl.abs(x) < 0.0", "pairs"),
    Mutant("a probability of 0 is no exception", "pairs", "none = p == 0.0", "none = p < 0.0", "pairs"),
    Mutant(
        "nan in the bits of a logarithm",
        "pairs",
        "log(quotient) + shift, quotient)",
        "log(quotient) + shift, 1.0)",
        "pairs",
    ),
    Mutant("tiny probabilities as they are", "pairs", "tl.where(small_q, q * 18446744073709551616.0, q)", "q", "pairs"),
    Mutant("the scale dropped from the gradient", "pairs", "of_g = row_weight * scale", "of_g = row_weight", "pairs"),
    Mutant("a pair's unit not applied", "pairs", "of_g = of_g / tl.load(unit)", "of_g = of_g * 1.0", "pairs"),
    Mutant("rescale without the unit", "rescale", "scalar(grad_output) * scalar(unit)", "scalar(grad_output) * 1.0"),
]


def survives(mutant: Mutant) -> bool:
    """Whether all tests pass with the mutant planted."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = Path(folder) / "kernels"
        shutil.copytree(ROOT / "kernels", kernels, ignore=shutil.ignore_patterns("__pycache__"))
        path = kernels / f"{mutant.file}.py"
        text = path.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.name}: {text.count(mutant.old)} places in {path.name}"
        path.write_text(text.replace(mutant.old, mutant.new))
        tests = ["-q", "-x", "-W", "ignore::RuntimeWarning", f"tests/kernels/interpreted_{mutant.tests}.py"]
        done = subprocess.run(
            [sys.executable, "-c", START, str(kernels), *tests],
            cwd=ROOT,
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
        )
    crashed = done.returncode == -signal.SIGSEGV  # on what an address out of bounds holds
    assert crashed or done.returncode in (0, 1), done.stdout + done.stderr  # anything else is no verdict
    assert crashed or " passed" in done.stdout or "FAILED" in done.stdout, done.stdout + done.stderr
    return done.returncode == 0


def main(names: list[str]) -> int:
    survivors = []
    for mutant in MUTANTS:
        if names and not any(name in mutant.name for name in names):
            continue
        start = time.monotonic()
        lives = survives(mutant)
        print(f"{'SURVIVES' if lives else 'caught':9} {mutant.name}  ({time.monotonic() - start:.0f} s)", flush=True)
        survivors += [mutant.name] * lives
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
