"""Losses between the hidden states, the attention maps and the raw logits of two models: public functions.

A hidden state is a row, as a token's logits are; layers are chosen, projected and added here, and each pair of layers
is one call of one op. It knows nothing of kernels or autograd. Next: pairs.py; docs/math.md for the formulae.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor, nn

from distil_fast import checks, pairs

Projection: TypeAlias = "Callable[[Tensor], Tensor] | None"
Layers: TypeAlias = "Sequence[tuple[int, int]]"

HIDDEN_KINDS = ("cosine", "mse")
ATTENTION_KINDS = ("mse", "kl")


def mse_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    mask: Tensor | None = None,
    count: float | Tensor | None = None,
    reduction: str = "mean",
    *,
    backend: str | None = None,
) -> Tensor:
    """Mean squared error of hidden states over the masked tokens (TinyBERT, Jiao et al. 2020, equation 8).

        loss = sum_r mask_r (1 / H) |s_r - t_r|^2 / sum_r mask_r

    `torch.nn.functional.mse_loss` of the tokens under a bool mask; forward and gradient are one pass.

    Args:
        student_hidden, teacher_hidden: `[..., H]`, layouts and dtypes as the logits of `distillation_loss`.
        mask: `[...]`, bool, or non-negative float token weights. None: every row counts 1.
        count: replaces the denominator, with reduction "mean" only; see `soft_count` of `distillation_loss`.
        reduction: "mean"; "sum", over rows, of the mean over H; or "none", the per-row loss of the leading shape.
        backend: as in `distillation_loss`.

    Returns:
        float32 (float64 for float64 input), 0-d or `[...]`. Without a valid row: 0, with zero gradient.

    Raises:
        ValueError, TypeError, NotImplementedError: as `distillation_loss`.
    """
    checks.check_values("student_hidden", student_hidden)
    pair = student_hidden, teacher_hidden, mask, count, reduction
    return pairs.compare("mse_loss", "squared", "hidden", *pair, backend, scale=1.0 / student_hidden.shape[-1])[0]


def logit_mse(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    count: float | Tensor | None = None,
    reduction: str = "mean",
    *,
    backend: str | None = None,
) -> Tensor:
    """Squared distance of raw logits, summed over the vocabulary (`alpha_mse` of DistilBERT's training code).

        loss = sum_r mask_r sum_j (s_rj - t_rj)^2 / sum_r mask_r

    No temperature, no softmax: unlike the divergences it sees a constant that is added to a row's logits. The value is
    `nn.MSELoss(reduction="sum")` of the selected rows, divided by their number. Columns that are -inf in both (a masked
    vocabulary) count 0; a column that is -inf in one alone makes its row's loss inf.

    Args:
        student_logits, teacher_logits: `[..., V]`, as in `distillation_loss`.
        mask, count, reduction, backend: as in `mse_loss`.

    Returns:
        float32 (float64 for float64 logits), 0-d or `[...]`. Without a valid row: 0, with zero gradient.

    Raises:
        ValueError, TypeError, NotImplementedError: as `distillation_loss`.
    """
    pair = student_logits, teacher_logits, mask, count, reduction
    return pairs.compare("logit_mse", "squared", "logits", *pair, backend)[0]


def hidden_loss(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    layer_map: Layers | None = None,
    kind: str = "cosine",
    layer_weights: Sequence[float | Tensor] | None = None,
    projections: Projection | Sequence[Projection] | nn.ModuleList = None,
    count: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`cosine_loss` or `mse_loss` between several layers of two models, in one call.

        loss = sum_i layer_weights_i loss(projection_i(student_states[s_i]), teacher_states[t_i]; mask)

    over the pairs `(s_i, t_i)` of the layer map: Sanh et al. 2019 (DistilBERT) with one pair of cosine, Sun et al. 2019
    (PKD) and Jiao et al. 2020 (TinyBERT, whose projections are learned) with several.

    Args:
        student_states, teacher_states: tensors `[..., H]`, one for each layer, as `output_hidden_states=True` returns
            them (the first is then the embeddings'). Those that no pair names are not looked at.
        mask: `[...]`, bool, or non-negative float token weights, for all layers. None: every row counts 1.
        layer_map: pairs (student's layer, teacher's layer); several may name one layer, and -1 is the last. None: each
            layer with its own, where both models have as many.
        kind: "cosine" or "mse".
        layer_weights: a number or a 0-d tensor for each pair. None: the mean over the pairs.
        projections: for each pair what its student's state goes through, an nn.Module or any callable, or None; or one
            for all pairs. Needed where the widths differ. The gradient flows through it, to its parameters too.
        count: replaces the denominator of each pair's mean; see `soft_count` of `distillation_loss`.
        backend: as in `distillation_loss`.

    Returns:
        float32 (float64 for float64 input), 0-d.

    Raises:
        ValueError, TypeError, NotImplementedError: as `distillation_loss`; also layers that are not there, and widths
            that differ without a projection.
    """
    layers = _layers("states", student_states, teacher_states, layer_map)
    _check_kind(kind, HIDDEN_KINDS)
    each = zip(layers, _weights(layer_weights, len(layers)), _steps(projections, len(layers)), strict=True)
    losses = []
    for (s, t), weight, project in each:
        student, teacher = student_states[s], teacher_states[t]
        student = student if project is None else project(student)
        _check_widths((s, t), student, teacher, project)
        how = ("cosine", 1.0) if kind == "cosine" else ("squared", 1.0 / student.shape[-1])
        pair = student, teacher, mask, count, "mean"
        loss, _ = pairs.compare("hidden_loss", how[0], "states", *pair, backend, scale=how[1], weight=weight)
        losses.append(loss)
    return _total(losses)


def attention_loss(
    student_attentions: Sequence[Tensor],
    teacher_attentions: Sequence[Tensor],
    attention_mask: Tensor | None = None,
    *,
    layer_map: Layers | None = None,
    kind: str = "mse",
    count: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Distance of attention maps: the mean over pairs of layers, heads and the queries under the mask of

        mse   (1 / K) sum_k (s_k - t_k)^2                K: keys
        kl    sum_k t_k log(t_k / s_k)                   of probabilities, teacher || student

    `kl` is the attention transfer of MobileBERT (Sun et al. 2020) and MiniLM (Wang et al. 2020). `mse` is TinyBERT's
    (Jiao et al. 2020, equation 7), per head and over all K keys as in its authors' code; unlike that code it leaves
    padded queries out, and is a mean over layers, not a sum. TextBrewer's attention_mse leaves padded keys out of its
    mean too: of sequences of K' tokens it is K / K' times this.

    The maps are meant to be probabilities, as `output_attentions=True` returns them, where padded keys hold 0 in both
    models and add nothing. Of scores, before the softmax, `mse` is TinyBERT's own choice: mask them with -inf in both
    models, which counts 0 here (its authors set scores below -100 to 0). For the KL of scores call `divergence_loss`,
    whose softmax is exact; a score is no probability, and a negative entry makes its row's loss nan here.

    Args:
        student_attentions, teacher_attentions: tensors `[B, heads, queries, keys]`, one for each layer.
        attention_mask: `[B, queries]`, bool or integers, 0 for padding, or non-negative float weights of the queries.
            None: every query counts 1.
        layer_map: as in `hidden_loss`.
        kind: "mse" or "kl".
        count: replaces the number of queries, sum of the mask; see `soft_count` of `distillation_loss`.
        backend: as in `distillation_loss`.

    Returns:
        float32 (float64 for float64 input), 0-d. Of `kl`: a key where the teacher has 0 adds 0, whatever the student
        has; one where the student alone has 0 makes the loss inf.

    Raises:
        ValueError, TypeError, NotImplementedError: as `distillation_loss`; layers that are not there, numbers of heads
            that differ.
    """
    layers = _layers("attentions", student_attentions, teacher_attentions, layer_map)
    _check_kind(kind, ATTENTION_KINDS)
    weight = 1.0 / len(layers)
    losses = []
    for s, t in layers:
        student, teacher = student_attentions[s], teacher_attentions[t]
        _check_maps((s, t), student, teacher)
        mask = _over_heads(attention_mask, student)
        queries = checks.check_count("count", count, student)
        rows = None if count is None else queries * student.shape[1]
        how = ("kl", 1.0) if kind == "kl" else ("squared", 1.0 / student.shape[-1])
        pair = student, teacher, mask, rows, "mean"
        loss, _ = pairs.compare("attention_loss", how[0], "attentions", *pair, backend, scale=how[1], weight=weight)
        losses.append(loss)
    return _total(losses)


# ------------------------------------------------------------------------------------------------ layers


def _total(losses: list[Tensor]) -> Tensor:
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total


def _check_kind(kind: str, kinds: tuple[str, ...]) -> None:
    if kind not in kinds:
        raise ValueError(f"kind: expected one of {', '.join(kinds)}, got {kind!r}.")


def _layers(what: str, student: Sequence[Tensor], teacher: Sequence[Tensor], layer_map: Layers | None) -> Layers:
    """The pairs of layers, each of them there."""
    for side, states in (("student", student), ("teacher", teacher)):
        if isinstance(states, Tensor) or not isinstance(states, Sequence):
            raise TypeError(
                f"{side}_{what}: expected a sequence of tensors, one for each layer, got {type(states).__name__}. "
                f"Pass a single layer as ({side}_{what},)."
            )
    if layer_map is None:
        if len(student) != len(teacher) or not student:
            raise ValueError(
                f"layer_map: expected pairs of layers, got none for {len(student)} student_{what} and {len(teacher)} "
                f"teacher_{what}, which are not equally many. Pass pairs such as [({len(student) - 1}, "
                f"{len(teacher) - 1})]."
            )
        return [(layer, layer) for layer in range(len(student))]
    if not layer_map:
        raise ValueError("layer_map: expected at least one pair of layers, got none. Pass pairs such as [(-1, -1)].")
    for pair in layer_map:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(type(layer) is int for layer in pair):
            raise TypeError(f"layer_map: expected pairs (student's layer, teacher's layer), got {pair!r}.")
        for side, layer, states in zip(("student", "teacher"), pair, (student, teacher), strict=True):
            if not -len(states) <= layer < len(states):
                raise ValueError(
                    f"layer_map: expected a {side}'s layer from {-len(states)} to {len(states) - 1}, got {layer} in "
                    f"{tuple(pair)}. Layers are counted from 0, which of hidden states is the embeddings'."
                )
    return layer_map


def _weights(given: Sequence[float | Tensor] | None, count: int) -> Sequence[float | Tensor]:
    if given is None:
        return [1.0 / count] * count
    if not isinstance(given, Sequence):
        raise TypeError(f"layer_weights: expected one number for each pair of layers, got {type(given).__name__}.")
    if len(given) != count:
        raise ValueError(f"layer_weights: expected one number for each of {count} pairs of layers, got {len(given)}.")
    return given


def _steps(given: Projection | Sequence[Projection] | nn.ModuleList, count: int) -> list[Projection]:
    """What each pair's student goes through."""
    steps = list(given) if isinstance(given, (Sequence, nn.ModuleList)) else [given] * count
    if len(steps) != count:
        raise ValueError(f"projections: expected one, or one for each of {count} pairs of layers, got {len(steps)}.")
    for step in steps:
        if step is not None and not callable(step):
            raise TypeError(f"projections: expected callables such as nn.Linear, or None, got {type(step).__name__}.")
    return steps


def _check_widths(pair: tuple[int, int], student: Tensor, teacher: Tensor, project: Projection) -> None:
    checks.check_values("student_states", student)
    checks.check_values("teacher_states", teacher)
    widths = student.shape[-1], teacher.shape[-1]
    if widths[0] == widths[1]:
        return
    if project is not None:
        raise ValueError(f"projections: expected the teacher's width {widths[1]} for layers {pair}, got {widths[0]}.")
    raise ValueError(
        f"projections: expected one for layers {pair}, whose widths differ, got none for {widths[0]} and {widths[1]}. "
        f"Pass projections=nn.Linear{widths}, or one for each pair, and train it with the student."
    )


def _check_maps(pair: tuple[int, int], student: Tensor, teacher: Tensor) -> None:
    for side, maps in (("student", student), ("teacher", teacher)):
        checks.check_values(f"{side}_attentions", maps)
        if maps.dim() != 4:
            raise ValueError(
                f"{side}_attentions: expected maps [B, heads, queries, keys], got shape {tuple(maps.shape)}. "
                "Give a map without heads one by .unsqueeze(1)."
            )
    heads = student.shape[1], teacher.shape[1]
    if heads[0] != heads[1]:
        raise ValueError(
            f"teacher_attentions: expected {heads[0]} heads as the student has for layers {pair}, got {heads[1]}. "
            "Average both models' over their heads by .mean(1, keepdim=True)."
        )


def _over_heads(attention_mask: Tensor | None, maps: Tensor) -> Tensor | None:
    """The queries' mask, for each row of the maps."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor, got {type(attention_mask).__name__}.")
    expected = maps.shape[0], maps.shape[2]
    if attention_mask.shape != expected:
        raise ValueError(
            f"attention_mask: expected shape {expected}, one entry for each query of {tuple(maps.shape)}, got "
            f"{tuple(attention_mask.shape)}."
        )
    mask = attention_mask.bool() if attention_mask.dtype in checks.INTEGERS else attention_mask
    return mask.unsqueeze(1).expand(maps.shape[:-1])
