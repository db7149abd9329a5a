"""Dynamic masking: an exact number of tokens a batch, rare ones more often, as DistilBERT does it; words; Bernoulli.

It knows token ids and probabilities, not text and not models; it runs on the device of the batch, with its own random
numbers and without asking the device for a value. Next: words.py for which tokens make a word, objective.py for who
predicts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distil_fast.training.batch import IGNORED as IGNORED
from distil_fast.training.batch import Batch as Batch
from distil_fast.training.batch import MaskedBatch as MaskedBatch
from distil_fast.training.protocols import Prepare
from distil_fast.training.settings import InputError, MaskingConfig


class DynamicMasking(Prepare):
    """Chooses and hides tokens, anew at every call.

    "exact" (Sanh et al. 2019, after Lample and Conneau 2019): n = ceil(rate * real tokens) of a batch are chosen
    without replacement, the next one always with probability proportional to max(count, 1)^-smoothing among those
    left; if fewer can be chosen, all of them are. `MaskedBatch.masked` has n entries.

    "bernoulli" (Devlin et al. 2019 as Hugging Face's collator has it): each token by itself with probability `rate`;
    counts play no part.

    With `whole_word`, words are chosen instead of tokens, and all of a word is. "exact": words in the order of draws
    without replacement with the weight of their rarest token, until the next one would make more than n tokens.
    "bernoulli": each word with probability `rate`.

    Special tokens are never chosen. A chosen token becomes [MASK], a random id (of the whole vocabulary, special ones
    included, as in the original), or stays as it is, by the shares of the config; each token of a word by itself.

    Args:
        token_counts: how often each id occurs in the training text, [V]; its device is that of the batches to come.
        special_ids: never chosen.
        mask_id: the id of [MASK].
        config: rate, shares, smoothing, scheme, words.
        seed: of the generator, whose state decides all draws; each rank needs one of its own.
        continues: whether an id goes on with the word before it, bool [V]; see `continues_word`. For `whole_word` only.

    Raises:
        InputError: rate or shares are no probabilities, or `whole_word` is asked for without `continues`.
    """

    def __init__(
        self,
        token_counts: Tensor,
        special_ids: Sequence[int],
        mask_id: int,
        config: MaskingConfig,
        seed: int,
        continues: Tensor | None = None,
    ) -> None:
        _check(config, continues)
        self.config = config
        self.mask_id = mask_id
        self.generator = torch.Generator(token_counts.device).manual_seed(seed)
        self.log_weight = -config.smoothing * token_counts.double().clamp(min=1).log()
        self.log_weight[list(special_ids)] = -torch.inf
        self.continues = None if continues is None else continues.to(token_counts.device)

    def __call__(self, batch: Batch) -> MaskedBatch:
        ids = batch.input_ids.flatten()[batch.tokens]
        if self.config.scheme == "bernoulli":
            places, chosen = batch.tokens, self._each_by_itself(ids, batch)
        else:
            picks, chosen = self._exactly(ids, batch)
            places, ids = batch.tokens[picks], ids[picks]
        labels = torch.full_like(batch.input_ids, IGNORED).flatten()
        hidden = torch.where(chosen, self._hide(ids), ids)
        return MaskedBatch(
            input_ids=batch.input_ids.flatten().scatter(0, places, hidden).view_as(batch.input_ids),
            attention_mask=batch.attention_mask,
            tokens=batch.tokens,
            labels=labels.scatter_(0, places, torch.where(chosen, ids, IGNORED)).view_as(batch.input_ids),
            masked=None if self.config.scheme == "bernoulli" else places,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The generator's state, uint8 on the CPU."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the draws that would have come next."""
        self.generator.set_state(state["generator"].cpu())

    def _hide(self, ids: Tensor) -> Tensor:
        fate = torch.rand(ids.shape, generator=self.generator, device=ids.device)
        random_ids = torch.randint(len(self.log_weight), ids.shape, generator=self.generator, device=ids.device)
        hidden = torch.where(fate < self.config.mask + self.config.random, random_ids, ids)
        return torch.where(fate < self.config.mask, self.mask_id, hidden)

    def _each_by_itself(self, ids: Tensor, batch: Batch) -> Tensor:
        lots = torch.rand(ids.shape, generator=self.generator, device=ids.device)
        if self.config.whole_word:
            lots = lots[self._words(ids, batch)]  # that of the word's number serves all of its tokens
        return (lots < self.config.rate) & self.log_weight[ids].isfinite()

    def _exactly(self, ids: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        # Indices into `ids`, ascending, as many as are wanted, and which of them are chosen. The host knows how many
        # real tokens there are, and the product is the same double that a device would round up.
        wanted = math.ceil(self.config.rate * ids.numel())
        log_weight = self.log_weight[ids]
        if self.config.whole_word:
            chosen = self._some_words(log_weight, self._words(ids, batch), wanted)
            picks = chosen.logical_not().byte().argsort(stable=True)[:wanted]
        else:
            picks = self._drawn(log_weight).topk(wanted, sorted=False).indices
            chosen = log_weight.isfinite()
        picks = picks.sort().values
        return picks, chosen[picks]

    def _drawn(self, log_weight: Tensor) -> Tensor:
        # The n largest of log w + Gumbel noise are n draws without replacement with probabilities ~ w.
        noise = torch.empty_like(log_weight).exponential_(generator=self.generator).log_()
        return (log_weight - noise).nan_to_num(-torch.inf, torch.inf, -torch.inf)

    def _words(self, ids: Tensor, batch: Batch) -> Tensor:
        # The number of each token's word. A special token is a word, and so is what follows it or begins a row.
        assert self.continues is not None
        special = self.log_weight[ids].isinf()
        joined = self.continues[ids] & ~special & (batch.tokens % batch.input_ids.shape[1] != 0)
        joined[1:] &= ~special[:-1]
        return (~joined).cumsum(0) - 1

    def _some_words(self, log_weight: Tensor, words: Tensor, wanted: int) -> Tensor:
        # There are at most as many words as tokens; numbers that no word has weigh nothing, and come last.
        weight = torch.full_like(log_weight, -torch.inf).scatter_reduce_(0, words, log_weight, "amax")
        size = torch.zeros_like(words).scatter_add_(0, words, torch.ones_like(words))
        order = self._drawn(weight).argsort(descending=True, stable=True)
        fits = (size[order].cumsum(0) <= wanted) & weight[order].isfinite()
        return torch.zeros_like(fits).scatter_(0, order, fits)[words]


def _check(config: MaskingConfig, continues: Tensor | None) -> None:
    shares = {
        "rate": config.rate,
        "mask": config.mask,
        "random": config.random,
        "mask + random": config.mask + config.random,
    }
    for name, share in shares.items():
        if not 0 <= share <= 1 + 1e-9:
            raise InputError(f"masking: expected {name} between 0 and 1, got {share}.")
    if config.smoothing < 0:
        raise InputError(f"masking: expected a smoothing of 0 or more, got {config.smoothing}.")
    if config.whole_word and continues is None:
        raise InputError("masking: whole_word needs the table of ids that continue a word; give `continues`.")
