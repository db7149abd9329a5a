"""Two gloo processes, DDP and FSDP2, train as one process does: weights, losses, faults, checkpoints, signals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distil_fast.training.batch import MaskedBatch
from distil_fast.training.trainer import Trainer
from tests.training import ranks
from tests.training.toy import AsItIs, Given, ToyMasking, ToyObjective, a_batch, pieces, toy_config

pytestmark = pytest.mark.slow
STEPS = {"steps": 3, "log_interval": 2, "accumulation_steps": 2, "optimiser": {"max_grad_norm": 0.5}}
STRATEGIES = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def two() -> Iterator[ranks.Ranks]:
    world = ranks.Ranks(2)
    yield world
    world.close()


@pytest.fixture(scope="module")
def batches() -> list[MaskedBatch]:
    """Three steps of 64 sequences, in pieces of 16; a rank takes every other piece."""
    masking = ToyMasking()
    return [piece for step in range(3) for piece in pieces(masking(a_batch(step, 64)), 16)]


@pytest.fixture(scope="module")
def alone(batches: list[MaskedBatch], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, which accumulates all four pieces of a step."""
    objective = ToyObjective()
    config = toy_config(tmp_path_factory.mktemp("alone"), dropout=False, **(STEPS | {"accumulation_steps": 4}))
    history = Trainer(objective, Given(batches), AsItIs(), config).fit()
    return {"weights": objective.state_dict(), "history": history}


def assert_same_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert type(actual[name]) is torch.Tensor
        assert (actual[name] - tensor).norm() <= bound * tensor.norm(), name


@pytest.mark.parametrize("parallel", STRATEGIES)
def test_two_ranks_train_as_one_process(
    two: ranks.Ranks, alone: dict[str, Any], batches: list[MaskedBatch], tmp_path: Path, parallel: str
) -> None:
    first, second = two.run(ranks.train, tmp_path, parallel, batches, STEPS)
    history = alone["history"]
    for answer in (first, second):
        assert answer["sharded"] == {"DTensor" if parallel == "fsdp2" else "Parameter"}
        assert answer["tied"]
        assert answer["reductions"] == 3  # one bucket a step: none between its micro-batches
        assert_same_weights(answer["weights"], alone["weights"], 1e-6)
        for column in ("loss", "ce", "mlm", "gradient_norm", "tokens"):
            i = history.columns.index(column)
            torch.testing.assert_close(answer["rows"][:, i], history[column], rtol=2e-6, atol=0)
    assert (history["gradient_norm"] > 0.5).all()  # clipping was at work
    assert first["evaluations"] == second["evaluations"] != []
    assert (first["reports"], second["reports"], first["saved"], second["saved"]) == (2, 0, 1, 0)
    assert first["words"] == second["words"] == ""
    student = torch.load(tmp_path / "student", weights_only=True)
    assert_same_weights({f"student.{name}": t for name, t in student.items()}, alone["weights"], 1e-6)


@pytest.mark.parametrize("parallel", STRATEGIES)
def test_a_fault_of_one_rank_stops_both_in_the_same_step(
    two: ranks.Ranks, alone: dict[str, Any], batches: list[MaskedBatch], tmp_path: Path, parallel: str
) -> None:
    answers = two.run(ranks.train_to_a_fault, tmp_path, parallel, batches, STEPS, 4)  # in the second step
    assert all("optimiser step 2 is not finite" in answer for answer in answers)
    skipping = two.run(ranks.train_to_a_fault, tmp_path / "skip", parallel, batches, STEPS | {"non_finite": "skip"}, 4)
    first, second = (answer["rows"][:, alone["history"].columns.index("skipped")].tolist() for answer in skipping)
    assert first == second == [0, 1, 0]
    assert_same_weights(skipping[0]["weights"], skipping[1]["weights"], 0)


@pytest.mark.parametrize("parallel", STRATEGIES)
def test_ranks_resume_bit_for_bit(two: ranks.Ranks, batches: list[MaskedBatch], tmp_path: Path, parallel: str) -> None:
    longer = STEPS | {"steps": 8, "checkpoint": {"interval": 3}}
    unbroken = two.run(ranks.train, tmp_path / "whole", parallel, batches, longer)
    stopped = two.run(ranks.train_until_told, tmp_path / "broken", parallel, batches, longer, 9)  # in the fifth step
    assert stopped[0] == stopped[1] == (6, str(tmp_path / "broken" / "checkpoints" / "step-00000006"))
    resumed = two.run(ranks.train, tmp_path / "broken", parallel, batches, longer)
    for whole, broken in zip(unbroken, resumed, strict=True):
        assert_same_weights(broken["weights"], whole["weights"], 0)
        assert torch.equal(broken["rows"][:, :5], whole["rows"][:, :5])
    other = "ddp" if parallel == "fsdp2" else "fsdp2"
    for words in two.run(ranks.complaint, tmp_path / "broken", other, batches, longer):
        assert f"parallel was '{parallel}' and is '{other}' now" in words


def test_another_number_of_ranks_is_named(two: ranks.Ranks, batches: list[MaskedBatch], tmp_path: Path) -> None:
    two.run(ranks.train, tmp_path, "ddp", batches, STEPS)
    config = toy_config(tmp_path, dropout=False, **STEPS)
    with pytest.raises(ValueError, match="number of ranks was 2 and is 1 now"):
        Trainer(ToyObjective(), Given(batches), AsItIs(), config).fit()


def test_an_unwritable_folder_is_told_by_all_ranks(
    two: ranks.Ranks, batches: list[MaskedBatch], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for words in two.run(ranks.complaint, tmp_path / "file", "ddp", batches, STEPS):
        assert words.startswith("output: expected a folder to write checkpoints to")
