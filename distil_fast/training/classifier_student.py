"""Makes the student of task distillation: a classifier with some of a fine-tuned classifier's layers.

It knows how layers are numbered in Hugging Face models; what a DistilBERT has for a BERT is student.py's knowledge.
Next: classification.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
)

from distil_fast.training.settings import InputError
from distil_fast.training.student import evenly_spaced_layers, student_from_teacher


def classifier_student(teacher: PreTrainedModel, layers: Sequence[int] | None = None) -> PreTrainedModel:
    """A sequence classifier that starts from copies of the teacher's embeddings, some of its layers, and its head.

    A BERT gives a DistilBERT, which has no token types and no pooler: the pooler's weights become its pre_classifier
    (behind which stands a ReLU, where BERT has a tanh), the classifier's stay. Any other model gives one of its own
    class with fewer layers and the head as it is.

    Args:
        teacher: a `...ForSequenceClassification`.
        layers: teacher layer, from 0, of each student layer; None: `evenly_spaced_layers` for half as many.

    Returns:
        The student in evaluation mode, on the teacher's device, in its dtype.

    Raises:
        InputError: an empty list of layers, one out of range, or a model in which no list of layers can be found.
    """
    depth = teacher.config.num_hidden_layers
    layers = evenly_spaced_layers(depth) if layers is None else list(layers)
    if not layers or not all(0 <= layer < depth for layer in layers):
        raise InputError(f"student.layers: expected indices from 0 to {depth - 1}, got {layers}.")
    if isinstance(teacher, BertForSequenceClassification):
        student: PreTrainedModel = _distilbert(teacher, layers)
    else:
        student = _with_layers(teacher, layers)
    student.to(teacher.device, teacher.dtype)  # type: ignore[arg-type]  # decorated without types in transformers
    return student.train(False)


def _distilbert(teacher: BertForSequenceClassification, layers: Sequence[int]) -> DistilBertForSequenceClassification:
    """By way of masked language models, whose student student.py knows how to make."""
    shell_config = copy.deepcopy(teacher.config)
    shell_config.tie_word_embeddings = True
    shell = BertForMaskedLM(shell_config)
    shell.bert.load_state_dict(
        {name: value for name, value in teacher.bert.state_dict().items() if not name.startswith("pooler.")}
    )
    half = student_from_teacher(shell, layers)
    settings = half.config.to_dict() | {
        "id2label": teacher.config.id2label,
        "label2id": teacher.config.label2id,
        "problem_type": teacher.config.problem_type,
        "seq_classif_dropout": teacher.config.classifier_dropout or teacher.config.hidden_dropout_prob,
    }
    student = DistilBertForSequenceClassification(DistilBertConfig(**settings))
    student.distilbert.load_state_dict(half.base_model.state_dict())
    assert teacher.bert.pooler is not None  # as in every classifier
    student.pre_classifier.load_state_dict(teacher.bert.pooler.dense.state_dict())
    student.classifier.load_state_dict(teacher.classifier.state_dict())
    return student


def _with_layers(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    prefix = _layer_list(teacher)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(layers)
    student = type(teacher)(config)
    weights = {}
    for name, value in teacher.state_dict().items():
        if not name.startswith(prefix):
            weights[name] = value
            continue
        number, _, rest = name.removeprefix(prefix).partition(".")
        for student_layer, teacher_layer in enumerate(layers):
            if int(number) == teacher_layer:
                weights[f"{prefix}{student_layer}.{rest}"] = value
    student.load_state_dict(weights)
    return student


def _layer_list(model: PreTrainedModel) -> str:
    """The prefix of the layers' weights, such as "roberta.encoder.layer."."""
    depth = model.config.num_hidden_layers
    found = [
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and _alike(module)
    ]
    if len(found) != 1:
        raise InputError(
            f"teacher: expected one list of {depth} layers in a {type(model).__name__}, found {len(found)}. Make the "
            "student yourself and pass it to ClassificationObjective."
        )
    return found[0]


def _alike(layers: nn.ModuleList) -> bool:
    shapes = [{name: value.shape for name, value in layer.state_dict().items()} for layer in layers]
    return bool(shapes[0]) and all(shape == shapes[0] for shape in shapes)
