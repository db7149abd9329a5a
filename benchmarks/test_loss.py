"""The cases of loss, overhead and linear for pytest-benchmark, with its statistics, histograms and saved runs.

    pytest benchmarks/test_loss.py [-k "in_place and ours"] [--benchmark-save NAME] [--benchmark-compare]

Contenders are checked first here too. They are timed one after the other, not in turn: for ratios between them trust
`python -m benchmarks loss`. Next: distil_fast/bench/cases.py.
"""

from __future__ import annotations

import re
from functools import lru_cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from distil_fast.bench import cases, measure, suite
from distil_fast.bench.cases import Case

ROUNDS, SLOW_ROUNDS = 30, 5
SLOW = ("eager", "eager float32", "trl", "torchtune", "torchtune chunked", "ours portable")
TIMED = (*cases.LOSS, *cases.OVERHEAD, *cases.LINEAR)
EVERY = [(case, name) for case in TIMED for name in case.contenders]


@lru_cache(maxsize=1)  # the contenders of a case follow each other
def prepared(case: Case) -> suite.Prepared:
    return suite.Prepared.of(case)


@pytest.fixture(scope="module")
def evict() -> measure.CacheEvictor:
    return measure.CacheEvictor()


@pytest.mark.filterwarnings("ignore")  # what torch.compile warns of is not ours
@pytest.mark.parametrize(
    ("case", "name"), EVERY, ids=[re.sub(r"\W+", "_", f"{case.name} {name}") for case, name in EVERY]
)
def test_loss(benchmark: BenchmarkFixture, evict: measure.CacheEvictor, case: Case, name: str) -> None:
    row, contender = suite.checked(name, case, prepared(case))
    if row.is_our_fault:
        pytest.fail(str(row.refused))
    if contender is None:
        pytest.skip(f"not timed: {row.refused}")
    benchmark.group = case.name
    benchmark.extra_info.update(
        row.errors._asdict() if row.errors else {}, floor_bytes=row.floor_bytes, calls=contender.calls
    )

    def prepare() -> None:
        contender.prepare()
        if contender.calls == 1:
            evict()

    def call() -> None:
        for _ in range(contender.calls):
            contender.call()

    slow = bool(case.width) or (name in SLOW and contender.calls == 1)
    rounds = SLOW_ROUNDS if slow else ROUNDS
    benchmark.pedantic(call, setup=prepare, rounds=rounds, warmup_rounds=2)
