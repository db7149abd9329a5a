"""DistillationTrainer: a step is a step however it is cut, in value and gradient; and what the host makes of the same.

The truth is plain torch in float64 on one batch of all sequences (trainer_steps.py). Two ranks run `on_a_rank` below.
It knows nothing of kernels. Next: training/test_denominators.py, the same of our own trainer.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers import Trainer

from distil_fast.integrations import HostChangedError
from distil_fast.integrations import transformers as integration
from distil_fast.integrations.transformers import DistillationTrainer
from tests.integrations.trainer_steps import (
    HARD,
    IGNORED,
    IN_FOUR,
    SOFT,
    VOCABULARY,
    T,
    arguments,
    assert_same,
    collate,
    difference,
    ours,
    pair,
    sequences,
    trained,
    truth,
)
from tests.training import ranks

# ------------------------------------------------------------------------------------------------ a step is a step


@pytest.mark.parametrize("positions", ["all", "labelled"])
@pytest.mark.parametrize("kind", ["distilbert", "gpt2", "llama"])
def test_a_step_of_four_is_a_step_of_one(kind: str, positions: str, tmp_path: Path) -> None:
    data = sequences()
    expected = truth(kind, data, positions)
    assert_same(trained(ours(kind, tmp_path, data, soft_positions=positions)), expected)
    assert_same(trained(ours(kind, tmp_path, data, IN_FOUR, soft_positions=positions)), expected)


def test_labels_that_are_shifted_already_stay_so(tmp_path: Path) -> None:
    trainer = ours("gpt2", tmp_path, sequences())
    batch = collate(sequences())
    shifted = {name: batch[name] for name in ("input_ids", "attention_mask")}
    shifted["shift_labels"] = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    assert torch.equal(*(trainer.compute_loss(trainer.model, given) for given in (batch, shifted)))


def test_on_the_left_no_padding_predicts(tmp_path: Path) -> None:
    trainer = ours("gpt2", tmp_path, sequences())
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    _, taken = trainer._positions({"input_ids": mask, "attention_mask": mask, "labels": mask})
    assert taken.int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]


def test_the_hosts_label_smoothing_is_the_hard_terms(tmp_path: Path) -> None:
    data = sequences()
    trainer = ours("distilbert", tmp_path, data, IN_FOUR | {"label_smoothing_factor": 0.2})
    assert_same(trained(trainer), truth("distilbert", data, smoothing=0.2))


@pytest.mark.parametrize("with_labels", [0, 1])
def test_micro_batches_without_a_label(with_labels: int, tmp_path: Path) -> None:
    """Three of the four have none at least; of all of them the hard term is 0."""
    data = sequences()
    for example in data[with_labels:]:
        example["labels"] = torch.full_like(example["labels"], IGNORED)
    data[0]["labels"][:with_labels] = 5
    assert_same(trained(ours("distilbert", tmp_path, data, IN_FOUR)), truth("distilbert", data))


class MeanOfMeans(DistillationTrainer):
    """A common way to write it: each micro-batch's own mean, of which the Trainer then takes the mean."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs, None)


def test_a_mean_of_means_is_another_step(tmp_path: Path) -> None:
    student, teacher = pair("distilbert")
    options = {"teacher": teacher, "temperature": T, "soft_weight": SOFT, "hard_weight": HARD}
    trainer = MeanOfMeans(student, arguments(tmp_path, **IN_FOUR), collate, sequences(), **options)
    wrong = difference(trained(trainer)[1], truth("distilbert", sequences())[1])
    assert wrong > 1e-2


def test_the_hosts_own_loss_of_masked_language_models_is_wrong_and_ours_is_right(tmp_path: Path) -> None:
    """transformers issue 47688: gradients come out once per micro-batch, here four times as large as they should be."""
    data = sequences()
    hard_only = {"soft_weight": 0.0, "hard_weight": 1.0}
    whole = trained(ours("distilbert", tmp_path, data, **hard_only))[1]
    assert difference(trained(ours("distilbert", tmp_path, data, IN_FOUR, **hard_only))[1], whole) < 1e-5
    student, _ = pair("distilbert")
    host = trained(Trainer(student, arguments(tmp_path, **IN_FOUR), collate, data))[1]
    ratio = float(sum(h.norm() ** 2 for h in host.values()) / sum(w.norm() ** 2 for w in whole.values())) ** 0.5
    assert 3.0 < ratio < 5.0, f"The host's gradient is {ratio:.2f} times the right one: is the issue solved?"


# ------------------------------------------------------------------------------------------------ ranks


def on_a_rank(folder: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Two micro-batches of four on each of two ranks."""
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    trainer = ours("distilbert", folder, sequences(), changes)
    logged, gradients = trained(trainer)
    return logged, {name.removeprefix("module."): gradient for name, gradient in gradients.items()}


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    world = ranks.Ranks(2)
    try:
        for answer in world.run(ranks.call, __name__, "on_a_rank", tmp_path):
            assert_same(answer, truth("distilbert", sequences()))
    finally:
        world.close()


# ------------------------------------------------------------------------------------------------ mixed precision


def test_half_precision_logits_reach_the_loss_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = integration.distillation_loss

    def looking(student: Tensor, teacher: Tensor, *args: Any, **options: Any) -> Any:
        seen.append((student.dtype, teacher.dtype))
        return plain(student, teacher, *args, **options)

    monkeypatch.setattr(integration, "distillation_loss", looking)
    data = sequences()
    trainer = ours("distilbert", tmp_path, data, IN_FOUR | {"bf16": True})
    logged, gradients = trained(trainer)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    expected = truth("distilbert", data)
    assert logged["loss"] == pytest.approx(expected[0]["loss"], rel=2e-2)
    assert difference(gradients, expected[1]) < 5e-2
    assert trainer.predict(data).predictions.dtype == "float32"  # numpy has no bfloat16


# ------------------------------------------------------------------------------------------------ evaluation


def test_an_evaluation_is_of_the_same_loss(tmp_path: Path) -> None:
    data = sequences()
    trainer = ours("distilbert", tmp_path, data)
    expected = truth("distilbert", data)[0]["loss"]
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    predicted = trainer.predict(data)
    assert predicted.metrics["test_loss"] == pytest.approx(expected, rel=1e-5)
    assert predicted.predictions.shape == (16, 13, VOCABULARY)
    assert predicted.label_ids.shape == (16, 13)


def test_without_labels_the_soft_term_remains(tmp_path: Path) -> None:
    data = sequences()
    bare = [{"input_ids": example["input_ids"]} for example in data]
    logged, _ = trained(ours("distilbert", tmp_path, bare, IN_FOUR, hard_weight=0.0))
    expected = truth("distilbert", data)[0]["soft_loss"]
    assert logged["soft_loss"] == pytest.approx(expected, rel=1e-5)
    assert logged["loss"] == pytest.approx(SOFT * expected, rel=1e-5)
    with pytest.raises(ValueError, match="hard_weight=0"):
        ours("distilbert", tmp_path, bare).train()


# ------------------------------------------------------------------------------------------------ the run around it


def test_checkpoints_hold_the_student_alone_and_runs_resume(tmp_path: Path) -> None:
    data = sequences(32)
    changes = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "logging_steps": 2} | {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    whole = ours("distilbert", tmp_path / "whole", data, changes)
    before = copy.deepcopy(whole.teacher.state_dict())
    whole.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.teacher.state_dict().items())
    saved = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    assert saved.keys() <= whole.model.state_dict().keys()
    assert sum(tensor.numel() for tensor in saved.values()) == sum(p.numel() for p in whole.model.parameters())

    resumed = ours("distilbert", tmp_path / "resumed", data, changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)
    last = whole.state.log_history[1], resumed.state.log_history[1]
    for name in ("loss", "soft_loss", "hard_loss"):
        assert last[1][name] == pytest.approx(last[0][name], rel=1e-5)


def test_logged_terms_are_those_of_the_loss(tmp_path: Path) -> None:
    trainer = ours("distilbert", tmp_path, sequences(32), IN_FOUR | {"num_train_epochs": 2, "max_steps": -1})
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    assert len(steps) == 4
    for row in steps:
        assert row["loss"] == pytest.approx(SOFT * row["soft_loss"] + HARD * row["hard_loss"], rel=1e-5)
    assert not any("soft_loss" in row for row in trainer.state.log_history if "loss" not in row)


class Readings(TorchDispatchMode):
    """Counts how often the host reads a number of the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_micro_batch_reads_nothing_of_the_device(tmp_path: Path) -> None:
    trainer = ours("distilbert", tmp_path, sequences())
    batch = collate(sequences())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with Readings() as of_models:
        trainer.model(**inputs)
        with torch.inference_mode():
            trainer.teacher(**inputs)
    trainer.model.train()
    with Readings() as of_all:
        trainer.compute_loss(trainer.model, batch)
    assert of_all.count == of_models.count


def test_in_place_changes_no_gradient(tmp_path: Path) -> None:
    data = sequences()
    trainer = ours("distilbert", tmp_path, data, IN_FOUR, inplace=True)
    assert_same(trained(trainer), truth("distilbert", data))


# ------------------------------------------------------------------------------------------------ refusals


def test_an_older_host_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Trainer, "loss_is_scaled_for_ga")
    with pytest.raises(HostChangedError, match="loss_is_scaled_for_ga"):
        ours("distilbert", tmp_path, sequences())


def test_a_count_of_the_hosts_own_is_refused(tmp_path: Path) -> None:
    trainer = ours("distilbert", tmp_path, sequences())
    with pytest.raises(HostChangedError, match="counts of both terms"):
        trainer.compute_loss(trainer.model, collate(sequences()), num_items_in_batch=torch.tensor(7))


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    data = sequences()
    with pytest.raises(ValueError, match="soft_positions: expected one of"):
        ours("distilbert", tmp_path, data, soft_positions="masked")
    with pytest.raises(ValueError, match="compute_loss_func"):
        ours("distilbert", tmp_path, data, compute_loss_func=lambda *_: None)
    student, teacher = pair("distilbert")
    with pytest.raises(TypeError, match="teacher: expected an nn"):
        DistillationTrainer(student, arguments(tmp_path), collate, data, teacher="bert")  # type: ignore[arg-type]
    trainer = DistillationTrainer(student, arguments(tmp_path), collate, data, teacher=teacher.bert)
    with pytest.raises(TypeError, match="teacher: expected an output with logits"):
        trainer.train()
