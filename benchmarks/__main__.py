"""`python -m benchmarks loss ...` in a checkout is `distil-fast bench loss ...`. Next: distil_fast/bench."""

from __future__ import annotations

import argparse
import sys

from distil_fast import bench

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="The benchmark of distil_fast.")
    bench.add_arguments(parser)
    sys.exit(bench.run(parser.parse_args()))
