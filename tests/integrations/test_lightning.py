"""The recipe for Lightning, examples/lightning_module.py: accumulated steps are big steps, and the teacher stays out.

Lightning's own Trainer runs it. The truth is plain torch in float64. Next: test_examples.py, which runs the script.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning")

from distil_fast.integrations.lightning import StepCounts
from tests.integrations.recipes import example
from tests.training import ranks
from tests.training.families import relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning"),
    pytest.mark.filterwarnings(r"ignore:.*does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings(r"ignore:.*`GradScaler`"),
]
recipe = example("lightning_module")
T = 2.0


class Recorded(recipe.Distiller):  # type: ignore[name-defined, misc]
    """With the gradients of each optimiser step, and no change of weights."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = {name: p.grad.clone() for name, p in self.student.named_parameters() if p.grad is not None}
        self.__dict__.setdefault("steps", []).append(gradients)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=0.0)


def text(count: int = 16) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 15, (count,), generator=g).tolist()
    return [torch.randint(recipe.VOCABULARY, (length,), generator=g) for length in lengths]


def distiller() -> Any:
    module = Recorded(recipe.model(1, seed=0), recipe.model(2, seed=1), T)
    for dropout in (m for m in module.student.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0.0
    return module


def fitted(sequences: list[Tensor], size: int, accumulate: int, folder: Path, **more: Any) -> tuple[Any, Any]:
    """The module and its trainer after one epoch."""
    sampler = more.pop("sampler", None)
    loader = DataLoader(sequences, batch_size=size, collate_fn=recipe.collate, sampler=sampler)
    module = distiller()
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **more,
    )
    trainer.fit(module, StepCounts(loader, recipe.Distiller.count, accumulate))
    return module, trainer


def truth(sequences: list[Tensor]) -> dict[str, Tensor]:
    """The gradients of all sequences as one batch."""
    module = distiller()
    student, teacher = module.student.double(), module.teacher.double()
    batch = recipe.collate(sequences)
    labels = recipe.next_tokens(batch)
    known = labels != recipe.IGNORED
    with torch.no_grad():
        t = teacher(**batch).logits[known]
    s = student(**batch).logits[known]
    soft = F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean") * T**2
    (soft + F.cross_entropy(s, labels[known])).backward()
    return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert actual.keys() == expected.keys()
    flat = (torch.cat([grads[name].double().flatten() for name in expected]) for grads in (actual, expected))
    return relative_error(*flat)


@pytest.mark.parametrize(("size", "accumulate"), [(16, 1), (4, 4)])
def test_an_accumulated_step_is_a_big_step(size: int, accumulate: int, tmp_path: Path) -> None:
    module, _ = fitted(text(), size, accumulate, tmp_path)
    assert len(module.steps) == 1
    assert difference(module.steps[0], truth(text())) < 1e-5


def test_the_last_step_of_an_epoch_may_have_fewer_batches(tmp_path: Path) -> None:
    module, _ = fitted(text(12), 2, 4, tmp_path)
    assert len(module.steps) == 2
    assert difference(module.steps[0], truth(text(12)[:8])) < 1e-5
    assert difference(module.steps[1], truth(text(12)[8:])) < 1e-5


class MeanOfMeans(Recorded):
    """What the host's documentation says: each batch's own mean."""

    def training_step(self, given: Any, batch_idx: int) -> Any:
        return super().training_step((given[0], self.count(given[0]).float()), batch_idx)


def test_a_mean_of_means_is_another_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "Recorded", MeanOfMeans)
    module, _ = fitted(text(), 4, 4, tmp_path)
    assert difference(module.steps[0], truth(text())) > 1e-2


def test_the_teacher_is_in_no_checkpoint(tmp_path: Path) -> None:
    module, trainer = fitted(text(4), 2, 2, tmp_path)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=False)["state_dict"]
    assert saved.keys() == {f"student.{name}" for name in module.student.state_dict()}
    assert not module.teacher.training


def on_a_rank(folder: Path) -> dict[str, Tensor]:
    sequences = text()
    sampler = torch.utils.data.DistributedSampler(sequences, 2, int(os.environ["RANK"]), shuffle=False)
    return fitted(sequences, 4, 2, folder, strategy="ddp", devices=2, sampler=sampler)[0].steps[0]


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    world = ranks.Ranks(2)
    try:
        for gradients in world.run(ranks.call, __name__, "on_a_rank", tmp_path):
            assert difference(gradients, truth(text())) < 1e-5
    finally:
        world.close()


def test_no_accumulation_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches: expected 1 or more"):
        StepCounts([], recipe.Distiller.count, 0)
