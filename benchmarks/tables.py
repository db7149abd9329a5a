"""The tables of README.md and docs/, made of the committed runs: `python -m benchmarks.tables`, `--check` to compare.

Of each suite the newest run that has all of a table's rows is shown, and named below it. A new table is an entry of
TABLES, and a place with its name in a page of PAGES. It measures nothing. Next: marks.py; distil_fast/bench/results.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import marks
from distil_fast.bench import hosts, integrations, results
from distil_fast.bench.results import Results, Row
from distil_fast.bench.tables import MIB, number
from distil_fast.bench.train_cases import BERT_BASE, DISTILBERT, LOSS_ALONE, MASKING, PARAMETERS, PARTS, SYNCS, TOKENS

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/results.md", "docs/performance.md", "docs/integrations.md")
NOT_YET = "Not measured yet."

IN_PLACE = "KL+CE fp32 512x30522 in place T=2"
LOSS = {
    "fp32 512 x 30522, in place": IN_PLACE,
    "the same, fresh gradient": "KL+CE fp32 512x30522 fresh T=2",
    "bf16 512 x 30522, in place": "KL+CE bf16 512x30522 in place T=2",
    "fp32 128 x 151936, in place": "KL+CE fp32 128x151936 in place T=2",
}
HEADS = {
    "fp32, H = 384": "linear KL+CE fp32 1024x30522 H=384",
    "fp32, H = 768": "linear KL+CE fp32 1024x30522 H=768",
    "bf16, H = 384": "linear KL+CE bf16 1024x30522 H=384",
    "bf16, H = 768": "linear KL+CE bf16 1024x30522 H=768",
}
VOCABULARIES = {
    f"fp32, N = 512, V = {cols}, H = 384": f"linear KL+CE fp32 512x{cols} H=384"
    for cols in (30522, 50257, 128256, 151936)
}
DIVERGENCES = {
    f"{title}, {dtype}": f"{problem} {dtype} 512x30522{rest}"
    for dtype in ("fp32", "bf16")
    for title, problem, rest in (
        ("JSD, beta = 0.5", "JSD", ""),
        ("soft cross-entropy", "soft CE", ""),
        ("reverse KL", "reverse KL", ""),
        ("KL, T = 2", "KL", " fresh T=2"),
    )
}
RAGGED = "train fp32 8x128 ragged, 6 to 3 layers of 384"
ENCODERS = ("encoder fp32 1x32", "encoder fp32 1x128")


class Run(NamedTuple):
    """A committed run, and its file."""

    path: Path
    results: Results

    @property
    def suite(self) -> str:
        return self.results.command.removeprefix("distil-fast bench ").split()[0]

    def row(self, case: str, contender: str) -> Row:
        """One that `newest` made sure of."""
        found = self.results.row(case, contender)
        assert found is not None, f"{self.path.name}: {contender} of {case}"
        return found

    def ms(self, case: str, contender: str) -> str:
        timing = self.row(case, contender).timing
        return f"{number(timing.p50)} ms" if timing else "not timed"

    def faster(self, case: str, than: str, contender: str = "ours") -> str:
        other, own = (self.results.ms(case, name) for name in (than, contender))
        return number(other / own) if other and own else ""

    def mib(self, case: str, contender: str) -> str:
        peak = self.row(case, contender).peak_extra_bytes
        return "" if peak is None else number(peak / MIB)


def load(folder: Path = RUNS) -> list[Run]:
    """The committed runs, the newest first."""
    runs = [Run(path, results.load(path)) for path in folder.glob("*.json")]
    return sorted(runs, key=lambda run: (run.results.date, run.path.name), reverse=True)


def newest(runs: Sequence[Run], suite: str, cases: Sequence[str], contenders: Sequence[str]) -> Run:
    """The newest of a suite with all of these rows.

    Raises:
        LookupError: there is none.
    """
    for run in runs:
        if run.suite == suite and all(run.results.row(case, name) for case in cases for name in contenders):
            return run
    raise LookupError(f"expected a run of `distil-fast bench {suite}` with {', '.join(cases)} in benchmarks/results.")


# ------------------------------------------------------------------------------------------------ tables


def loss(runs: Sequence[Run], page: Path) -> str:
    run = newest(runs, "loss", list(LOSS.values()), ("eager", "compiled", "ours"))
    rows = [
        [title, *(run.ms(case, name) for name in ("eager", "compiled", "ours")), f"{run.faster(case, 'eager')} x"]
        for title, case in LOSS.items()
    ]
    peaks = [f"{run.mib(IN_PLACE, name)} MiB" for name in ("eager", "compiled", "ours")]
    rows.append(["memory beside the inputs, first row", *peaks, ""])
    head = ["KL + CE, loss and gradient, T = 2", "eager", "torch.compile", "distil_fast", "against eager"]
    return _table(head, rows, run, page)


def divergences(runs: Sequence[Run], page: Path) -> str:
    """Other libraries' losses beside ours; who is wrong has no time."""
    names = ("eager", "compiled", "trl", "torchtune", "torchtune chunked", "ours")
    run = newest(runs, "loss", list(DIVERGENCES.values()), ("eager", "compiled", "ours"))
    rows = []
    for title, case in DIVERGENCES.items():
        times = [run.ms(case, name) if run.results.row(case, name) else "" for name in names]
        errors = [run.row(case, name).errors for name in ("eager", "ours")]
        rows.append(
            [title, *times, " / ".join(f"{found.near:.0e}" if found and found.near else "" for found in errors)]
        )
    head = ["512 x 30522, no labels", "eager", "torch.compile", "TRL", "torchtune", "torchtune, chunks", "distil_fast"]
    return _table([*head, "gradient error as p -> q, eager / ours"], rows, run, page)


def linear(runs: Sequence[Run], page: Path) -> str:
    names = ("products", "eager", "compiled", "liger", "ours")
    run = newest(runs, "linear", list(HEADS.values()), names)
    rows = []
    for title, case in HEADS.items():
        fast = run.results.row(case, "ours fast")
        own = f"{run.ms(case, 'ours')} / {run.ms(case, 'ours fast')}" if fast else run.ms(case, "ours")
        title = f'{title}: exact / `precision="fast"`' if fast else title
        rows.append([title, *(run.ms(case, name) for name in names[:-1]), own])
    first = HEADS["fp32, H = 384"]
    rows.append(["peak memory, first row", "", *(f"{run.mib(first, name)} MiB" for name in names[1:])])
    head = ["KL + CE from hidden states, N = 1024, V = 30522, T = 2", "four products", "eager", "torch.compile"]
    return _table([*head, "Liger", "distil_fast"], rows, run, page)


def linear_all(runs: Sequence[Run], page: Path) -> str:
    names = ("products", "eager", "compiled", "liger", "ours")
    shown = {f"N = 1024, V = 30522, {title}": case for title, case in HEADS.items()} | VOCABULARIES
    run = newest(runs, "linear", list(shown.values()), names)
    rows = []
    for title, case in shown.items():
        fast = run.results.row(case, "ours fast")
        ratio = _inverse(run, case, "ours") + (f", fast {_inverse(run, case, 'ours fast')}" if fast else "")
        cells = [*(run.ms(case, name) for name in names), run.ms(case, "ours fast") if fast else "", ratio]
        rows.append([title, *cells])
    head = ["KL + CE from hidden states", "products", "eager", "compiled", "Liger"]
    return _table([*head, "ours, exact", "ours, fast", "ours / products"], rows, run, page)


def _inverse(run: Run, case: str, contender: str) -> str:
    own, products = (run.results.ms(case, name) for name in (contender, "products"))
    return number(own / products) if own and products else ""


STEPS = ("original", "modern eager", "modern compiled", "ours")
MASKED_STEPS = ("modern eager masked", "modern compiled masked", "ours masked")


def train(runs: Sequence[Run], page: Path) -> str:
    run = newest(runs, "train", [RAGGED], (*STEPS, *MASKED_STEPS))
    original = run.mib(RAGGED, "original")
    rows = []
    for title, names in (("KL on all real tokens", STEPS), ("KL on masked tokens", ("", *MASKED_STEPS))):
        cells = [_tokens_a_second(run, name) if name else "" for name in names]
        cells[-1] += f", {run.faster(RAGGED, 'original', names[-1])} x the original"
        rows.append([title, *cells, f"{run.mib(RAGGED, names[-1])} MiB, original {original}"])
    head = ["tokens a second", "original", "PyTorch, eager", "torch.compile", "distil_fast", "peak memory"]
    return _table(head, rows, run, page)


def _tokens_a_second(run: Run, contender: str) -> str:
    row = run.row(RAGGED, contender)
    return f"{1e3 * row.facts[TOKENS] / row.timing.p50:.0f}" if row.timing else "not timed"


def train_steps(runs: Sequence[Run], page: Path) -> str:
    run = newest(runs, "train", [RAGGED], (*STEPS, *MASKED_STEPS))
    rows = []
    for name in (*STEPS, *MASKED_STEPS):
        suffix = " masked" if name.endswith(" masked") else ""
        ratios = [run.faster(RAGGED, than, name) for than in ("original", f"modern eager{suffix}")]
        ratios.append(run.faster(RAGGED, f"modern compiled{suffix}", name))
        syncs = run.row(RAGGED, name).facts.get(SYNCS)
        told = "" if syncs is None else f"{syncs:.0f}"
        cells = [run.ms(RAGGED, name), _tokens_a_second(run, name), *ratios, told, run.mib(RAGGED, name)]
        rows.append([name, *cells])
    head = ["a step of 8 x 128 tokens", "time", "tokens/s", "x original", "x modern eager", "x modern compiled"]
    return _table([*head, "host syncs", "peak MiB"], rows, run, page)


def train_parts(runs: Sequence[Run], page: Path) -> str:
    run = newest(runs, "train", [RAGGED], (*STEPS, *MASKED_STEPS))
    parts = (*PARTS, LOSS_ALONE, MASKING)
    taken_apart = [row for row in run.results.rows if row.case == RAGGED and row.parts]
    rows = [[row.contender, *(number(row.parts[part]) for part in parts)] for row in taken_apart]
    return _table(["ms", *parts], rows, run, page)


def encoders(runs: Sequence[Run], page: Path) -> str:
    run = newest(runs, "encoders", ENCODERS, (BERT_BASE, DISTILBERT))
    large, small = (run.row(ENCODERS[0], name).facts[PARAMETERS] for name in (BERT_BASE, DISTILBERT))
    faster = ", ".join(f"{run.faster(case, BERT_BASE, DISTILBERT)} x" for case in ENCODERS)
    rows = [
        [BERT_BASE, f"{large / 1e6:.2f} M", "", *(run.ms(case, BERT_BASE) for case in ENCODERS), ""],
        [
            DISTILBERT,
            f"{small / 1e6:.2f} M",
            f"{1 - small / large:.1%}",
            *(run.ms(case, DISTILBERT) for case in ENCODERS),
            f"{faster} (target 1.6)",
        ],
    ]
    head = ["", "parameters", "smaller by", "one sequence of 32 tokens", "of 128", "faster"]
    return _table(head, rows, run, page)


def hosts_losses(runs: Sequence[Run], page: Path) -> str:
    """Every host of the newest run; of a device of each kind, one below the other."""
    try:
        run = newest(runs, "integrations", (), ())
    except LookupError:
        return NOT_YET
    parts = []
    for table in integrations.tables(run.results):
        columns = [list(map(str, column.cells)) for column in table.columns]
        head = [str(column.header) for column in table.columns]
        parts.append(_rows(head, list(zip(*columns, strict=True))))
    for row in run.results.rows:
        if row.refused and row.contender in (hosts.BEFORE, hosts.AFTER):
            parts.append(f"* {row.case}, {row.contender}: {row.refused}")
    versions = ", ".join(f"{name} {version}" for name, version in run.results.machine["hosts"].items())
    return "\n\n".join([*parts, f"{_conditions(run, page)} {versions}."])


def hosts_fp32(runs: Sequence[Run], page: Path) -> str:
    """The hosts in short: float32 alone, without errors."""
    shown = {case.problem: case.name for case in hosts.CASES if case.dtype == torch.float32}
    try:
        run = newest(runs, "integrations", list(shown.values()), (hosts.BEFORE, hosts.AFTER))
    except LookupError:
        return NOT_YET
    rows = []
    for host, case in shown.items():
        lines = f"{run.row(case, hosts.AFTER).facts[integrations.LINES]:.0f}"
        times = [run.ms(case, name) for name in (hosts.BEFORE, hosts.AFTER)]
        peaks = " / ".join(run.mib(case, name) for name in (hosts.BEFORE, hosts.AFTER))
        rows.append([host, lines, *times, f"{run.faster(case, hosts.BEFORE, hosts.AFTER)} x", f"{peaks} MiB"])
    head = ["fp32, 512 x 30522", "lines to change", "its own loss", "ours in its place", "faster", "peak memory"]
    return _table(head, rows, run, page)


Table = Callable[[Sequence[Run], Path], str]
TABLES: dict[str, Table] = {
    "loss": loss,
    "divergences": divergences,
    "linear": linear,
    "linear-all": linear_all,
    "train": train,
    "train-steps": train_steps,
    "train-parts": train_parts,
    "encoders": encoders,
    "integrations": hosts_losses,
    "hosts": hosts_fp32,
}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], run: Run, page: Path) -> str:
    return f"{_rows(head, rows)}\n\n{_conditions(run, page)}"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(" ".join(line.split()) for line in lines)


def _conditions(run: Run, page: Path) -> str:
    """Where, when and how a run was made, with its file as `page` links to it."""
    found, machine = run.results, run.results.machine
    where = machine.get("gpu") or f"{machine['cpu']}, threads: {machine['threads']}, {machine['instruction_set']}"
    processes = f"medians over {found.processes} processes" if found.processes > 1 else "one process"
    return (
        f"{where}; torch {machine['torch']}, commit {machine['commit']}, {found.date[:10]}, {processes}, everyone in "
        f"turn: `{found.command}` ([the run]({os.path.relpath(run.path, page.parent)}))."
    )


# ------------------------------------------------------------------------------------------------ pages


def page_with_tables(path: Path, runs: Sequence[Run]) -> str:
    """What a page is to say: itself, with the tables of the runs at their places."""
    text = path.read_text("utf-8")
    for name in marks.names(text):
        if name in TABLES:  # other places belong to other commands
            text = marks.filled(text, name, TABLES[name](runs, path))
    return text


def stale(runs: Sequence[Run], root: Path = ROOT) -> dict[Path, str]:
    """The pages that say something else, and what they are to say."""
    paths = [root / name for name in PAGES if (root / name).exists()]
    wanted = {path: page_with_tables(path, runs) for path in paths}
    return {path: text for path, text in wanted.items() if text != path.read_text("utf-8")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tables, or tells which pages differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description="The tables of README and docs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page differs")
    given = parser.parse_args(arguments)
    found = stale(load())
    for path, text in found.items():
        print(path.relative_to(ROOT), "differs" if given.check else "written")
        if not given.check:
            path.write_text(text, "utf-8")
    return int(given.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
