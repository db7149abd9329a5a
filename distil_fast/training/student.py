"""Makes the student: a DistilBERT whose layers are some of the teacher's, ready to be distilled.

It knows the two architectures' weight names, and which layers to take; nothing of data or losses. As in the
original, token-type embeddings and pooler are dropped; unlike there, the head's transform is copied too.
Next: trainer.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

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
HEAD_MODULES = {
    "transform.dense": "vocab_transform",
    "transform.LayerNorm": "vocab_layer_norm",
    "decoder": "vocab_projector",
}


def evenly_spaced_layers(teacher_layers: int, student_layers: int | None = None) -> list[int]:
    """The teacher layer of each student layer: round(i (L - 1) / (n - 1)), i = 0 .. n - 1; first and last are kept.

    Args:
        teacher_layers: L.
        student_layers: n; None: half of L. A single layer is the teacher's first.

    Returns:
        n distinct indices, ascending: [0, 2, 4, 7, 9, 11] of 12, [0, 2, 5] of 6.

    Raises:
        ValueError: not 1 <= n <= L.
    """
    n = max(1, teacher_layers // 2) if student_layers is None else student_layers
    if not 1 <= n <= teacher_layers:
        raise ValueError(f"student_layers: expected 1 to {teacher_layers} (the teacher's layers), got {n}.")
    gaps = max(1, n - 1)
    # A half goes down, in integers: Python's round() would send 2.5 down and 3.5 up.
    return [-((gaps - 2 * i * (teacher_layers - 1)) // (2 * gaps)) for i in range(n)]


def student_from_teacher(teacher: BertForMaskedLM, layers: Sequence[int] | None = None) -> DistilBertForMaskedLM:
    """A DistilBERT of the teacher's width that starts from copies of its weights.

    Copied are the word and position embeddings with their LayerNorm, the chosen layers, and the masked-LM head with
    its transform. The decoder is tied to the word embeddings if the teacher's is. DistilBERT's LayerNorms have
    eps 1e-12 whatever the teacher's `layer_norm_eps` (BERT's is the same).

    Args:
        teacher: with absolute position embeddings, as every released BERT.
        layers: teacher layer of each student layer; None: `evenly_spaced_layers` for half as many.

    Raises:
        TypeError: the teacher is not a `BertForMaskedLM`.
        ValueError: an empty list of layers, or one out of range.
    """
    if not isinstance(teacher, BertForMaskedLM):
        raise TypeError(f"teacher: expected a BertForMaskedLM, got a {type(teacher).__name__}.")
    config = teacher.config
    layers = evenly_spaced_layers(config.num_hidden_layers) if layers is None else layers
    if not layers or not all(0 <= layer < config.num_hidden_layers for layer in layers):
        raise ValueError(f"layers: expected indices from 0 to {config.num_hidden_layers - 1}, got {list(layers)}.")
    student = DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            n_layers=len(layers),
            n_heads=config.num_attention_heads,
            dim=config.hidden_size,
            hidden_dim=config.intermediate_size,
            dropout=config.hidden_dropout_prob,
            attention_dropout=config.attention_probs_dropout_prob,
            activation=config.hidden_act,
            initializer_range=config.initializer_range,
            pad_token_id=config.pad_token_id,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    student.load_state_dict(_student_weights(teacher.state_dict(), layers))
    student.to(teacher.device, teacher.dtype)  # type: ignore[arg-type]  # decorated without types in transformers
    student.train(False)
    return student


def _student_weights(teacher: dict[str, Tensor], layers: Sequence[int]) -> dict[str, Tensor]:
    weights = {f"distilbert.embeddings.{name}": teacher[f"bert.embeddings.{name}"] for name in EMBEDDINGS}
    for student_layer, teacher_layer in enumerate(layers):
        source, target = f"bert.encoder.layer.{teacher_layer}", f"distilbert.transformer.layer.{student_layer}"
        weights |= _module_weights(teacher, source, target, LAYER_MODULES)
    return weights | _module_weights(teacher, "cls.predictions", "", HEAD_MODULES)


def _module_weights(teacher: dict[str, Tensor], source: str, target: str, modules: dict[str, str]) -> dict[str, Tensor]:
    return {
        f"{target}.{student_name}.{kind}".lstrip("."): teacher[f"{source}.{teacher_name}.{kind}"]
        for teacher_name, student_name in modules.items()
        for kind in ("weight", "bias")
    }
