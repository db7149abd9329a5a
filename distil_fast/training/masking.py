"""Dynamic masking as DistilBERT does it: an exact number of tokens a batch, rare ones more often.

It knows token ids and probabilities, not text and not models; it runs on the device of the batch, with its own
random numbers and without asking the device for a value. Next: trainer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distil_fast.training.config import MaskingConfig

IGNORED = -100  # the label of a token that is not to be predicted


class Batch(NamedTuple):
    """Token ids and attention mask (1: real token, 0: padding), both int64 [B, S]."""

    input_ids: Tensor
    attention_mask: Tensor


class MaskedBatch(NamedTuple):
    """A batch after masking; labels hold the original id where it is to be predicted, and -100 elsewhere."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class DynamicMasking:
    """Chooses and hides tokens, anew at every call.

    Exactly ceil(rate * real tokens) of a batch are chosen, without replacement, the next one always with probability
    proportional to max(count, 1)^-smoothing among those left; special tokens never. If fewer tokens can be chosen
    than wanted, all of them are. A chosen token becomes [MASK], a random id, or stays as it is, by the shares of the
    config. Sanh et al. 2019, after Lample and Conneau 2019.

    Args:
        token_counts: how often each id occurs in the training text, [V]; its device is that of the batches to come.
        special_ids: never chosen; padding must be among them.
        mask_id: the id of [MASK].
        config: rate, shares, smoothing.
        seed: of the generator, whose state decides all draws.
    """

    def __init__(
        self, token_counts: Tensor, special_ids: Sequence[int], mask_id: int, config: MaskingConfig, seed: int
    ) -> None:
        self.config = config
        self.mask_id = mask_id
        self.generator = torch.Generator(token_counts.device).manual_seed(seed)
        self.log_weight = -config.smoothing * token_counts.double().clamp(min=1).log()
        self.log_weight[list(special_ids)] = -torch.inf

    def __call__(self, batch: Batch) -> MaskedBatch:
        input_ids, attention_mask = batch
        chosen = self._choose(input_ids, attention_mask)
        fate = torch.rand(input_ids.shape, generator=self.generator, device=input_ids.device)
        vocabulary = self.log_weight.numel()
        random_ids = torch.randint(vocabulary, input_ids.shape, generator=self.generator, device=input_ids.device)
        hidden = torch.where(fate < self.config.mask + self.config.random, random_ids, input_ids)
        hidden = torch.where(fate < self.config.mask, self.mask_id, hidden)
        return MaskedBatch(
            input_ids=torch.where(chosen, hidden, input_ids),
            attention_mask=attention_mask,
            labels=torch.where(chosen, input_ids, IGNORED),
        )

    def _choose(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # The n largest of log w + Gumbel noise are n draws without replacement with probabilities ~ w. Ranks against
        # a count that stays on the device, where torch.multinomial would want a number on the host.
        log_weight = self.log_weight[input_ids].masked_fill(attention_mask == 0, -torch.inf).flatten()
        wanted = (self.config.rate * attention_mask.sum().double()).ceil()
        noise = torch.empty_like(log_weight).exponential_(generator=self.generator).log_()
        order = (log_weight - noise).nan_to_num(-torch.inf).argsort(descending=True)
        first = torch.arange(order.numel(), device=order.device) < wanted
        chosen = torch.zeros_like(first).scatter_(0, order, first)
        return (chosen & log_weight.isfinite()).view(input_ids.shape)
