"""The training suites on tiny shapes: who agrees, what is refused, what is told, from command line to tables."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from distil_fast import bench
from distil_fast.bench import cases, isolated, measure, results, train, train_cases, train_parts, train_steps
from distil_fast.bench.measure import Effort
from distil_fast.bench.syncs import host_syncs
from distil_fast.bench.train_cases import EncoderCase, TrainCase
from distil_fast.bench.train_objectives import PlainObjective, plain_losses
from distil_fast.training.batch import MaskedBatch
from distil_fast.training.objective import MaskedLMObjective
from distil_fast.training.settings import LossConfig

EAGER = tuple(name for name in train_cases.CONTENDERS if not name.startswith(train_cases.COMPILED))
CASE = TrainCase(24, 2, 1, batch=4, length=16, shortest=9, vocabulary=300, contenders=EAGER)
TINY = Effort(warm_up=0.0, budget=0.01, fewest=3, most=4)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small caches to empty, little effort, and one thread."""
    monkeypatch.setattr(measure.machine, "last_level_cache_bytes", lambda device="cpu": 1 << 16)
    monkeypatch.setattr(measure, "FULL", TINY)
    monkeypatch.setattr(measure, "STEPS", TINY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(line)


@pytest.mark.parametrize("name", [name for name in EAGER if name != train_cases.ORIGINAL])
@pytest.mark.parametrize("shortest", [9, 16])
def test_contenders_agree_with_the_original(name: str, shortest: int) -> None:
    filled = train.fill(replace(CASE, shortest=shortest))
    suffix = train_cases.MASKED if name.endswith(train_cases.MASKED) else ""
    reference = train.outcome(filled.contender(train_cases.ORIGINAL + suffix).taken, filled.batch)
    found = train.disagreement(train.outcome(filled.contender(name).taken, filled.batch), reference)
    assert found.loss is not None
    assert found.loss < 1e-4
    assert found.array < 1e-5


@pytest.mark.parametrize("name", ["modern eager", "ours"])
def test_they_agree_under_autocast_too(name: str) -> None:
    """The GPU suite's precision and attention. Models so wide that KL is no rounding of theirs, as those there are."""
    filled = train.fill(replace(CASE, width=96, dtype=torch.bfloat16, attention="sdpa"))
    reference = train.outcome(filled.contender(train_cases.ORIGINAL).taken, filled.batch)
    found = train.disagreement(train.outcome(filled.contender(name).taken, filled.batch), reference)
    assert train._verdict(found, torch.bfloat16) is None
    in_float32 = replace(CASE, width=96, attention="sdpa")
    wide = train.outcome(train.fill(in_float32).contender(train_cases.ORIGINAL).taken, filled.batch)
    assert train.disagreement(reference, wide).array > 1e-3  # it was no float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_suite_says_so() -> None:
    with pytest.raises(SystemExit, match="expected a GPU"):
        bench.run(arguments("train-gpu"))


def test_a_modern_step_of_two_micro_batches_is_one_of_both() -> None:
    """Where the original's is a mean of means."""
    whole = train.fill(CASE)
    first, second = (train.fill(replace(CASE, batch=2, shortest=n)).batch for n in (9, 16))
    step = whole.contender("ours").taken
    assert isinstance(step, train_steps.ModernStep)
    losses = step.gradients([first, second])
    parts = [whole.contender("ours").taken.gradients([batch]) for batch in (first, second)]
    tokens = [len(batch.tokens) for batch in (first, second)]
    ce = sum(n * part[1] for n, part in zip(tokens, parts, strict=True)) / sum(tokens)
    assert losses[1].item() == pytest.approx(ce.item(), rel=1e-5)
    assert losses[1].item() != pytest.approx((parts[0][1] + parts[1][1]).item() / 2, rel=1e-5)


def test_who_disagrees_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(MaskedLMObjective):
        def forward(self, batch: MaskedBatch, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            loss, terms = super().forward(batch, counts)
            return 1.01 * loss, terms

    monkeypatch.setitem(train_steps.OBJECTIVES, train_cases.OURS, Wrong)
    found = train.timed([replace(CASE, contenders=(train_cases.ORIGINAL, train_cases.OURS))], TINY)
    original, ours = found.rows
    assert original.timing is not None
    assert ours.timing is None
    assert ours.refused is not None
    assert ours.refused.startswith("wrong: its losses")
    assert ours.is_our_fault


def test_what_fails_is_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no memory\nand more")

    monkeypatch.setitem(train_steps.OBJECTIVES, train_cases.EAGER, broken)
    found = train.timed([replace(CASE, contenders=(train_cases.ORIGINAL, train_cases.EAGER))], TINY)
    assert found.rows[1].refused == "fails: RuntimeError: no memory"
    assert not found.rows[1].is_our_fault


@pytest.mark.parametrize("name", EAGER)
def test_the_parts_are_the_whole(name: str) -> None:
    contender = train.fill(CASE).contender(name)
    watch = train_parts._Watch(contender.taken)
    found = watch.run([contender.batch])
    watch.remove()
    assert set(found) == set(train_cases.PARTS)
    assert all(ms > 0 for ms in found.values())
    assert sum(found.values()) == pytest.approx(1e3 * (watch.at["end"] - watch.at["begin"]))
    taken = train_parts.parts(contender.taken, contender.batch, 1)
    assert set(taken) == {*train_cases.PARTS, train_cases.LOSS_ALONE}
    assert taken[train_cases.LOSS_ALONE] > 0


def test_what_would_wait_is_counted() -> None:
    x = torch.arange(4.0, requires_grad=True)

    def reads() -> None:
        (x * x).sum().backward()
        x.detach().sum().item()
        bool((x > 1).any())
        x.detach()[x > 1]
        torch.masked_select(x.detach(), x > 1)

    def stays() -> None:
        y = torch.where(x > 1, x, 0.0).index_select(0, torch.tensor([0, 1]))
        y[torch.tensor([1])].sum().backward()

    assert host_syncs(reads, "cpu") == 4
    assert host_syncs(stays, "cpu") == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which dynamo looks at
def test_plain_losses_are_compiled_as_they_are() -> None:
    """What the compiled contenders compile is traced in one piece."""
    filled = train.fill(CASE)
    config = LossConfig()
    objective = PlainObjective(filled.student, filled.teacher, config, plain_losses(config))
    counts = objective.counts(filled.batch)
    eager = objective(filled.batch, counts)
    objective.loss_function = torch.compile(plain_losses(config), fullgraph=True, backend="eager")
    torch.testing.assert_close(objective(filled.batch, counts), eager)


def test_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(train_cases.SUITES, "train", (CASE,))
    monkeypatch.setattr(isolated, "CLEAR_REFS", Path("absent"))  # peaks take processes: another test has them
    path = tmp_path / "run.json"
    assert bench.run(arguments("train", "--json", str(path))) == 0
    printed = capsys.readouterr().out
    found = results.load(path)
    assert [row.contender for row in found.rows] == list(EAGER)
    for row in found.rows:
        assert row.timing is not None
        assert row.facts[train_cases.TOKENS] == 50
        assert row.facts[train_cases.PADDING] == pytest.approx(14 / 64)
        assert set(row.parts) == {*train_cases.PARTS, train_cases.LOSS_ALONE, train_cases.MASKING}
        assert row.copy_gb_per_s > 0
    original, ours = found.row(CASE.name, "original"), found.row(CASE.name, "ours")
    assert original is not None
    assert ours is not None
    assert original.facts[train_cases.SYNCS] >= 10
    assert ours.facts[train_cases.SYNCS] == 0
    assert "50 tokens" in printed
    assert "21.9% pad" in printed
    for part in train_cases.PARTS:
        assert part in printed
    assert bench.run(arguments("show", str(path))) == 0
    assert capsys.readouterr().out == printed


def test_encoders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(train_cases, "ENCODERS", (EncoderCase(8, layers=2, width=32, vocabulary=64),))
    path = tmp_path / "run.json"
    assert bench.run(arguments("encoders", "--json", str(path))) == 0
    assert "million parameters" in capsys.readouterr().out
    base, student = results.load(path).rows
    assert 0 < student.facts[train_cases.PARAMETERS] < base.facts[train_cases.PARAMETERS]


def test_the_encoders_have_the_released_sizes() -> None:
    with torch.device("meta"):
        models = BertModel(BertConfig()), DistilBertModel(DistilBertConfig())
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [109_482_240, 66_362_880]
    case = EncoderCase(32)
    assert (case.layers, case.width, case.vocabulary) == (12, 768, 30522)


def test_names_tell_the_cases_apart() -> None:
    every = (*train_cases.TRAIN, *train_cases.TRAIN_GPU, *train_cases.ENCODERS)
    assert len({case.name for case in every}) == len(every)
    assert cases.select(train_cases.TRAIN, quick=True, containing="ragged") == [train_cases.TRAIN[0]]


@pytest.mark.skipif(not isolated.CLEAR_REFS.exists(), reason="the system keeps no peak that can be reset")
@pytest.mark.slow
def test_peak_memory_of_a_step() -> None:
    """The original holds its logits at least seven times; ours never has them whole."""
    case = TrainCase(32, 2, 1, batch=8, length=128, shortest=122, vocabulary=8000, contenders=EAGER)
    logits = 8 * 128 * 8000 * 4
    original, ours = (isolated.fresh(train.peak_bytes, case, name) for name in ("original", "ours"))
    assert original > 5 * logits
    assert ours < 2 * logits
