"""The loop: what a step does, masked updates, no wait for the device, what is reported, when it stops."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DistilBertConfig, DistilBertForMaskedLM

from distil_fast.training.batch import MaskedBatch
from distil_fast.training.health import FIRST_SCALE, GOOD_STEPS, Health, NonFiniteLoss
from distil_fast.training.interrupt import Interrupted
from distil_fast.training.metrics import Progress
from distil_fast.training.optimiser import decayed, learning_rates
from distil_fast.training.precision import resolve_precision
from distil_fast.training.settings import InputError, OptimiserConfig
from distil_fast.training.trainer import Trainer
from tests.training.toy import AsItIs, Given, ToyFeed, ToyMasking, ToyObjective, a_batch, toy_config


def trainer(folder: Path, objective: ToyObjective | None = None, **changes: Any) -> Trainer:
    arguments = {name: changes.pop(name) for name in ("evaluate", "report", "save_student") if name in changes}
    objective = objective or ToyObjective()
    return Trainer(objective, ToyFeed(), ToyMasking(), toy_config(folder, **changes), **arguments)


# ------------------------------------------------------------------------------------------------ a step


def test_training_lowers_the_terms_and_says_how(tmp_path: Path) -> None:
    reports: list[Progress] = []
    run = trainer(tmp_path, steps=42, report=reports.append)
    history = run.fit()
    assert history.columns[:3] == ("loss", "ce", "mlm")
    assert history.rows.shape == (42, len(history.columns))
    assert (history["loss"][-5:].mean() < 0.8 * history["loss"][:5].mean()).all()
    torch.testing.assert_close(history["loss"], 5 * history["ce"] + 2 * history["mlm"])
    assert [report.step for report in reports] == [*range(4, 41, 4), 42]
    last = reports[-1]
    assert last.terms["ce"] == pytest.approx(history["ce"][40:].mean().item())
    assert last.gradient_norm == history["gradient_norm"][40:].max().item()
    feed = ToyFeed()
    assert last.tokens == sum(next(feed).tokens.numel() for _ in range(84))
    assert last.learning_rate == pytest.approx(run.learning_rate(41))
    assert last.seconds_left == 0 < reports[0].seconds_left
    assert last.tokens_per_second > 0 == last.skipped
    assert not run.objective.student.training


def test_a_step_is_adamws_with_clipping(tmp_path: Path) -> None:
    """Against torch's own AdamW, not fused, and clip_grad_norm_."""
    batch = ToyMasking()(a_batch(0, 8))
    changes = {"steps": 3, "dropout": False, "accumulation_steps": 1, "optimiser": {"max_grad_norm": 2.0}}
    objective, twin = ToyObjective(), ToyObjective().train(False)
    config = toy_config(tmp_path, **changes)
    history = Trainer(objective, Given([batch]), AsItIs(), config).fit()
    names = decayed(twin)
    groups = [
        {"params": [p for n, p in twin.named_parameters() if n in names], "weight_decay": 0.1},
        {"params": [p for n, p in twin.named_parameters() if n not in names], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, 1.0, betas=(0.9, 0.98), eps=1e-6, foreach=False)
    for step in range(3):
        for group in adamw.param_groups:
            group["lr"] = history["learning_rate"][step].item()
        twin(batch, twin.counts(batch))[0].backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 2.0)
        assert norm.item() == pytest.approx(history["gradient_norm"][step].item(), rel=1e-6)
        assert norm > 2
        adamw.step()
        adamw.zero_grad()
    for name, tensor in twin.state_dict().items():
        assert (objective.state_dict()[name] - tensor).norm() <= 1e-6 * tensor.norm(), name


def test_biases_and_norms_do_not_decay() -> None:
    model = DistilBertForMaskedLM(DistilBertConfig(vocab_size=20, dim=8, n_layers=1, n_heads=2, hidden_dim=8))
    names = decayed(model)
    assert "distilbert.transformer.layer.0.ffn.lin1.weight" in names
    assert "distilbert.embeddings.word_embeddings.weight" in names
    assert not [name for name in names if "norm" in name.lower() or name.endswith("bias")]  # sa_layer_norm is one
    assert len(names) == 2 + 6 + 1  # embeddings, a layer's matrices, the head's transform; its decoder is tied
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert decayed(frozen) == set()


def test_learning_rates_rise_and_fall() -> None:
    rate = learning_rates(OptimiserConfig(learning_rate=1e-3), 40)
    assert [rate(i) for i in range(3)] == pytest.approx([0.0, 5e-4, 1e-3])
    assert (rate(39), rate(40)) == pytest.approx((1e-3 / 38, 0.0))
    assert learning_rates(OptimiserConfig(schedule="constant_with_warmup"), 40)(39) == 5e-4
    for name in ("no such schedule", "reduce_lr_on_plateau"):
        with pytest.raises(InputError, match=r"optimiser\.schedule"):
            learning_rates(OptimiserConfig(schedule=name), 40)


def test_equal_seeds_give_equal_bits_and_others_do_not(tmp_path: Path) -> None:
    a, b, c = (trainer(tmp_path / str(i), seed=seed).fit() for i, seed in enumerate((1, 1, 2)))
    assert torch.equal(a["loss"], b["loss"])
    assert not torch.equal(a["loss"], c["loss"])  # the dropout's


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_as_fp32_does(tmp_path: Path, precision: str) -> None:
    full = trainer(tmp_path / "fp32", steps=20, dropout=False).fit()
    run = trainer(tmp_path / precision, steps=20, dropout=False, precision=precision)
    half = run.fit()
    assert not torch.equal(half["loss"], full["loss"])
    late = int(half["skipped"].sum())  # fp16 finds its loss scale in the first steps, and is as many steps behind
    assert late == 0 if precision == "bf16" else 1 <= late <= 5
    torch.testing.assert_close(half["loss"], full["loss"], rtol=0.05, atol=0)
    made = half["skipped"] == 0
    torch.testing.assert_close(half["gradient_norm"][made], full["gradient_norm"][made], rtol=0.1, atol=0)
    assert all(p.dtype == torch.float32 for p in run.objective.parameters())


def test_precisions_are_checked() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) in ("fp32", "bf16")
    with pytest.raises(InputError, match="expected auto, fp32, bf16, fp16, got 'fp8'"):
        resolve_precision("fp8", cpu)


# ------------------------------------------------------------------------------------------------ faults


class Broken(ToyObjective):
    """Its loss, or its gradient only, is spoilt in forward number `call`, counted from 0."""

    def __init__(self, call: int, value: float, gradient: bool = False) -> None:
        super().__init__()
        self.call, self.value, self.gradient = call, value, gradient
        self.calls = 0

    def forward(self, batch: MaskedBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        loss, terms = super().forward(batch, counts)
        self.calls += 1
        if self.calls - 1 == self.call:
            if self.gradient:
                loss.register_hook(lambda g: g * self.value)
            else:
                loss = loss * self.value
        return loss, terms


def state_of(run: Trainer) -> list[Tensor]:
    """Weights, moments and step counts."""
    moments = [t for state in run.optimiser.state.values() for _, t in sorted(state.items())]
    return [t.detach().clone() for t in (*run.objective.state_dict().values(), *moments)]


def assert_same_state(mine: Trainer, theirs: Trainer) -> None:
    for a, b in zip(state_of(mine), state_of(theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_fault_stops_with_the_weights_before_it(tmp_path: Path, value: float, gradient: bool) -> None:
    good = trainer(tmp_path / "good", steps=20, dropout=False, log_interval=5)
    for step in range(5):
        good.step(step)
    objective = Broken(2 * 5 + 1, value, gradient)
    broken = trainer(tmp_path / "broken", objective, steps=20, dropout=False, checkpoint={"interval": 4})
    with pytest.raises(NonFiniteLoss, match="optimiser step 6 is not finite") as caught:
        broken.fit()
    assert objective.calls == 2 * 8  # found when the losses of steps 5 to 8 were read
    assert_same_state(broken, good)
    error = caught.value
    assert (error.step, error.feed) == (5, {"epoch": 0, "position": 10})
    assert error.checkpoint == tmp_path / "broken" / "checkpoints" / "step-00000004"
    assert "epoch 0, position 10 of the feed" in str(error)
    assert str(error.checkpoint) in str(error)
    assert error.terms.keys() == {"loss", "ce", "mlm", "gradient_norm"}
    assert not all(torch.tensor(list(error.terms.values())).isfinite())
    assert len(broken.history.rows) == 5


def test_a_fault_is_skipped_and_counted_where_one_likes(tmp_path: Path) -> None:
    reports: list[Progress] = []
    run = trainer(
        tmp_path, Broken(2 * 5, float("nan")), steps=20, dropout=False, non_finite="skip", report=reports.append
    )
    before, after = [], []
    step = run.step

    def watched(index: int) -> None:
        before.append(state_of(run)) if index == 5 else None
        step(index)
        after.append(state_of(run)) if index == 5 else None

    run.step = watched  # type: ignore[method-assign]
    history = run.fit()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert history["skipped"].nonzero().flatten().tolist() == [5]
    assert history["loss"].isfinite().logical_not().nonzero().flatten().tolist() == [5]
    assert [report.skipped for report in reports] == [0, 1, 1, 1, 1]
    assert all(value == value for report in reports for value in report.terms.values())
    state = next(iter(run.optimiser.state.values()))
    assert state["step"] == 19


def test_a_loss_scale_finds_its_place() -> None:
    """Halved where gradients overflow, which is no fault; doubled after many good steps; a fault at 1, or in a loss."""
    health = Health(torch.device("cpu"), stop=True, scaled=True)
    fine, inf = torch.ones(2), torch.tensor(float("inf"))
    for halvings in range(1, 17):
        verdict = health.judge(fine, inf)
        assert (verdict.masked, verdict.fault, health.scale) == (1, 0, FIRST_SCALE / 2**halvings)
    for _ in range(GOOD_STEPS):
        assert health.judge(fine, torch.tensor(3.0)) == (0, 0)
    assert health.scale == 2
    other = Health(torch.device("cpu"), stop=True, scaled=True)
    other.load_state_dict(json.loads(json.dumps(health.state_dict())))
    assert other.state_dict() == {"scale": 2.0, "good_steps": 0.0}
    assert health.judge(fine, inf) == (1, 0)
    assert health.judge(fine, inf) == (1, 1)  # at a scale of 1 it is the gradient's own fault
    assert health.judge(fine, torch.ones(())) == (1, 0)  # and no update is made any more
    assert other.judge(torch.tensor([1.0, float("nan")]), torch.ones(())).fault == 1


# ------------------------------------------------------------------------------------------------ the device


class Syncs(TorchDispatchMode):
    """Counts the operations for whose result the host would wait for a GPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        name = func.overloadpacket.__name__
        indexed = name in ("index", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if name in self.NAMES or indexed:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_waits_for_nothing(tmp_path: Path, precision: str) -> None:
    feed = Given([a_batch(i, 4) for i in range(4)])
    run = Trainer(ToyObjective(), feed, ToyMasking(), toy_config(tmp_path, precision=precision, log_interval=5))
    run.step(0)  # the moments are made
    with Syncs() as syncs:
        for step in range(1, 4):
            run.step(step)
    assert syncs.calls > 100
    assert syncs.seen == []
    with Syncs() as syncs:
        run.objective.student.embedding.weight.sum().item()
        assert syncs.seen == ["_local_scalar_dense"]  # it would have been seen


def test_the_host_reads_once_a_log_interval(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=20, log_interval=5, checkpoint={"interval": 0})
    reads: list[int] = []
    read = run.meter.read
    run.meter.read = lambda first, rate: (reads.append(first), read(first, rate))[1]  # type: ignore[method-assign]
    run.fit()
    assert reads == [0, 5, 10, 15]


# ------------------------------------------------------------------------------------------------ around the steps


def test_an_evaluation_changes_nothing(tmp_path: Path) -> None:
    modes = []

    def evaluate(objective: Any) -> dict[str, float]:
        modes.append((objective.student.training, torch.is_grad_enabled()))
        return {"accuracy": torch.rand(()).item()}

    evaluated = trainer(tmp_path / "a", steps=10, evaluation_interval=3, evaluate=evaluate).fit()
    plain = trainer(tmp_path / "b", steps=10).fit()
    assert torch.equal(evaluated["loss"], plain["loss"])
    assert [step for step, _ in evaluated.evaluations] == [3, 6, 9, 10]
    assert modes == [(False, False)] * 4


def test_trackers_get_the_losses(tmp_path: Path) -> None:
    history = trainer(tmp_path, trackers=["tensorboard"], evaluate=lambda _: {"accuracy": 0.25}).fit()
    events = EventAccumulator(str(tmp_path / "distil_fast"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == [4, 8, 12]
    assert losses[0].value == pytest.approx(history["loss"][:4].mean().item())
    assert {"ce", "mlm", "gradient_norm", "learning_rate", "tokens_per_second", "accuracy"} <= set(
        events.Tags()["scalars"]
    )


def test_an_unknown_tracker_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such tracker"):
        trainer(tmp_path, trackers=["no such tracker"])


def test_an_accelerator_with_another_precision_is_refused(tmp_path: Path) -> None:
    accelerator: Any = SimpleNamespace(mixed_precision="bf16", device=torch.device("cpu"))
    with pytest.raises(InputError, match="expected mixed_precision 'no'"):
        Trainer(ToyObjective(), ToyFeed(), ToyMasking(), toy_config(tmp_path), accelerator=accelerator)


@pytest.mark.parametrize("name", ["steps", "log_interval", "accumulation_steps"])
def test_numbers_below_one_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: expected at least 1, got 0"):
        trainer(tmp_path, **{name: 0})


def test_the_student_is_saved_whole_at_the_end(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_student=lambda path: path.write_text("student"))
    run.fit()
    assert (tmp_path / "student").read_text() == "student"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    whole = trainer(tmp_path / "whole").fit()
    run = trainer(tmp_path / "broken")
    before = signal.getsignal(number)
    step = run.step

    def interrupted(index: int) -> None:
        if index == 5:
            signal.raise_signal(number)
        step(index)

    run.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="after optimiser step 6") as caught:
        run.fit()
    assert signal.getsignal(number) is before
    assert (caught.value.signal, caught.value.step) == (number, 6)
    assert caught.value.checkpoint.name == "step-00000006"
    resumed = trainer(tmp_path / "broken").fit()
    assert torch.equal(resumed["loss"], whole["loss"])


def test_a_second_signal_has_its_own_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distil_fast.training import interrupt

    monkeypatch.setattr(interrupt, "PASSED_ON", 0.0)
    run = trainer(tmp_path)

    def twice(_: object) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)  # until the handler has run, and the clock has moved

    run.step = twice  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        run.fit()
