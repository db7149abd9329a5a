"""Ours in the place of TextBrewer's KD losses and hidden-state losses, in its own distillers.

Against the installed package, and against the formulae in float64. It knows nothing of kernels.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():  # its sources compare with `is not` of a literal
    warnings.simplefilter("ignore", SyntaxWarning)
    textbrewer = pytest.importorskip("textbrewer")

from textbrewer import losses as host
from textbrewer import presets

from distil_fast.integrations import HostChangedError
from distil_fast.integrations import textbrewer as ours

V, H = 61, 24
KD = ["kd_ce_loss", "kd_mse_loss"]
HIDDEN = ["hid_mse_loss", "cos_loss", "pkd_loss"]


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]


def padding(batch_size: int = 3, length: int = 10) -> Tensor:
    return torch.arange(length) < torch.tensor([length, length // 2, 3])[:batch_size, None]


def temperature_of(kind: str, student: Tensor, teacher: Tensor) -> float | Tensor:
    """T as a number, or as TextBrewer's own schedules make it, one per row."""
    if kind == "number":
        return 4.0
    builder = {"flsw": presets.TEMPERATURE_SCHEDULER["flsw", 1, 2], "cwsm": presets.TEMPERATURE_SCHEDULER["cwsm", 0.1]}
    return builder[kind](student, teacher, 4.0)


def evaluate(loss: Any, student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, *arguments)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def converted(dtype: torch.dtype, arguments: Any) -> list[Any]:
    """The floating-point tensors among some arguments in a dtype, masks and numbers as they are."""
    return [a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]


def compare(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Ours and theirs against theirs in float64, its formulae having no bug here, from the same numbers of a dtype."""
    student, *rest = converted(dtype, arguments)
    expected = evaluate(getattr(host, name), *converted(torch.float64, [student, *rest]))
    theirs, mine = (evaluate(getattr(side, name), student, *rest) for side in (host, ours))
    assert mine[0].dtype == torch.float32
    assert mine[1].dtype == dtype
    if dtype == torch.float32:
        assert max(error(found, exact) for found, exact in zip(mine, expected, strict=True)) < 3e-6
        assert max(error(found, exact) for found, exact in zip(theirs, expected, strict=True)) < 3e-5
        return
    assert error(mine[0], expected[0]) <= max(error(theirs[0], expected[0]), 2e-6)
    assert error(mine[1], expected[1]) <= error(theirs[1], expected[1])
    assert error(mine[1], expected[1]) <= 1.1 * error(expected[1].to(dtype), expected[1])


# ------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("name", KD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, V), (3, 10, V)], ids=str)
@pytest.mark.parametrize("kind", ["number", "flsw", "cwsm"])
def test_kd_losses(name: str, dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
    student, teacher = tensors(shape, shape)
    compare(name, dtype, student, teacher, temperature_of(kind, student, teacher))


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [None, torch.bool, torch.int64, torch.float32], ids=str)
def test_hidden_losses(name: str, dtype: torch.dtype, mask: torch.dtype | None) -> None:
    compare(name, dtype, *tensors((3, 10, H), (3, 10, H)), None if mask is None else padding().to(mask))


def test_the_kd_loss_has_no_t_squared_and_the_teachers_entropy() -> None:
    student, teacher = tensors((5, V), (5, V))
    log_p, log_q = (teacher / 4).log_softmax(-1), (student / 4).log_softmax(-1)
    assert error(ours.kd_ce_loss(student, teacher, 4.0), -(log_p.exp() * log_q).sum(-1).mean()) < 1e-12


def test_pkd_of_vectors_and_a_0d_temperature() -> None:
    student, teacher = tensors((4, H), (4, H))
    assert error(ours.pkd_loss(student, teacher), host.pkd_loss(student, teacher)) < 1e-12
    temperature = torch.tensor(3.0, dtype=torch.float64)
    for name in KD:
        theirs, mine = (getattr(side, name)(student, teacher, temperature) for side in (host, ours))
        assert error(mine, theirs) < 1e-12


@pytest.mark.parametrize("name", [*KD, "hid_mse_loss", "cos_loss"])
def test_without_a_token_ours_is_zero_where_theirs_is_not_a_number(name: str) -> None:
    states = [*tensors((3, 10, H), (3, 10, H)), torch.zeros(3, 10)]
    arguments = tensors((0, V), (0, V)) if name in KD else states
    assert torch.isnan(getattr(host, name)(*arguments))
    value, gradient = evaluate(getattr(ours, name), *arguments)
    assert value == 0
    assert not gradient.any()


# ------------------------------------------------------------------------------------------------ distillers


class Model(nn.Module):
    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.body, self.head = nn.Embedding(V, width), nn.Linear(width, width), nn.Linear(width, V)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        first = self.embed(ids)
        second = torch.tanh(self.body(first))
        return {"logits": self.head(second), "hidden": (first, second)}


def adaptor(logits_mask: bool) -> Any:
    def adapt(batch: tuple[Tensor, Tensor], outputs: dict[str, Any]) -> dict[str, Any]:
        found = {"logits": outputs["logits"], "hidden": outputs["hidden"], "inputs_mask": batch[1]}
        return found | ({"logits_mask": batch[1]} if logits_mask else {})

    return adapt


def distiller(
    tmp_path: Any, kind: str = "GeneralDistiller", logits_mask: bool = True, with_nst: bool = False, **options: Any
) -> Any:
    matches: list[dict[str, Any]] = [
        {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": loss, "weight": weight, "proj": ["linear", 16, H]}
        for loss, weight in (("hidden_mse", 1.0), ("cos", 2.0), ("pkd", 0.5))
    ]
    if with_nst:  # which has no op of ours
        matches.append({"layer_T": [0, 1], "layer_S": [0, 1], "feature": "hidden", "loss": "nst", "weight": 0.1})
    torch.manual_seed(3)  # of the projections
    if kind != "GeneralDistiller":
        matches = []
    distillation = textbrewer.DistillationConfig(**{"temperature": 4, "intermediate_matches": matches} | options)
    training = textbrewer.TrainingConfig(
        device="cpu", log_dir=None, output_dir=str(tmp_path), gradient_accumulation_steps=2
    )
    adapt = adaptor(logits_mask)
    return getattr(textbrewer, kind)(training, distillation, Model(H, 1), Model(16, 2), adapt, adapt)


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randint(V, (3, 10), generator=g), padding().long()) for _ in range(2)]


def step(distiller: Any) -> tuple[dict[str, float], list[Tensor]]:
    """The losses of two batches by name, ours by their host's, and the gradients that they accumulate."""
    modules = nn.ModuleList([distiller.model_S, *getattr(distiller, "projs", [])])
    modules.zero_grad()
    found: dict[str, float] = {}
    for batch in batches():
        total, losses = distiller.train_on_batch(batch, {})
        (total / 2).backward()
        for name, loss in losses.items() | {("total", total)}:
            name = name.replace("distil_fast_", "")
            found[name] = found.get(name, 0.0) + loss.item()
    return found, [parameter.grad.clone() for parameter in modules.parameters()]


def assert_equal_steps(mine: Any, theirs: Any) -> None:
    assert mine[0] == pytest.approx(theirs[0], rel=3e-5)
    for found, expected in zip(mine[1], theirs[1], strict=True):
        assert error(found, expected) < 3e-5


@pytest.fixture
def tables() -> Iterator[None]:
    """TextBrewer's tables as they were, after a test that registers."""
    before = dict(presets.KD_LOSS_MAP), dict(presets.MATCH_LOSS_MAP)
    yield
    for table, old in zip((presets.KD_LOSS_MAP, presets.MATCH_LOSS_MAP), before, strict=True):
        table.clear()
        table.update(old)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("logits_mask", [True, False])
@pytest.mark.parametrize("kd_loss_type", ["ce", "mse"])
@pytest.mark.parametrize("schedule", [None, ["flsw", 1, 2]])
def test_apply_changes_no_number_of_a_distiller_with_matches(
    tmp_path: Any, logits_mask: bool, kd_loss_type: str, schedule: Any
) -> None:
    options = {"kd_loss_type": kd_loss_type} | ({} if schedule is None else {"temperature_scheduler": schedule})
    subject = distiller(tmp_path, logits_mask=logits_mask, with_nst=True, **options)
    before = step(subject)
    matches = subject.d_config.intermediate_matches
    with ours.apply(subject):
        assert subject.kd_loss is getattr(ours, f"kd_{kd_loss_type}_loss")
        assert [match.loss for match in matches] == [
            "distil_fast_hidden_mse", "distil_fast_cos", "distil_fast_pkd", "nst",
        ]  # fmt: skip
        assert_equal_steps(step(subject), before)
        with pytest.raises(HostChangedError, match="Is it ours already"):
            ours.apply(subject)
    assert subject.kd_loss is getattr(host, f"kd_{kd_loss_type}_loss")
    assert [match.loss for match in matches] == ["hidden_mse", "cos", "pkd", "nst"]
    assert_equal_steps(step(subject), before)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("kind", ["BasicDistiller", "MultiTeacherDistiller"])
def test_other_distillers_train_the_same_student(tmp_path: Any, kind: str) -> None:
    students = []
    for with_ours in (False, True):
        subject = distiller(tmp_path, kind)
        if kind == "MultiTeacherDistiller":
            subject.model_T = [subject.model_T, Model(H, 4)]
        if with_ours:
            ours.apply(subject)
        optimizer = torch.optim.SGD(subject.model_S.parameters(), lr=0.5)
        with subject:
            subject.train(optimizer, batches() * 2, num_epochs=1, callback=None)
        students.append(torch.cat([parameter.detach().flatten() for parameter in subject.model_S.parameters()]))
    start = torch.cat([parameter.detach().flatten() for parameter in Model(16, 2).parameters()])
    assert error(students[1] - start, students[0] - start) < 1e-4


@pytest.mark.usefixtures("tables")
def test_names_that_are_registered_serve_a_config(tmp_path: Any) -> None:
    names = ours.register()
    assert names == ours.register()
    assert {name: presets.KD_LOSS_MAP[name] for name in names[:2]} == {
        "distil_fast_ce": ours.kd_ce_loss,
        "distil_fast_mse": ours.kd_mse_loss,
    }
    assert [presets.MATCH_LOSS_MAP[name] for name in names[2:]] == [ours.hid_mse_loss, ours.cos_loss, ours.pkd_loss]
    assert presets.KD_LOSS_MAP["ce"] is host.kd_ce_loss  # theirs stay
    theirs = step(distiller(tmp_path))
    match = {"layer_T": 1, "layer_S": 1, "feature": "hidden", "weight": 1.0, "proj": ["linear", 16, H]}
    matches = [
        match | {"loss": "distil_fast_hidden_mse"},
        match | {"loss": "distil_fast_cos", "weight": 2.0},
        match | {"loss": "distil_fast_pkd", "weight": 0.5},
    ]
    mine = step(distiller(tmp_path, kd_loss_type="distil_fast_ce", intermediate_matches=matches))
    assert_equal_steps(mine, theirs)


# ------------------------------------------------------------------------------------------------ other shapes


@pytest.mark.usefixtures("tables")
def test_a_host_of_another_shape_is_refused_before_anything_is_replaced(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HostChangedError, match="a distiller with kd_loss and d_config, got SimpleNamespace"):
        ours.apply(types.SimpleNamespace())
    subject = distiller(tmp_path, "BasicDistiller")
    subject.kd_loss = nn.functional.l1_loss
    with pytest.raises(HostChangedError, match="has neither"):
        ours.apply(subject)
    subject = distiller(tmp_path)
    monkeypatch.setattr(presets, "MATCH_LOSS_MAP", {"cos": host.cos_loss})
    for call in (ours.register, lambda: ours.apply(subject)):
        with pytest.raises(HostChangedError, match=r"losses named hidden_mse, pkd in textbrewer\.presets"):
            call()
    assert subject.kd_loss is host.kd_ce_loss
    assert "distil_fast_ce" not in presets.KD_LOSS_MAP
