"""The batches that the parts of the trainer hand to each other, on the device of the models.

What the host knows when it puts a batch together, how many real tokens there are and where, stays with the batch, so
that no later step must ask the device. It knows nothing of text or of models. Next: feed.py, masking.py, objective.py.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

IGNORED = -100  # the label of a token that is not to be predicted


class Batch(NamedTuple):
    """Sequences of token ids, int64, as the feed gives them."""

    input_ids: Tensor  # [B, S]
    attention_mask: Tensor  # [B, S], 1: a real token, 0: padding
    tokens: Tensor  # [n] flat positions (row * S + column) of the real tokens, ascending
    labels: Tensor | None = None  # [B] of sequence classification: classes, or float values for a regression
    token_type_ids: Tensor | None = None  # [B, S] of sequence classification, 1: the second text


class MaskedBatch(NamedTuple):
    """A batch after masking, int64."""

    input_ids: Tensor  # [B, S], the chosen tokens hidden
    attention_mask: Tensor  # [B, S]
    tokens: Tensor  # [n], as in Batch
    labels: Tensor  # [B, S], the original id where it is to be predicted, else IGNORED
    masked: Tensor | None  # [m] flat positions to predict; surplus ones have the label IGNORED. None: not known here
