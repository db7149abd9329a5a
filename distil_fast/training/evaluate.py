"""How good masked language models are on held-out text, and how near students are to their teacher.

Everything is taken at the same fixed masks and summed batch by batch: what is kept of a batch is a few numbers. It
knows models and masked batches; nothing of training, of time or of the screen. Next: latency.py, judge.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distil_fast import cosine_loss, cross_entropy, divergence_loss
from distil_fast.training.masked_lm import MaskedLM, apply_head, encode
from distil_fast.training.masking import IGNORED, MaskedBatch

TEACHER = "teacher"
ROWS = 256  # whose logits are in memory at a time; of a vocabulary of 30522, 31 MB a model


class Quality(NamedTuple):
    """Means over the masked positions, cosines over all real tokens; shares are of 1."""

    accuracy: float  # top-1
    pseudo_perplexity: float  # exp of the mean cross-entropy
    agreement: float  # how often the likeliest token is the teacher's too
    kl: float  # KL(teacher || student) at temperature 1, nats
    cosines: tuple[float, ...]  # of hidden states, for each pair of layers
    predictions: int  # masked positions
    tokens: int  # real ones


def copied_layers(layers: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs to compare of a student whose layer i is a copy of the teacher's `layers[i]`, both from 0 here.

    In the pairs layers count from 1, since 0 is the embeddings.
    """
    return [(student + 1, teacher + 1) for student, teacher in enumerate(layers)]


@torch.inference_mode()
def compare(
    teacher: MaskedLM,
    students: Mapping[str, MaskedLM],
    batches: Iterable[MaskedBatch],
    layer_pairs: Sequence[tuple[int, int]] = (),
) -> dict[str, Quality]:
    """The quality of the teacher, under the name "teacher", and of each student, on the same masked batches.

    Models are left in the mode (training or evaluation) that they are in, and computed in evaluation mode, in the
    precision of their weights. The head runs on the masked positions alone, `ROWS` at a time.

    Args:
        teacher: any masked language model that `masked_lm.encode` takes.
        students: of the teacher's vocabulary, on its device.
        batches: `labels` hold the original id of a masked position, and -100 elsewhere.
        layer_pairs: (student's layer, teacher's layer), counted from 1, 0 for the embeddings, negative from the end,
            whose hidden states the cosine compares. Empty: none.

    Raises:
        ValueError: a student named "teacher", one of another vocabulary, hidden states of another width, no masked
            position in the batches.
    """
    _check(teacher, students)
    models = {TEACHER: teacher, **students}
    modes = {name: model.training for name, model in models.items()}
    sums = {name: torch.zeros(4 + len(layer_pairs), dtype=torch.float64, device=teacher.device) for name in models}
    predictions = tokens = 0
    try:
        for model in models.values():
            model.train(False)
        for batch in batches:
            rows = (batch.labels.flatten() != IGNORED).nonzero().squeeze(1)
            predictions += rows.numel()
            tokens += int(batch.attention_mask.sum())
            _add_batch(sums, models, batch, rows, layer_pairs)
    finally:
        for name, model in models.items():
            model.train(modes[name])
    if not predictions:
        raise ValueError("batches: expected at least one position with a label, got none.")
    return {name: _quality(total.tolist(), predictions, tokens) for name, total in sums.items()}


def _check(teacher: MaskedLM, students: Mapping[str, MaskedLM]) -> None:
    if TEACHER in students:
        raise ValueError(f"students: expected names other than {TEACHER!r}, which the teacher's results have.")
    for name, student in students.items():
        if student.config.vocab_size != teacher.config.vocab_size:
            raise ValueError(
                f"{name}: expected the teacher's vocabulary of {teacher.config.vocab_size} tokens, got "
                f"{student.config.vocab_size}. Models are compared token by token."
            )


def _add_batch(
    sums: Mapping[str, Tensor],
    models: Mapping[str, MaskedLM],
    batch: MaskedBatch,
    rows: Tensor,
    layer_pairs: Sequence[tuple[int, int]],
) -> None:
    """Adds to a model's sums: hits, cross-entropies, agreements, KLs, and a cosine for each pair of layers."""
    labels = batch.labels.flatten()[rows]
    encoded = {name: _encode(model, batch, bool(layer_pairs)) for name, model in models.items()}
    picked = {name: last.flatten(0, 1)[rows] for name, (last, _) in encoded.items()}
    for start in range(0, rows.numel(), ROWS):
        part = slice(start, start + ROWS)
        teacher_logits = apply_head(models[TEACHER], picked[TEACHER][part])
        teacher_top1 = teacher_logits.argmax(-1)
        for name, model in models.items():
            logits = teacher_logits if name == TEACHER else apply_head(model, picked[name][part])
            top1 = logits.argmax(-1)
            losses = cross_entropy(logits, labels[part], reduction="none").double().sum()
            kl = divergence_loss(logits, teacher_logits, reduction="none").double().sum()
            sums[name][:4] += torch.stack(
                [(top1 == labels[part]).sum().double(), losses, (top1 == teacher_top1).sum().double(), kl]
            )
    real = batch.attention_mask.bool()
    teacher_states = encoded[TEACHER][1]
    for name, (_, states) in encoded.items():
        for index, (s, t) in enumerate(layer_pairs):
            student_state = _layer(states, t if name == TEACHER else s, name)
            teacher_state = _layer(teacher_states, t, TEACHER)
            if student_state.shape != teacher_state.shape:
                raise ValueError(
                    f"{name}: expected hidden states of the teacher's width {teacher_state.shape[-1]}, got "
                    f"{student_state.shape[-1]}. Leave layer_pairs out for a student of another width."
                )
            sums[name][4 + index] += cosine_loss(student_state, teacher_state, real, reduction="sum").double()


def _layer(states: Sequence[Tensor], layer: int, name: str) -> Tensor:
    if not -len(states) <= layer < len(states):
        raise ValueError(
            f"layer_pairs: expected layers of the {name} from {-len(states)} to {len(states) - 1}, got {layer}."
        )
    return states[layer]


def _encode(model: MaskedLM, batch: MaskedBatch, all_layers: bool) -> tuple[Tensor, Sequence[Tensor]]:
    """The last hidden state [B, S, H], and with `all_layers` those of the embeddings and of every layer."""
    if not all_layers:
        return encode(model, batch.input_ids, batch.attention_mask), ()
    output = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    return output.last_hidden_state, output.hidden_states


def _quality(sums: Sequence[float], predictions: int, tokens: int) -> Quality:
    hits, losses, agreements, kl, *distances = sums
    return Quality(
        accuracy=hits / predictions,
        pseudo_perplexity=_exp(losses / predictions),
        agreement=agreements / predictions,
        kl=kl / predictions,
        cosines=tuple(1.0 - distance / max(tokens, 1) for distance in distances),
        predictions=predictions,
        tokens=tokens,
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def measures(quality: Quality) -> dict[str, float]:
    """What the reports show of it, by name."""
    names = ("accuracy", "pseudo_perplexity", "agreement", "kl")
    return {name: getattr(quality, name) for name in names}


def parameter_count(model: torch.nn.Module) -> int:
    """Shared parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: torch.nn.Module) -> int:
    """What the weights take on disk, but for a header; shared parameters are stored once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
