"""Makes the student: a masked language model whose layers are some of the teacher's, ready to be distilled.

It knows which layers to take, how BERT's weights are named in DistilBERT, and what becomes of token types; nothing of
data or losses. As in the original, token types and pooler are left out; unlike there, the head's transform is copied.
Next: architectures.py, where a family's parts are; objective.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import AutoConfig, DistilBertConfig, PreTrainedConfig, PreTrainedModel

from distil_fast.training.architectures import ARCHITECTURES, architecture, layer_count, model_class, of_type
from distil_fast.training.settings import InputError, StudentConfig

EMBEDDINGS = ("word_embeddings.weight", "position_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")
LAYER_MODULES = {  # of BERT: of DistilBERT
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
TOKEN_TYPES = ("drop", "fold")


def evenly_spaced_layers(teacher_layers: int, student_layers: int | None = None) -> list[int]:
    """The teacher layer of each student layer: round(i (L - 1) / (n - 1)), i = 0 .. n - 1; first and last are kept.

    Args:
        teacher_layers: L.
        student_layers: n; None: half of L. A single layer is the teacher's first.

    Returns:
        n distinct indices, ascending: [0, 2, 4, 7, 9, 11] of 12, [0, 2, 5] of 6.

    Raises:
        InputError: not 1 <= n <= L.
    """
    n = max(1, teacher_layers // 2) if student_layers is None else student_layers
    if not 1 <= n <= teacher_layers:
        raise InputError(f"student_layers: expected 1 to {teacher_layers} (the teacher's layers), got {n}.")
    gaps = max(1, n - 1)
    # A half goes down, in integers: Python's round() would send 2.5 down and 3.5 up.
    return [-((gaps - 2 * i * (teacher_layers - 1)) // (2 * gaps)) for i in range(n)]


def make_student(teacher: PreTrainedModel, config: StudentConfig) -> PreTrainedModel:
    """The student that a configuration describes; random weights are drawn from torch's global generator.

    Raises:
        InputError: a teacher of no supported family, layers out of range, choices that contradict each other, or a
            student's configuration that cannot be read or does not fit the teacher's vocabulary.
    """
    random = config.config is not None or config.initialisation == "random"
    if random and config.token_types == "fold":
        raise InputError(
            "student.token_types: expected 'drop' for a student of random weights, got 'fold': there is nothing to "
            "fold the teacher's token types into."
        )
    if config.config is not None:
        if config.layers is not None:
            raise InputError(
                f"student.layers: expected none beside student.config, which has its own number, got {config.layers}."
            )
        return _from_configuration(teacher, config.config)
    layers = config.layers
    if not isinstance(layers, list):
        layers = evenly_spaced_layers(layer_count(teacher), layers)
    if config.initialisation == "random":
        return _empty_student(teacher, _checked(layers, teacher))
    return student_from_teacher(teacher, layers, token_types=config.token_types)


def student_from_teacher(
    teacher: PreTrainedModel, layers: Sequence[int] | None = None, *, token_types: str = "drop"
) -> PreTrainedModel:
    """A student of the teacher's width that starts from copies of its weights, in evaluation mode.

    Of a BERT or a DistilBERT it is a `DistilBertForMaskedLM`, of the other families their own class with fewer layers.
    Copied are the embeddings with their LayerNorm, the chosen layers, and the masked-LM head with its transform. The
    decoder is tied to the word embeddings if the teacher's is. DistilBERT's LayerNorms have eps 1e-12 whatever the
    teacher's `layer_norm_eps` (BERT's is the same). A class that cannot do without token types gets a table of one row
    of zeros, which is not trained.

    Args:
        teacher: of a family in architectures.py.
        layers: teacher layer of each student layer, in any order; None: `evenly_spaced_layers` for half as many.
        token_types: "drop" the teacher's embedding of the first type, as the original does (it is zero in the released
            RoBERTa models); "fold" it into the position embeddings: the student's embeddings are then the teacher's.

    Raises:
        InputError: a teacher of no supported family, an empty list of layers, or one out of range.
    """
    if token_types not in TOKEN_TYPES:
        raise InputError(f"token_types: expected one of {', '.join(TOKEN_TYPES)}, got {token_types!r}.")
    layers = evenly_spaced_layers(layer_count(teacher)) if layers is None else layers
    student = _empty_student(teacher, _checked(layers, teacher))
    weights = _student_weights(teacher, student, layers)
    row = architecture(student)
    if token_types == "fold" and (types := _token_types(teacher)) is not None:
        name = f"{row.embeddings}.position_embeddings.weight"
        weights[name] = weights[name] + types.weight.detach()[0]
    if (own := _token_types(student)) is not None:
        weights[f"{row.embeddings}.token_type_embeddings.weight"] = own.weight.detach()
    student.load_state_dict(weights)
    return student


# ------------------------------------------------------------------------------------------------ shapes


def _checked(layers: Sequence[int], teacher: PreTrainedModel) -> Sequence[int]:
    most = layer_count(teacher) - 1
    if not layers or not all(0 <= layer <= most for layer in layers):
        raise InputError(f"layers: expected indices from 0 to {most} (the teacher's layers), got {list(layers)}.")
    return layers


def _empty_student(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Of the teacher's width, with so many layers, and random weights."""
    if teacher.config.model_type == "bert":
        config: PreTrainedConfig = _distilbert_configuration(teacher.config)
    else:
        config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(layers)
    if hasattr(config, "type_vocab_size"):
        config.type_vocab_size = 1
    student = _model(config, teacher)
    if (types := _token_types(student)) is not None:
        types.weight.requires_grad_(False).zero_()
    return student


def _distilbert_configuration(bert: PreTrainedConfig) -> DistilBertConfig:
    return DistilBertConfig(
        vocab_size=bert.vocab_size,
        max_position_embeddings=bert.max_position_embeddings,
        n_heads=bert.num_attention_heads,
        dim=bert.hidden_size,
        hidden_dim=bert.intermediate_size,
        dropout=bert.hidden_dropout_prob,
        attention_dropout=bert.attention_probs_dropout_prob,
        activation=bert.hidden_act,
        initializer_range=bert.initializer_range,
        pad_token_id=bert.pad_token_id,
        tie_word_embeddings=bert.tie_word_embeddings,
    )


def _from_configuration(teacher: PreTrainedModel, path: Path) -> PreTrainedModel:
    """Of another shape, with random weights."""
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"student.config: expected a Hugging Face configuration, {path} is none: {error}") from error
    of_type(config.model_type, "student.config")
    if config.vocab_size != teacher.config.vocab_size:
        raise InputError(
            f"student.config: expected the teacher's vocabulary of {teacher.config.vocab_size} tokens, got "
            f"{config.vocab_size} in {path}."
        )
    config.pad_token_id = teacher.config.pad_token_id  # its embedding is not trained: it must be the same token's
    student = _model(config, teacher)
    padding = student.get_submodule(f"{architecture(student).embeddings}.word_embeddings").padding_idx
    if padding not in (None, config.pad_token_id):
        raise InputError(
            f"student.config: a {config.model_type!r} takes token {padding} for padding, and the teacher's tokenizer "
            f"pads with {config.pad_token_id}. Choose another family for the student."
        )
    return student


def _model(config: PreTrainedConfig, teacher: PreTrainedModel) -> PreTrainedModel:
    """A new model of random weights, where the teacher is, with its attention where the class has that."""
    student = model_class(ARCHITECTURES[config.model_type])(config)
    attention = getattr(teacher.config, "_attn_implementation", None)
    if attention == "eager":
        student.set_attn_implementation(attention)
    student.to(teacher.device, teacher.dtype)  # type: ignore[arg-type]  # decorated without types in transformers
    student.train(False)
    return student


# ------------------------------------------------------------------------------------------------ weights


def _token_types(model: PreTrainedModel) -> nn.Embedding | None:
    table = getattr(model.get_submodule(architecture(model).embeddings), "token_type_embeddings", None)
    assert table is None or isinstance(table, nn.Embedding)
    return table


def _student_weights(teacher: PreTrainedModel, student: PreTrainedModel, layers: Sequence[int]) -> dict[str, Tensor]:
    """The teacher's weights under the student's names."""
    source, target = architecture(teacher), architecture(student)
    weights = teacher.state_dict()
    if source.model == target.model:
        kept = {name: tensor for name, tensor in weights.items() if not name.startswith(f"{source.layers}.")}
        for mine, theirs in enumerate(layers):
            prefix = f"{source.layers}.{theirs}."
            layer = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            kept |= {f"{target.layers}.{mine}.{name}": w for name, w in layer.items()}
        return kept
    modules = [(source.dense, target.dense), (source.norm, target.norm), (source.decoder, target.decoder)]
    for mine, theirs in enumerate(layers):
        pair = f"{source.layers}.{theirs}", f"{target.layers}.{mine}"
        modules += [(f"{pair[0]}.{old}", f"{pair[1]}.{new}") for old, new in LAYER_MODULES.items()]
    named = {f"{target.embeddings}.{name}": weights[f"{source.embeddings}.{name}"] for name in EMBEDDINGS}
    return named | {f"{new}.{kind}": weights[f"{old}.{kind}"] for old, new in modules for kind in ("weight", "bias")}
