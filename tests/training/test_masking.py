"""Dynamic masking: exact counts, forbidden tokens, frequencies, shares, and reproducible draws."""

from __future__ import annotations

import math

import pytest
import torch

from distil_fast.training.config import EVALUATION_MASKING, MaskingConfig
from distil_fast.training.masking import IGNORED, Batch, DynamicMasking

PAD, UNK, CLS, SEP, MASK = SPECIALS = range(5)
VOCABULARY = 1000


def a_batch(lengths: list[int], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        input_ids[row, :length] = torch.randint(5, VOCABULARY, (length,), generator=generator)
        input_ids[row, 0], input_ids[row, length - 1] = CLS, SEP
    return Batch(input_ids, (input_ids != PAD).long())


def a_masking(config: MaskingConfig | None = None, counts: torch.Tensor | None = None, seed: int = 1) -> DynamicMasking:
    counts = torch.ones(VOCABULARY, dtype=torch.long) if counts is None else counts
    return DynamicMasking(counts, SPECIALS, MASK, config or MaskingConfig(), seed)


@pytest.mark.parametrize("lengths", [[128] * 8, [3], [20], [7, 12, 30, 5], [100, 3, 3, 3], [40] * 25])
@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_exactly_the_rate_of_the_real_tokens_rounded_up(lengths: list[int], rate: float) -> None:
    batch = a_batch(lengths)
    masking = a_masking(MaskingConfig(rate=rate))
    for _ in range(5):
        assert (masking(batch).labels != IGNORED).sum() == math.ceil(rate * sum(lengths))


def test_labels_are_the_original_and_the_rest_is_untouched() -> None:
    batch = a_batch([50, 30, 10])
    input_ids, attention_mask, labels = a_masking()(batch)
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], batch.input_ids[chosen])
    assert torch.equal(input_ids[~chosen], batch.input_ids[~chosen])
    assert torch.equal(attention_mask, batch.attention_mask)


def test_special_tokens_and_padding_are_never_chosen() -> None:
    batch = a_batch([30, 4, 11, 3])
    batch.input_ids[0, 5:20] = UNK
    masking = a_masking(MaskingConfig(rate=0.25))
    for _ in range(50):
        labels = masking(batch).labels
        assert (labels[labels != IGNORED] >= len(SPECIALS)).all()


def test_fewer_tokens_than_wanted_all_are_taken() -> None:
    batch = a_batch([20])
    batch.input_ids[0, 3:] = UNK  # 2 of 20 can be chosen, 3 are wanted
    labels = a_masking()(batch).labels
    assert (labels != IGNORED).nonzero().tolist() == [[0, 1], [0, 2]]


def test_nothing_to_choose() -> None:
    labels = a_masking()(Batch(torch.tensor([[CLS, SEP]]), torch.ones(1, 2, dtype=torch.long))).labels
    assert (labels == IGNORED).all()


def test_shares_of_mask_random_and_kept() -> None:
    batch = a_batch([128] * 64)
    masking = a_masking()
    hidden, labels = zip(*((m.input_ids, m.labels) for m in (masking(batch) for _ in range(20))), strict=True)
    chosen = torch.stack(labels) != IGNORED
    shown, true = torch.stack(hidden)[chosen], torch.stack(labels)[chosen]
    n = len(true)  # about 25000
    masked = int((shown == MASK).sum())
    kept = int((shown == true).sum())
    for count, share in ((masked, 0.8), (kept, 0.1), (n - masked - kept, 0.1)):
        assert (
            abs(count - share * n) < 5 * math.sqrt(n * share * (1 - share)) + 0.002 * n
        )  # random may hit mask or true
    replaced = shown[(shown != MASK) & (shown != true)]
    assert replaced.unique().numel() > 0.8 * VOCABULARY  # random ids come from the whole vocabulary


def test_evaluation_masks_hide_every_chosen_token() -> None:
    input_ids, _, labels = a_masking(EVALUATION_MASKING)(a_batch([64] * 4))
    assert (input_ids[labels != IGNORED] == MASK).all()


@pytest.mark.parametrize("smoothing", [0.7, 0.0])
def test_rare_tokens_are_chosen_in_proportion_to_count_to_the_minus_smoothing(smoothing: float) -> None:
    # One draw a batch of two kinds of tokens: the odds are exactly 100^smoothing to 1.
    counts = torch.ones(VOCABULARY, dtype=torch.long)
    counts[5] = 100
    batch = Batch(torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.long))
    masking = a_masking(MaskingConfig(rate=0.5, smoothing=smoothing), counts)
    n = 4000
    rare = sum(int(masking(batch).labels[0, 1] != IGNORED) for _ in range(n))
    expected = 100**smoothing / (1 + 100**smoothing)
    assert abs(rare / n - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


def test_draws_are_without_replacement_and_successive() -> None:
    # Weights 1 : 2 : 4, two draws. The first is left out with probability 1/7 or so; by enumeration of both orders:
    weights = torch.tensor([1.0, 2.0, 4.0])
    left_out = [
        sum(float(weights[i] / 7 * weights[j] / (7 - weights[i])) for i, j in ((a, b), (b, a)))
        for a, b in ((1, 2), (0, 2), (0, 1))
    ]
    counts = torch.ones(VOCABULARY, dtype=torch.long)
    counts[5], counts[6], counts[7] = 4, 2, 1  # smoothing 1: weights 1/4, 1/2, 1
    masking = a_masking(MaskingConfig(rate=0.5, smoothing=1.0), counts)
    batch = Batch(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.long))
    n = 6000
    missing = torch.stack([masking(batch).labels[0] == IGNORED for _ in range(n)]).sum(0)
    for count, p in zip(missing.tolist(), left_out, strict=True):
        assert abs(count / n - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_the_generator_state_decides_everything() -> None:
    batch = a_batch([40, 20])
    first, second = a_masking(seed=3), a_masking(seed=3)
    torch.manual_seed(0)
    once = first(batch)
    state = first.generator.get_state()
    then = first(batch)
    torch.manual_seed(1)  # torch's own generator plays no part
    for expected, actual in zip(once, second(batch), strict=True):
        assert torch.equal(expected, actual)
    assert not torch.equal(once.labels, then.labels)
    second.generator.set_state(state)
    for expected, actual in zip(then, second(batch), strict=True):
        assert torch.equal(expected, actual)
