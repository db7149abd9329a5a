"""The objective is DistilBERT's loss in plain float64 torch, in value and gradient, of every family and option."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from distil_fast.training import objective as objective_module
from distil_fast.training.batch import IGNORED, MaskedBatch
from distil_fast.training.masked_lm import decoder
from distil_fast.training.objective import MaskedLMObjective
from distil_fast.training.settings import InputError, LossConfig
from distil_fast.training.student import student_from_teacher
from tests.training.families import FAMILIES, make_batch, make_model, relative_error

LOSS = LossConfig(temperature=3.0, head="fused")
COUNTS = torch.tensor([41.0, 13.0, 37.0])  # a step's, not this batch's
MODES = list(itertools.product(("all", "masked"), ("fused", "whole")))


def models(family: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student of two layers that is not its teacher's image, and the teacher."""
    teacher = make_model(family).to(dtype)
    student = student_from_teacher(teacher, [0, 2])
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return student, teacher


def oracle(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: MaskedBatch,
    loss: LossConfig,
    counts: Tensor,
    projections: Sequence[nn.Module] = (),
) -> tuple[Tensor, Tensor]:
    """Everything whole, in float64, by selection with bool masks: the loss and its terms."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "output_hidden_states": True}
    s = student(**inputs)
    with torch.no_grad():
        t = teacher(**inputs)
    real, labelled = batch.attention_mask.bool(), batch.labels != IGNORED
    rows, temperature = real if loss.positions == "all" else labelled, loss.temperature
    log_q = F.log_softmax(s.logits[rows] / temperature, -1)
    ce = temperature**2 * F.kl_div(log_q, F.softmax(t.logits[rows] / temperature, -1), reduction="sum") / counts[0]
    mlm = F.cross_entropy(s.logits[labelled], batch.labels[labelled], reduction="sum") / counts[1]
    pairs = loss.layers or [(-1, -1)]
    distances = []
    for i, (mine, theirs) in enumerate(pairs):
        hidden = s.hidden_states[mine][real]
        hidden = projections[i](hidden) if projections else hidden
        distances.append(1 - F.cosine_similarity(hidden, t.hidden_states[theirs][real], dim=-1))
    cos = torch.stack(distances).sum() / counts[2] / len(pairs)
    terms = torch.stack([ce, mlm, cos])
    alphas = torch.tensor([loss.alpha_ce, loss.alpha_mlm, loss.alpha_cos], dtype=terms.dtype)
    return (alphas * terms).sum(), torch.where(alphas > 0, terms, 0.0).detach()


def expected(
    module: MaskedLMObjective, batch: MaskedBatch, counts: Tensor = COUNTS
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The oracle's loss, terms and gradients, by their names in the module."""
    student = copy.deepcopy(module.student).double()
    teacher = copy.deepcopy(module.teacher).double()
    projections = copy.deepcopy(module.projections).double()
    loss, terms = oracle(student, teacher, batch, module.loss, counts.double(), list(projections))
    loss.backward()
    named = {f"student.{name}": p for name, p in student.named_parameters()}
    named |= {f"projections.{name}": p for name, p in projections.named_parameters()}
    return loss, terms, {name: p.grad for name, p in named.items() if p.grad is not None}


def run(
    module: MaskedLMObjective, batch: MaskedBatch, counts: Tensor = COUNTS
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    module.zero_grad()
    loss, terms = module(batch, counts)
    loss.backward()
    assert not terms.requires_grad
    return loss, terms, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same(actual: tuple[Any, ...], wanted: tuple[Any, ...], bound: float) -> None:
    loss, terms, gradients = actual
    assert abs(loss.item() - wanted[0].item()) <= bound * abs(wanted[0].item())
    assert relative_error(terms, wanted[1]) <= bound
    assert gradients.keys() == wanted[2].keys()
    largest = max(float(g.norm()) for g in wanted[2].values())
    for name, gradient in wanted[2].items():
        if any(part in name for part in ("k_lin.bias", "key.bias", "attn.k.bias")):
            continue  # a constant added to all scores: softmax does not see it
        assert gradient.norm() > 1e-6 * largest, name
        assert relative_error(gradients[name], gradient) <= bound, name


@pytest.mark.parametrize(("positions", "head"), MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_the_plain_ones(family: str, positions: str, head: str) -> None:
    module = MaskedLMObjective(*models(family), replace(LOSS, positions=positions, head=head))  # type: ignore[arg-type]
    for batch in (make_batch(family, surplus=2), make_batch(family, (9, 9))):
        assert_same(run(module, batch), expected(module, batch), 2e-4)


@pytest.mark.parametrize(("positions", "head"), MODES)
def test_in_double_precision_to_the_last_digits(positions: str, head: str) -> None:
    module = MaskedLMObjective(*models("bert", torch.float64), replace(LOSS, positions=positions, head=head))  # type: ignore[arg-type]
    batch = make_batch("bert", surplus=3)
    assert_same(run(module, batch), expected(module, batch), 1e-9)


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_masked_positions_that_are_not_known(positions: str) -> None:
    """Bernoulli masking: the labels tell them."""
    module = MaskedLMObjective(*models("bert"), replace(LOSS, positions=positions))  # type: ignore[arg-type]
    batch = make_batch("bert")
    known, unknown = run(module, batch), run(module, batch._replace(masked=None))
    assert_same(unknown, expected(module, batch), 2e-4)
    torch.testing.assert_close(unknown[1], known[1])


@pytest.mark.parametrize(
    "alphas", [(5.0, 2.0, 0.0), (5.0, 0.0, 1.0), (0.0, 2.0, 1.0), (5.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 1.0)]
)
@pytest.mark.parametrize(("positions", "head"), MODES)
def test_a_term_of_weight_zero_is_not_computed(
    alphas: tuple[float, float, float], positions: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ce, mlm, cos = alphas
    loss = replace(LOSS, alpha_ce=ce, alpha_mlm=mlm, alpha_cos=cos, positions=positions, head=head)  # type: ignore[arg-type]
    module, batch = MaskedLMObjective(*models("bert"), loss), make_batch("bert", surplus=1)
    wanted = expected(module, batch)
    widths: list[tuple[PreTrainedModel, int]] = []
    encoded: list[PreTrainedModel] = []
    transform, encode = objective_module.transform, objective_module.encode
    monkeypatch.setattr(
        objective_module, "transform", lambda m, hidden: (widths.append((m, len(hidden))), transform(m, hidden))[1]
    )
    monkeypatch.setattr(objective_module, "encode", lambda m, *rest: (encoded.append(m), encode(m, *rest))[1])
    actual = run(module, batch)
    head_rows = 27 if ce and positions == "all" else 6
    assert widths == [(m, head_rows) for m, runs in ((module.teacher, ce), (module.student, ce or mlm)) if runs]
    assert encoded == ([module.teacher] if ce or cos else []) + [module.student]
    unused = {name for name in wanted[2] if name.startswith("student.vocab_")} if not ce and not mlm else set()
    assert actual[2].keys() == wanted[2].keys() - unused
    assert_same(actual, (*wanted[:2], {k: v for k, v in wanted[2].items() if k in actual[2]}), 2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_is_trained_gets_a_gradient(family: str) -> None:
    for alpha in (0.0, 1.0):  # DistributedDataParallel would wait for the head's, where it does not run
        module = MaskedLMObjective(*models(family), replace(LOSS, alpha_ce=alpha, alpha_mlm=0.0))
        gradients = run(module, make_batch(family))[2]
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        assert gradients.keys() == trained
        head = set(module.student.parameters()) - set(module.student.base_model.parameters())
        assert head
        assert all(parameter.requires_grad == bool(alpha) for parameter in head)


@pytest.mark.parametrize("family", ["bert", "electra", "mpnet"])
def test_several_layers_are_a_mean(family: str) -> None:
    loss = replace(LOSS, layers=[(0, 0), (1, -3), (-1, 3), (2, 2)])
    module = MaskedLMObjective(*models(family), loss)
    batch = make_batch(family)
    assert_same(run(module, batch), expected(module, batch), 2e-4)


def test_another_width_goes_through_projections() -> None:
    teacher, student = make_model("bert"), make_model("distilbert", seed=5, hidden_size=10, num_hidden_layers=2)
    module = MaskedLMObjective(student, teacher, replace(LOSS, layers=[(1, 1), (2, 3)]))
    assert [tuple(p.weight.shape) for p in module.projections] == [(16, 10), (16, 10)]
    batch = make_batch("bert")
    actual = run(module, batch)
    assert {"projections.0.weight", "projections.1.bias"} <= actual[2].keys()
    assert_same(actual, expected(module, batch), 2e-4)
    assert {name.split(".")[0] for name in module.state_dict()} == {"student", "projections"}
    assert not MaskedLMObjective(student, teacher, replace(LOSS, alpha_cos=0.0)).projections
    assert not MaskedLMObjective(*models("bert"), LOSS).projections


def test_counts_are_the_denominators_of_the_plain_means() -> None:
    batch = make_batch("bert", surplus=4)
    for positions, first in (("all", 27.0), ("masked", 5.0)):
        module = MaskedLMObjective(*models("bert"), replace(LOSS, positions=positions))  # type: ignore[arg-type]
        counts = module.counts(batch)
        assert counts.tolist() == [first, 5.0, 27.0]
        assert counts.dtype == torch.float32
    assert torch.equal(batch.labels.flatten()[batch.masked] != IGNORED, torch.arange(9) < 5)


def test_accumulated_micro_batches_are_one() -> None:
    module = MaskedLMObjective(*models("roberta"), LOSS)
    parts = [make_batch("roberta", (13, 5), seed=1), make_batch("roberta", (4, 9), seed=2)]
    counts = torch.stack([module.counts(part) for part in parts]).sum(0)
    wanted = [expected(module, part, counts) for part in parts]
    module.zero_grad()
    for part in parts:
        module(part, counts)[0].backward()
    for name, p in module.student.named_parameters():
        if p.requires_grad and "key.bias" not in name:
            total = sum(gradients[f"student.{name}"] for _, _, gradients in wanted)
            assert relative_error(p.grad, total) <= 2e-4, name  # type: ignore[arg-type]


@pytest.mark.parametrize(("positions", "head"), MODES)
@pytest.mark.parametrize("own", [True, False])
def test_bf16_autocast_is_near(positions: str, head: str, own: bool) -> None:
    """The module's own autocast, or the one around it; bf16 rounds hidden states to 3 digits in every layer."""
    loss = replace(LOSS, positions=positions, head=head, temperature=2.0)  # type: ignore[arg-type]
    module = MaskedLMObjective(*models("bert"), loss, precision="bf16" if own else "fp32")
    batch = make_batch("bert", surplus=1)
    wanted = expected(module, batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=not own):
        loss_value, terms, gradients = run(module, batch)
    assert loss_value.dtype == terms.dtype == torch.float32
    assert 1e-5 < relative_error(terms, wanted[1]) < 0.05
    flat = [torch.cat([g[name].double().flatten() for name in wanted[2]]) for g in (gradients, wanted[2])]
    assert relative_error(*flat) < 0.1
    assert all(g.dtype == torch.float32 for g in gradients.values())


def test_teacher_in_a_precision_of_its_own() -> None:
    student, teacher = models("bert")
    exact = expected(MaskedLMObjective(student, copy.deepcopy(teacher), LOSS), make_batch("bert"))
    module = MaskedLMObjective(student, teacher, LOSS, teacher_precision="bf16")
    assert teacher.dtype == torch.bfloat16
    assert student.dtype == torch.float32
    _, terms, gradients = run(module, make_batch("bert"))
    assert 1e-5 < relative_error(terms, exact[1]) < 0.05
    assert all(g.dtype == torch.float32 for g in gradients.values())


@pytest.mark.parametrize("head", ["fused", "whole"])
def test_an_exact_teacher_beside_a_bf16_student(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without autocast, down to the logits."""
    loss = replace(LOSS, head=head)  # type: ignore[arg-type]
    module = MaskedLMObjective(*models("bert"), loss, precision="bf16", teacher_precision="fp32")
    batch, seen = make_batch("bert"), []
    name = "linear_distillation_loss" if head == "fused" else "distillation_loss"
    function, teachers = getattr(objective_module, name), {"fused": 2, "whole": 1}

    def spy(*args: Any, **options: Any) -> Any:
        seen.append((args[0].dtype, args[teachers[head]]))
        assert not torch.is_autocast_enabled("cpu") or head == "whole"
        return function(*args, **options)

    monkeypatch.setattr(objective_module, name, spy)
    run(module, batch)
    dtype, teacher = seen[0]
    assert dtype == torch.bfloat16
    with torch.no_grad():
        whole = module.teacher(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        exact = whole.logits[batch.attention_mask.bool()]
    logits = teacher @ decoder(module.teacher)[0].T + decoder(module.teacher)[1] if head == "fused" else teacher
    assert relative_error(logits, exact) < 1e-5


# ------------------------------------------------------------------------------------------------ the teacher's place


def test_the_teacher_is_outside_and_follows() -> None:
    student, teacher = models("bert")
    module = MaskedLMObjective(student, teacher, LOSS)
    assert module.teacher is teacher
    assert set(module.state_dict()) == {f"student.{name}" for name in student.state_dict()}
    assert not any(p is q for p in module.parameters() for q in teacher.parameters())
    module.train()
    assert student.training
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    nn.ModuleList([module]).double()  # through a module around it
    assert teacher.dtype == torch.float64
    module.float()
    run(module, make_batch("bert"))
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_meta_device_takes_the_student_alone() -> None:
    """accelerate shards a model there, and loads the registered weights again; the teacher's would be lost."""
    student, teacher = models("bert")
    module = MaskedLMObjective(student, teacher, LOSS)
    module.to("meta")
    assert student.device.type == "meta"
    assert teacher.device.type == "cpu"


def test_teacher_runs_where_the_batch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = models("bert")
    module = MaskedLMObjective(student, teacher, LOSS)
    batch = MaskedBatch(*(x.to("meta") for x in make_batch("bert")))
    monkeypatch.setattr(objective_module, "encode", lambda *_: pytest.fail("far enough"))
    with pytest.raises(pytest.fail.Exception, match="far enough"):
        module(batch, COUNTS)
    assert teacher.device.type == "meta"


# ------------------------------------------------------------------------------------------------ how it runs


class Watch(TorchDispatchMode):
    """Counts the calls that wait for the device on a GPU. A loss is one op here: what happens inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.losses: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero"):
            self.asked.append(str(func))
        if func.namespace == "distil_fast":
            self.losses.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("positions", "head"), MODES)
@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_a_step_asks_the_device_for_nothing(family: str, positions: str, head: str) -> None:
    """Of models, masks, rows and counts; on a CPU, where it would cost nothing. The losses have tests of their own."""
    module = MaskedLMObjective(*models(family), replace(LOSS, positions=positions, head=head))  # type: ignore[arg-type]
    with Watch() as watch:
        batch = make_batch(family, surplus=1)
        assert watch.asked  # making this batch does: the watch sees
        watch.asked.clear()
        loss, _ = module(batch, module.counts(batch))
        loss.backward()
    assert not watch.asked
    assert {"pair_loss", "chunked_loss" if head == "fused" else "row_loss"} <= set(watch.losses)


def test_the_heads_ask_where_the_rows_are_only_if_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    function, asked = objective_module.linear_distillation_loss, []

    def spy(*args: Any, **options: Any) -> Any:
        asked.append(options["gather"] and (options["soft_mask"] is not None or args[2] is None))
        return function(*args, **options)

    monkeypatch.setattr(objective_module, "linear_distillation_loss", spy)
    batch = make_batch("bert", surplus=1)
    for positions, alpha_ce in (("all", 5.0), ("masked", 5.0), ("masked", 0.0)):
        module = MaskedLMObjective(*models("bert"), replace(LOSS, positions=positions, alpha_ce=alpha_ce))  # type: ignore[arg-type]
        run(module, batch)
        run(module, batch._replace(masked=None))
    assert asked == [False, False, False, True, False, True]


def test_auto_is_whole_where_logits_are_small_and_exact() -> None:
    student, teacher = models("bert")
    module = MaskedLMObjective(student, teacher, LossConfig())
    weight = torch.empty(30522, 8, device="meta")
    features = torch.empty(64, 8)
    assert [module._fused(features[:rows], weight) for rows in (1, 34, 35)] == [False, False, True]
    with torch.autocast("cpu", torch.bfloat16):
        assert module._fused(features[:1], weight)
        fast = MaskedLMObjective(student, teacher, LossConfig(head_precision="fast"))
        assert [fast._fused(features[:rows], weight) for rows in (1, 63)] == [False, False]
    for head in ("fused", "whole"):
        assert MaskedLMObjective(student, teacher, LossConfig(head=head))._fused(features, weight) == (head == "fused")  # type: ignore[arg-type]
    batch = make_batch("bert")
    auto = MaskedLMObjective(student, teacher, replace(LOSS, head="auto"))
    assert_same(run(auto, batch), expected(auto, batch), 2e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_encoders_compute_the_same(backend: str) -> None:
    module, batch = MaskedLMObjective(*models("bert"), replace(LOSS, layers=[(1, 2), (-1, -1)])), make_batch("bert")
    names = set(module.state_dict())
    wanted = expected(module, batch)
    module.compile_models(backend=backend)
    assert_same(run(module, batch), wanted, 2e-4)
    assert set(module.state_dict()) == names


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha_ce": -1.0}, r"loss.alpha_ce: expected a number >= 0, got -1"),
        ({"alpha_cos": float("nan")}, r"loss.alpha_cos: expected a number >= 0, got nan"),
        ({"alpha_ce": 0.0, "alpha_mlm": 0.0, "alpha_cos": 0.0}, "at least one term"),
        ({"temperature": 0.0}, r"loss.temperature: expected a number > 0, got 0"),
        ({"layers": [(0, 0), (3, 1)]}, r"a student's layer from -3 to 2 .*, got 3 in \[3, 1\]"),
        ({"layers": [(-3, -5)]}, r"a teacher's layer from -4 to 3 .*, got -5"),
        ({"layers": []}, "expected pairs"),
    ],
)
def test_bad_choices_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MaskedLMObjective(*models("bert"), replace(LOSS, **change))


def test_models_that_do_not_fit_are_refused() -> None:
    student, teacher = models("bert")
    with pytest.raises(InputError, match="vocabulary of 67 tokens, got 66"):
        MaskedLMObjective(make_model("bert", vocab_size=66), teacher, LOSS)
    with pytest.raises(InputError, match="got a BertModel"):
        MaskedLMObjective(student, teacher.bert, LOSS)
    for name in ("precision", "teacher_precision"):
        with pytest.raises(InputError, match=f"^{name}: expected one of fp32, bf16, fp16, got 'fp8'"):
            MaskedLMObjective(student, teacher, LOSS, **{name: "fp8"})
