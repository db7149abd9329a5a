"""Everything that only a GPU can tell, in one command on a machine that has one:

    python benchmarks/on_device.py [build test sanitize bench] [--output FOLDER] [--wheels FOLDER] [--quick]

Builds with CUDA into a folder of its own, runs the suite there with tensors on the GPU, each kernel under
compute-sanitizer, then the benchmark; `device.json` tells what ran, on what, and how it ended, with the logs and the
benchmark's JSON and picture beside it. Needs no network: what is missing (liger-kernel, scikit-build-core, rich,
matplotlib, hypothesis) is installed from --wheels. It knows no kernel. Next: every_kernel.py; docs/gpu_status.md,
which is written from what this leaves behind.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGE = ROOT / "build" / "on_device"
BACKENDS = ("cuda", "triton")
TESTS = [f"tests/test_{name}.py" for name in ("row_loss", "row_loss_values", "regressions")]
SANITIZERS = ("memcheck", "racecheck", "initcheck")
STEPS = ("build", "test", "sanitize", "bench")
TAIL = 4000  # characters of a log that the summary keeps


class Runner:
    """Runs commands in the stage, keeps their logs, and writes the summary after each."""

    def __init__(self, output: Path) -> None:
        self.output = output
        output.mkdir(parents=True, exist_ok=True)
        self.summary_file = output / "device.json"
        self.summary = json.loads(self.summary_file.read_text()) if self.summary_file.exists() else {"steps": {}}

    def run(self, step: str, command: list[str], folder: Path = STAGE, **environment: str) -> bool:
        print(f"--- {step}: {' '.join(command)}", flush=True)
        start = time.monotonic()
        with (self.output / f"{step.split()[0]}.log").open("a") as log:
            print(f"--- {step}: {' '.join(command)}", file=log, flush=True)
            done = subprocess.run(
                command, cwd=folder, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            text = done.stdout.decode(errors="replace")
            log.write(text)
        print(text[-TAIL:], flush=True)
        self.summary["steps"][step] = {
            "status": done.returncode,
            "seconds": round(time.monotonic() - start, 1),
            "environment": environment,
            "end": text[-TAIL:],
        }
        self.save()
        return done.returncode == 0

    def save(self) -> None:
        self.summary_file.write_text(json.dumps(self.summary, indent=1) + "\n")


def build(runner: Runner, wheels: Path | None) -> bool:
    """The package with its CUDA module, its tests and what they need, side by side in the stage."""
    shutil.rmtree(STAGE, ignore_errors=True)
    STAGE.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(STAGE)]
    files = sorted(map(str, wheels.glob("*.whl"))) if wheels else []
    if files and not runner.run("build wheels", [*pip, "--no-index", *files], ROOT):
        return False
    found = runner.run("build package", [*pip, "--no-build-isolation", "."], ROOT, PYTHONPATH=str(STAGE))
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, STAGE / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", STAGE)
    return found


def describe(runner: Runner) -> bool:
    """The device, the versions and the commit, as the staged package sees them."""
    script = (
        "import json, torch; from distil_fast import backends; from distil_fast.bench import machine\n"
        "serving = backends.serving('cuda', torch.bfloat16)\n"
        "print(json.dumps({**machine.describe(), 'serving': serving, 'package': backends.__file__}))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=STAGE, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return False
    found = json.loads(done.stdout.splitlines()[-1])
    if not Path(found.pop("package")).is_relative_to(STAGE):
        print(f"Another distil_fast comes before the one in {STAGE}; uninstall it from this Python.", file=sys.stderr)
        return False
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    runner.summary["machine"] = {**found, "commit": commit or None}
    runner.summary["date"] = time.strftime("%Y-%m-%d")
    runner.save()
    return True


def test(runner: Runner) -> bool:
    """The CPU's test matrix with its tensors on the GPU, once for each backend."""
    pytest = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider", *TESTS]
    ended = [
        runner.run(
            f"test {name}",
            pytest,
            DISTIL_FAST_TEST_DEVICE="cuda",
            DISTIL_FAST_BACKEND=name,
            DISTIL_FAST_CHECK="1",  # values at fault raise, as the tests expect of the CPU
        )
        for name in BACKENDS
    ]
    return all(ended)


def sanitize(runner: Runner) -> bool:
    """Every kernel under each tool of compute-sanitizer."""
    watched = [sys.executable, "benchmarks/every_kernel.py"]
    ended = [
        runner.run(
            f"sanitize {tool} {name}",
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *watched],
            DISTIL_FAST_BACKEND=name,
            PYTHONPATH=str(STAGE),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # so that the end of a tensor is the end of an allocation
        )
        for tool in SANITIZERS
        for name in BACKENDS
    ]
    return all(ended)


def bench(runner: Runner, quick: bool) -> bool:
    """The benchmark's GPU suite."""
    options = [*(["--quick"] if quick else []), "--json", str(runner.output / "gpu.json")]
    options += ["--png", str(runner.output / "gpu.png")]
    return runner.run("bench", [sys.executable, "-m", "benchmarks", "gpu", *options])


def main() -> int:
    parser = argparse.ArgumentParser(description="What only a GPU can tell.")
    parser.add_argument("steps", nargs="*", default=list(STEPS), metavar="STEP", help=f"of {', '.join(STEPS)}; all")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "on_device")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install beside the package")
    parser.add_argument("--quick", action="store_true", help="the main cases of the benchmark only")
    arguments = parser.parse_args()
    if unknown := set(arguments.steps) - set(STEPS):
        parser.error(f"expected steps of {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    runner = Runner(arguments.output.resolve())
    if ("build" in arguments.steps or not STAGE.exists()) and not build(runner, arguments.wheels):
        return 1
    if not describe(runner):
        return 1
    good = True
    for name, step in (("test", test), ("sanitize", sanitize), ("bench", lambda r: bench(r, arguments.quick))):
        if name in arguments.steps:
            good = step(runner) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
