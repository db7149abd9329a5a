"""The nn.Module faces: each equals its function, takes all of its settings, and has no state.

It knows no formula. Next: test_functional.py; test_hidden.py has HiddenLoss, which has state.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import distil_fast
from distil_fast import (
    JSD,
    AttentionLoss,
    CosineLoss,
    CrossEntropyLoss,
    DistillationLoss,
    DivergenceLoss,
    HiddenMSELoss,
    LogitMSELoss,
    TripleLoss,
)
from tests.batch import Batch, assert_identical, make_batch, run

FACES: dict[type[nn.Module], Callable[..., Any]] = {
    DistillationLoss: distil_fast.distillation_loss,
    DivergenceLoss: distil_fast.divergence_loss,
    CrossEntropyLoss: distil_fast.cross_entropy,
    CosineLoss: distil_fast.cosine_loss,
    HiddenMSELoss: distil_fast.mse_loss,
    LogitMSELoss: distil_fast.logit_mse,
    AttentionLoss: distil_fast.attention_loss,
    TripleLoss: distil_fast.triple_loss,
}

IGNORED = 5
SETTINGS: dict[type[nn.Module], dict[str, Any]] = {
    DistillationLoss: {
        "temperature": 3.0,
        "soft_weight": 0.3,
        "hard_weight": 0.6,
        "ignore_index": IGNORED,
        "divergence": JSD(0.3),
        "t_squared": False,
        "label_smoothing": 0.1,
        "class_weights": None,  # not beside label smoothing: a test of their own
        "z_loss": 0.01,
        "student_logit_scale": 0.5,
        "student_softcap": 3.0,
        "teacher_logit_scale": 1.5,
        "teacher_softcap": 4.0,
        "vocab_size": 36,
        "reduction": "sum",
        "inplace": True,
    },
    DivergenceLoss: {
        "divergence": "reverse_kl",
        "temperature": 3.0,
        "t_squared": True,
        "student_logit_scale": 0.5,
        "student_softcap": 3.0,
        "teacher_logit_scale": 1.5,
        "teacher_softcap": 4.0,
        "vocab_size": 36,
        "reduction": "none",
    },
    CrossEntropyLoss: {
        "ignore_index": IGNORED,
        "label_smoothing": 0.2,
        "class_weights": None,
        "z_loss": 0.01,
        "logit_scale": 0.5,
        "softcap": 3.0,
        "vocab_size": 36,
        "reduction": "none",
    },
    CosineLoss: {"reduction": "none"},
    HiddenMSELoss: {"reduction": "none"},
    LogitMSELoss: {"reduction": "none"},
    AttentionLoss: {"layer_map": [(0, 1)], "kind": "kl"},
    TripleLoss: {"temperature": 3.0, "alpha_ce": 0.1, "alpha_mlm": 0.2, "alpha_cos": 0.3, "restrict_ce_to_mask": True},
}
for _settings in SETTINGS.values():
    _settings["backend"] = "native"

# tensors and counts that a forward takes beyond its positional arguments
EXTRAS: dict[type[nn.Module], Callable[[Batch], dict[str, Any]]] = {
    DistillationLoss: lambda b: {"soft_mask": b.token_weights, "soft_count": 7.0, "hard_count": 3.0},
    DivergenceLoss: lambda b: {"mask": b.token_weights, "count": 7.0},
    CrossEntropyLoss: lambda b: {"count": 7.0},
    CosineLoss: lambda b: {"mask": b.token_weights, "count": 7.0},
    HiddenMSELoss: lambda b: {"mask": b.token_weights, "count": 7.0},
    LogitMSELoss: lambda b: {"mask": b.token_weights, "count": 7.0},
    AttentionLoss: lambda b: {"attention_mask": b.attention_mask, "count": 7.0},
    TripleLoss: lambda b: {"ce_count": 7.0, "mlm_count": 3.0, "cos_count": 2.0},
}

every_face = pytest.mark.parametrize("face", FACES)


def arguments(face: type[nn.Module], b: Batch) -> tuple[Any, ...]:
    student_map, teacher_map = (x.unsqueeze(1).softmax(-1) for x in (b.student_hidden, b.teacher_hidden))
    return {
        DistillationLoss: b[:3],
        DivergenceLoss: b[:2],
        CrossEntropyLoss: (b.student_logits, b.labels.clamp(min=0)),
        CosineLoss: b[3:5],
        HiddenMSELoss: b[3:5],
        LogitMSELoss: b[:2],
        AttentionLoss: ((student_map, 0.5 * student_map), (teacher_map, teacher_map.flip(-1))),
        TripleLoss: b[:6],
    }[face]


def labelled() -> Batch:
    """A batch whose labels are all in range, as `ignore_index` is a setting here."""
    b = make_batch(3, 5)
    labels = b.labels.clamp(min=0)
    labels[1, 2] = IGNORED
    return b._replace(labels=labels)


@every_face
def test_equals_its_function_by_default(face: type[nn.Module]) -> None:
    actual = run(lambda b: face()(*arguments(face, b)), labelled())
    assert_identical(actual, run(lambda b: FACES[face](*arguments(face, b)), labelled()))


@every_face
def test_hands_every_setting_over(face: type[nn.Module]) -> None:
    settings = SETTINGS[face]
    actual = run(lambda b: face(**settings)(*arguments(face, b)), labelled())
    assert_identical(actual, run(lambda b: FACES[face](*arguments(face, b), **settings), labelled()))
    with pytest.raises(ValueError, match="backend: expected one of"):
        face(**{**settings, "backend": "none such"})(*arguments(face, labelled()))
    for name in settings.keys() - {"inplace", "backend", "class_weights"}:  # each of the others makes a difference
        others = {key: value for key, value in settings.items() if key != name}
        other = run(lambda b, s=others: face(**s)(*arguments(face, b)), labelled())
        assert not torch.equal(other.values[0], actual.values[0]), name


@every_face
def test_takes_masks_and_counts_in_forward(face: type[nn.Module]) -> None:
    settings, extras = {"temperature": 3.0} if face in (DistillationLoss, TripleLoss) else {}, EXTRAS[face]
    actual = run(lambda b: face(**settings)(*arguments(face, b), **extras(b)), labelled())
    assert_identical(actual, run(lambda b: FACES[face](*arguments(face, b), **extras(b), **settings), labelled()))
    assert not torch.equal(actual.values[0], run(lambda b: face(**settings)(*arguments(face, b)), labelled()).values[0])


@every_face
def test_has_every_parameter_and_default_of_its_function(face: type[nn.Module]) -> None:
    theirs = inspect.signature(FACES[face]).parameters
    constructor = {n: p for n, p in inspect.signature(face).parameters.items() if n != "self"}
    forward = {n: p for n, p in inspect.signature(face.forward).parameters.items() if n != "self"}
    assert not constructor.keys() & forward.keys()
    assert constructor.keys() | forward.keys() == theirs.keys()
    for name, parameter in {**constructor, **forward}.items():
        assert parameter.default == theirs[name].default, name
    assert constructor.keys() == SETTINGS[face].keys(), "a new setting belongs into this file's table"


@every_face
def test_has_no_state_and_says_its_settings(face: type[nn.Module]) -> None:
    module = face(**SETTINGS[face])
    assert not module.state_dict()
    assert not list(module.parameters())
    assert not list(module.buffers())
    for name, value in SETTINGS[face].items():
        assert f"{name}={value!r}" in repr(module)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert repr(other) == repr(module)


@pytest.mark.parametrize("face", [DistillationLoss, CrossEntropyLoss])
def test_class_weights_are_a_buffer(face: type[nn.Module]) -> None:
    """They are saved and moved with the module, as torch.nn.CrossEntropyLoss's are."""
    weights = torch.linspace(0.1, 2.0, 37)
    module = face(class_weights=weights)
    actual = run(lambda b: module(*arguments(face, b)), labelled())
    assert_identical(actual, run(lambda b: FACES[face](*arguments(face, b), class_weights=weights), labelled()))
    assert not torch.equal(actual.values[0], run(lambda b: face()(*arguments(face, b)), labelled()).values[0])
    assert list(module.state_dict()) == ["class_weights"]
    other = face(class_weights=torch.ones(37))
    other.load_state_dict(module.state_dict())
    assert_identical(run(lambda b: other(*arguments(face, b)), labelled()), actual)
    assert module.to(torch.float64).class_weights.dtype == torch.float64
    assert "class_weights=(37,)" in repr(module)


@every_face
def test_refuses_an_unknown_setting(face: type[nn.Module]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta'"):
        face(beta=0.5)


def test_wrong_settings_raise_when_called() -> None:
    b = make_batch(3)
    with pytest.raises(ValueError, match="temperature"):
        DistillationLoss(temperature=0.0)(*b[:3])
    with pytest.raises(ValueError, match="forward_kl"):
        DivergenceLoss(divergence="kl")(*b[:2])
