"""Looks into each wheel of dist/, and uses it in a fresh environment outside of the source tree.

The wheel of this interpreter finds the torch that is installed here; the others are loaded without, or with one of
their own: `--torch torch==2.13.0` (a download each). Next: use_wheel.py for the use, build_wheels.py for the building.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import build_wheels

ROOT = build_wheels.ROOT
# older systems than the one of the tag are not to be had here; newer ones than this would be a surprise
TAG = re.compile(r"distil_fast-[\w.]+-cp(3\d+)-cp\1-manylinux_2_(\d+)_\w+\.whl")
NEWEST_GLIBC = 36
WANTED = (
    "distil_fast/py.typed",
    "distil_fast/_C.pyi",
    "distil_fast/kernels/rows.py",
    "distil_fast/training/html_page.css",
    "distil_fast/bench/html_report.css",
    "distil_fast/training/presets/distilbert.yaml",
    "distil_fast/training/presets/short.yaml",
)
FOREIGN = re.compile(r"(^|/)(tests?|csrc|examples|docs|\.ci)/|\.(o|cpp|cu|h|pyc)$|lib(gomp|torch|c10|stdc)|\.libs/")


def check_contents(wheel: Path) -> None:
    """What is in it, what is not, and that nothing tells where it was built."""
    tag = TAG.fullmatch(wheel.name)
    assert tag, f"{wheel.name}: expected a manylinux tag of one CPython"
    assert int(tag[2]) <= NEWEST_GLIBC, wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert not [name for name in names if FOREIGN.search(name)], [name for name in names if FOREIGN.search(name)]
        assert not set(WANTED) - set(names), f"{wheel.name} lacks {set(WANTED) - set(names)}"
        sources = {f"distil_fast/{path.relative_to(ROOT / 'distil_fast')}" for path in python_files("distil_fast")}
        sources |= {f"distil_fast/kernels/{path.relative_to(ROOT / 'kernels')}" for path in python_files("kernels")}
        held = {name for name in names if name.endswith(".py")}
        assert held == sources, f"{wheel.name}: {sorted(held ^ sources)}"
        (native,) = (name for name in names if name.endswith(".so"))
        code = archive.read(native)
        for place in (ROOT, Path.home(), Path(sys.base_prefix), Path(tempfile.gettempdir())):
            found = re.search(re.escape(str(place).encode()) + rb"/[\x20-\x7e]*", code)
            assert not found, f"{wheel.name}: {native} holds {found and found[0]}"
        for name in held:
            assert str(ROOT).encode() not in archive.read(name), f"{wheel.name}: {name} holds {ROOT}"
    print(f"wheel: {wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB")


def python_files(folder: str) -> list[Path]:
    return list((ROOT / folder).rglob("*.py"))


def use(wheel: Path, python: Path, torch: str | None) -> None:
    """In an environment that ends with this call."""
    with tempfile.TemporaryDirectory(prefix="distil_fast-") as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        clean = Path(folder) / "bin" / "python"
        if torch:
            subprocess.run([clean, "-m", "pip", "install", "-q", torch, "numpy"], check=True)
        elif python == Path(sys.executable):
            # a folder that a .pth names is searched, but its own .pth files, the editable install's, are not obeyed
            (site,) = Path(folder).glob("lib/python*/site-packages")
            (site / "installed_here.pth").write_text("\n".join(site_packages()))
        subprocess.run([clean, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
        subprocess.run([clean, "-I", ROOT / ".ci" / "use_wheel.py"], cwd=folder, check=True)


def site_packages() -> list[str]:
    """Where torch is: here, or beneath, for an environment that sees the system's packages."""
    import torch

    return sorted({sysconfig.get_paths()["purelib"], str(Path(torch.__file__).parent.parent)})


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks the wheels of dist/.")
    parser.add_argument("--torch", metavar="REQUIREMENT", help="install this into each fresh environment")
    given = parser.parse_args()
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    assert wheels, "no wheel in dist/: make wheel"
    pythons = build_wheels.interpreters()
    for wheel in wheels:
        check_contents(wheel)
        minor = int(re.findall(r"-cp3(\d+)-", wheel.name)[0])
        use(wheel, pythons[minor], given.torch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
