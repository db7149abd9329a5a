"""Task distillation: the objective against plain torch in float64, its denominators, and students of classifiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from distil_fast.training.batch import IGNORED, Batch
from distil_fast.training.classification import ClassificationObjective, classifier_inputs
from distil_fast.training.classifier_student import classifier_student
from distil_fast.training.settings import InputError, LossConfig

Make = Callable[..., PreTrainedModel]
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "initializer_range": 0.4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def classifier(kind: str = "bert", outputs: int = 3, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    made: dict[str, tuple[type, type]] = {
        "bert": (BertConfig, BertForSequenceClassification),
        "roberta": (RobertaConfig, RobertaForSequenceClassification),
        "electra": (ElectraConfig, ElectraForSequenceClassification),
    }
    config, model = made[kind]
    more = {"embedding_size": 8} if kind == "electra" else {}
    built: PreTrainedModel = model(config(**SHAPE | more | {"num_labels": outputs} | settings))
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return built.eval()


def batch_of(sequences: int = 6, regression: bool = False, seed: int = 0) -> Batch:
    """Ragged, pairs of texts; the last sequence has no label."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 13, (sequences, 1), generator=generator)
    mask = (torch.arange(12) < lengths).long()
    input_ids = torch.randint(5, 40, (sequences, 12), generator=generator) * mask
    labels = torch.randint(3, (sequences,), generator=generator)
    labels[-1] = IGNORED
    if regression:
        labels = torch.rand(sequences, generator=generator)
        labels[-1] = torch.nan
    types = (torch.arange(12) >= 3).long() * mask
    return Batch(input_ids, mask, mask.flatten().nonzero().squeeze(1), labels, types)


def expected(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, loss: LossConfig) -> Tensor:
    """The terms in float64, as the docstring has them."""
    s, t = (
        model.double()(**classifier_inputs(model, batch), output_hidden_states=True) for model in (student, teacher)
    )
    assert batch.labels is not None
    temperature, real = loss.temperature, batch.attention_mask.bool()
    pairs = loss.layers or [(-1, -1)]
    distances = [1 - F.cosine_similarity(s.hidden_states[i], t.hidden_states[j], -1)[real] for i, j in pairs]
    cos = torch.stack(distances).mean()
    if student.config.num_labels == 1:
        ce = (s.logits - t.logits).square().mean()
        label = (s.logits[:-1, 0] - batch.labels[:-1].double()).square().mean()
    else:
        soft = [(logits / temperature).log_softmax(-1) for logits in (s.logits, t.logits)]
        ce = F.kl_div(*soft, reduction="batchmean", log_target=True) * temperature**2
        label = F.cross_entropy(s.logits, batch.labels, ignore_index=IGNORED)
    return torch.stack([ce, label, cos])


@pytest.mark.parametrize("outputs", [3, 1])
@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(),
        LossConfig(temperature=3.0, alpha_ce=0.7, alpha_mlm=0.0, alpha_cos=2.0),
        LossConfig(alpha_ce=0.0, alpha_mlm=1.5, alpha_cos=0.0),
        LossConfig(alpha_ce=0.0, alpha_mlm=0.0, layers=[(1, 2), (-1, -1)]),
        LossConfig(alpha_cos=0.0),
    ],
)
def test_terms_and_gradients_are_those_of_plain_torch(outputs: int, loss: LossConfig) -> None:
    teacher = classifier(outputs=outputs)
    student = classifier_student(teacher, [0, 3])
    batch = batch_of(regression=outputs == 1)
    objective = ClassificationObjective(student, teacher, loss)
    total, terms = objective(batch, objective.counts(batch))
    total.backward()
    found = {name: p.grad.double() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    wanted = expected(student, teacher, batch, loss)
    alphas = torch.tensor([loss.alpha_ce, loss.alpha_mlm, loss.alpha_cos])
    (wanted * alphas).sum().backward()
    used = alphas > 0
    assert terms[used].tolist() == pytest.approx(wanted[used].tolist(), rel=2e-5)
    assert terms[~used].tolist() == [0.0] * int((~used).sum())
    assert total.item() == pytest.approx((wanted * alphas).sum().item(), rel=2e-5)
    for name, parameter in student.named_parameters():
        if parameter.grad is None or name.endswith("k_lin.bias"):  # whose gradient is 0 but for rounding
            continue
        assert (found[name] - parameter.grad).norm() <= 1e-4 * parameter.grad.norm(), name
    assert len(found) > 10
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("outputs", [3, 1])
def test_one_batch_of_six_is_three_of_two(outputs: int) -> None:
    """Each part divided by the counts of all, as the loop does it."""
    teacher = classifier(outputs=outputs)
    student = classifier_student(teacher)
    objective = ClassificationObjective(student, teacher, LossConfig())
    whole = batch_of(regression=outputs == 1)
    parts = []
    for start in (0, 2, 4):
        fields = [None if field is None else field[start : start + 2] for field in whole]
        mask = fields[1]
        assert mask is not None
        fields[2] = mask.flatten().nonzero().squeeze(1)
        parts.append(Batch(*fields))  # type: ignore[arg-type]
    counts = torch.stack([objective.counts(part) for part in parts]).sum(0)
    assert counts.tolist() == objective.counts(whole).tolist() == [6, 5, whole.attention_mask.sum()]

    loss, terms = objective(whole, counts)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    shares = [objective(part, counts) for part in parts]
    torch.stack([share for share, _ in shares]).sum().backward()
    torch.testing.assert_close(sum(term for _, term in shares), terms, rtol=1e-5, atol=0)
    for name, parameter in student.named_parameters():
        if parameter.grad is not None and not name.endswith("k_lin.bias"):  # whose gradient is 0 but for rounding
            assert (gradients[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
    means = sum(objective(part, objective.counts(part))[1] for part in parts) / 3
    assert (means - terms).abs().max() > 1e-3  # a mean of means is something else


def test_the_teacher_is_not_part_of_the_module() -> None:
    teacher = classifier()
    objective = ClassificationObjective(classifier_student(teacher), teacher, LossConfig())
    assert all(name.startswith("student.") for name in objective.state_dict())
    objective.train()
    assert objective.student.training
    assert not teacher.training
    objective.double()  # as .to(device) would
    assert teacher.classifier.weight.dtype == torch.float64
    assert objective.teacher is teacher


def test_without_a_teacher_it_is_fine_tuning() -> None:
    student, batch = classifier(), batch_of()
    objective = ClassificationObjective(student, None, LossConfig(alpha_ce=0.0, alpha_mlm=1.0, alpha_cos=0.0))
    loss, terms = objective(batch, objective.counts(batch))
    logits = student(**classifier_inputs(student, batch)).logits
    assert loss.item() == pytest.approx(F.cross_entropy(logits, batch.labels).item(), rel=1e-5)
    assert terms[[0, 2]].tolist() == [0.0, 0.0]


def test_batches_without_labels_teach_by_the_teacher_alone() -> None:
    teacher = classifier()
    objective = ClassificationObjective(classifier_student(teacher), teacher, LossConfig())
    batch = batch_of()._replace(labels=None)
    counts = objective.counts(batch)
    assert counts[1].item() == 0
    loss, terms = objective(batch, counts)
    assert loss.isfinite()
    assert terms[1].item() == 0
    loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": None}, "teacher: expected one for alpha_ce"),
        ({"loss": LossConfig(alpha_ce=0, alpha_mlm=0, alpha_cos=0)}, "at least one of alpha_ce"),
        ({"student": classifier(outputs=2)}, "expected 2 outputs as the student has, got 3"),
        ({"student": classifier(hidden_size=32)}, "one width, got 32 of the student and 16"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"student": classifier(), "teacher": classifier(), "loss": LossConfig()} | change
    with pytest.raises(InputError, match=message):
        ClassificationObjective(**arguments)


def test_a_student_learns_its_teachers_distribution() -> None:
    """On batches without any label, so that the teacher alone can have taught it."""
    teacher = classifier()
    student = classifier_student(teacher)
    objective = ClassificationObjective(student, teacher, LossConfig())
    optimizer = torch.optim.AdamW(student.parameters(), 5e-3)
    values = []
    for step in range(60):
        batch = batch_of(16, seed=step % 2)._replace(labels=None)
        loss, terms = objective(batch, objective.counts(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(terms)
    first, last = values[0], values[-1]
    assert last[0] < 0.05 * first[0]
    assert last[2] < 0.2 * first[2]


# ------------------------------------------------------------------------------------------------ students


def test_token_types_reach_models_that_have_them_only() -> None:
    batch = batch_of()
    assert "token_type_ids" in classifier_inputs(classifier(), batch)
    assert "token_type_ids" not in classifier_inputs(classifier("roberta", type_vocab_size=1), batch)
    assert "token_type_ids" not in classifier_inputs(classifier_student(classifier()), batch)


def test_a_berts_student_is_a_distilbert_of_its_weights() -> None:
    teacher = classifier(id2label={0: "a", 1: "b", 2: "c"})
    student = classifier_student(teacher, [0, 3])
    assert isinstance(student, DistilBertForSequenceClassification)
    assert isinstance(teacher, BertForSequenceClassification)
    assert student.config.id2label == {0: "a", 1: "b", 2: "c"}
    pairs = [
        (student.distilbert.embeddings.word_embeddings, teacher.bert.embeddings.word_embeddings),
        (student.distilbert.transformer.layer[1].ffn.lin1, teacher.bert.encoder.layer[3].intermediate.dense),
        (student.pre_classifier, teacher.bert.pooler.dense),
        (student.classifier, teacher.classifier),
    ]
    for copied, original in pairs:
        assert torch.equal(copied.weight, original.weight)


@pytest.mark.parametrize("kind", ["roberta", "electra"])
def test_others_keep_their_class_and_their_head(kind: str) -> None:
    teacher, batch = classifier(kind), batch_of()
    inputs = classifier_inputs(teacher, batch)
    with torch.no_grad():
        same = classifier_student(teacher, [0, 1, 2, 3])(**inputs).logits
        shallow = classifier_student(teacher, [0, 2])
        output = shallow(**inputs, output_hidden_states=True)
        states = teacher(**inputs, output_hidden_states=True)
    assert type(shallow) is type(teacher)
    assert shallow.config.num_hidden_layers == 2
    assert torch.equal(same, states.logits)
    assert torch.equal(output.hidden_states[1], states.hidden_states[1])
    assert not torch.equal(output.logits, states.logits)
    for mine, theirs in ((0, 0), (1, 2)):
        copied, original = (model.base_model.encoder.layer[i] for model, i in ((shallow, mine), (teacher, theirs)))
        assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), original.parameters(), strict=True))
    assert teacher.config.num_hidden_layers == 4


def test_layers_out_of_range_are_refused() -> None:
    for layers in ([], [4], [-1]):
        with pytest.raises(InputError, match="indices from 0 to 3"):
            classifier_student(classifier("roberta"), layers)
