"""Dynamic masking: exact counts, forbidden tokens, frequencies, shares, whole words, and reproducible draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distil_fast.training.config import EVALUATION_MASKING
from distil_fast.training.masking import IGNORED, Batch, DynamicMasking, MaskedBatch
from distil_fast.training.settings import InputError, MaskingConfig

PAD, UNK, CLS, SEP, MASK = SPECIALS = range(5)
VOCABULARY = 1000
PIECES = torch.arange(VOCABULARY) >= 600  # of words, but for the first of each

EVERY_KIND = [
    MaskingConfig(scheme=scheme, whole_word=whole_word)  # type: ignore[arg-type]
    for scheme in ("exact", "bernoulli")
    for whole_word in (False, True)
]


def batch_of(input_ids: torch.Tensor) -> Batch:
    real = input_ids != PAD
    return Batch(input_ids, real.long(), real.flatten().nonzero().flatten())


def a_batch(lengths: list[int], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        input_ids[row, :length] = torch.randint(5, VOCABULARY, (length,), generator=generator)
        input_ids[row, 0], input_ids[row, length - 1] = CLS, SEP
    return batch_of(input_ids)


def a_masking(config: MaskingConfig | None = None, counts: torch.Tensor | None = None, seed: int = 1) -> DynamicMasking:
    counts = torch.ones(VOCABULARY, dtype=torch.long) if counts is None else counts
    return DynamicMasking(counts, SPECIALS, MASK, config or MaskingConfig(), seed, PIECES)


def within(count: float, share: float, draws: int) -> bool:
    """Whether a binomial count is within five standard deviations."""
    return abs(count - share * draws) < 5 * math.sqrt(draws * share * (1 - share))


def words_of(batch: Batch) -> list[list[tuple[int, int]]]:
    """The places of each word, found the slow way."""
    words: list[list[tuple[int, int]]] = []
    for i, row in enumerate(batch.input_ids.tolist()):
        for j, token in enumerate(row):
            if token in (PAD, *SPECIALS):
                continue
            if PIECES[token] and j > 0 and row[j - 1] not in SPECIALS:
                words[-1].append((i, j))
            else:
                words.append([(i, j)])
    return words


# ---------------------------------------------------------------------------------------------- which tokens


@pytest.mark.parametrize("lengths", [[128] * 8, [3], [20], [7, 12, 30, 5], [100, 3, 3, 3], [40] * 25])
@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_exactly_the_rate_of_the_real_tokens_rounded_up(lengths: list[int], rate: float) -> None:
    batch = a_batch(lengths)
    masking = a_masking(MaskingConfig(rate=rate))
    for _ in range(5):
        masked = masking(batch)
        places = (masked.labels.flatten() != IGNORED).nonzero().flatten()
        assert len(places) == math.ceil(rate * sum(lengths))
        assert masked.masked is not None
        assert torch.equal(masked.masked, places)


def test_the_wanted_number_is_that_of_a_device() -> None:
    """ceil(rate n) in double precision, on the host as with tensors: 0.07 * 100 rounds up to 8 in both."""
    for rate in (0.07, 0.15, 0.3, 1.0):
        for n in range(1, 3000):
            assert math.ceil(rate * n) == int((rate * torch.tensor(n).double()).ceil())


@pytest.mark.parametrize("config", EVERY_KIND, ids=str)
def test_labels_are_the_original_and_the_rest_is_untouched(config: MaskingConfig) -> None:
    batch = a_batch([50, 30, 10])
    before = [x.clone() for x in batch if x is not None]
    masked = a_masking(config)(batch)
    chosen = masked.labels != IGNORED
    assert chosen.any()
    assert torch.equal(masked.labels[chosen], batch.input_ids[chosen])
    assert torch.equal(masked.input_ids[~chosen], batch.input_ids[~chosen])
    assert torch.equal(masked.attention_mask, batch.attention_mask)
    assert torch.equal(masked.tokens, batch.tokens)
    assert all(torch.equal(x, y) for x, y in zip(before, batch, strict=False) if y is not None)


@pytest.mark.parametrize("config", EVERY_KIND, ids=str)
def test_special_tokens_and_padding_are_never_chosen(config: MaskingConfig) -> None:
    batch = a_batch([30, 4, 11, 3])
    batch.input_ids[0, 5:20] = UNK
    masking = a_masking(config)
    for _ in range(50):
        labels = masking(batch).labels
        assert (labels[labels != IGNORED] >= len(SPECIALS)).all()


def test_fewer_tokens_than_wanted_all_are_taken() -> None:
    batch = a_batch([20])
    batch.input_ids[0, 3:] = UNK  # 2 of 20 can be chosen, 3 are wanted
    masked = a_masking()(batch)
    assert (masked.labels != IGNORED).nonzero().tolist() == [[0, 1], [0, 2]]
    assert masked.masked is not None
    assert masked.masked.unique().numel() == 3  # the surplus one is at a place of its own, whose label is ignored


@pytest.mark.parametrize("config", EVERY_KIND, ids=str)
def test_nothing_to_choose(config: MaskingConfig) -> None:
    masked = a_masking(config)(batch_of(torch.tensor([[CLS, SEP]])))
    assert (masked.labels == IGNORED).all()


@pytest.mark.parametrize("smoothing", [0.7, 0.0])
def test_rare_tokens_are_chosen_in_proportion_to_count_to_the_minus_smoothing(smoothing: float) -> None:
    # One draw a batch of two kinds of tokens: the odds are exactly 100^smoothing to 1.
    counts = torch.ones(VOCABULARY, dtype=torch.long)
    counts[5] = 100
    batch = batch_of(torch.tensor([[5, 6]]))
    masking = a_masking(MaskingConfig(rate=0.5, smoothing=smoothing), counts)
    n = 2000
    rare = sum(int(masking(batch).labels[0, 1] != IGNORED) for _ in range(n))
    assert within(rare, 100**smoothing / (1 + 100**smoothing), n)


@pytest.mark.parametrize("whole_word", [False, True])
def test_draws_are_without_replacement_and_successive(whole_word: bool) -> None:
    # Weights 1 : 2 : 4, two draws. Which is left out, by enumeration of both orders:
    weights = torch.tensor([1.0, 2.0, 4.0])
    left_out = [
        sum(float(weights[i] / 7 * weights[j] / (7 - weights[i])) for i, j in ((a, b), (b, a)))
        for a, b in ((1, 2), (0, 2), (0, 1))
    ]
    counts = torch.ones(VOCABULARY, dtype=torch.long)
    counts[5], counts[6], counts[7] = 4, 2, 1  # smoothing 1: weights 1/4, 1/2, 1
    masking = a_masking(MaskingConfig(rate=0.5, smoothing=1.0, whole_word=whole_word), counts)
    batch = batch_of(torch.tensor([[5, 6, 7]]))
    n = 3000
    missing = torch.stack([masking(batch).labels[0] == IGNORED for _ in range(n)]).sum(0)
    for count, share in zip(missing.tolist(), left_out, strict=True):
        assert within(count, share, n)


def test_bernoulli_is_each_token_by_itself() -> None:
    batch = a_batch([128] * 16)
    masking = a_masking(MaskingConfig(scheme="bernoulli", smoothing=0.7))
    chosen = torch.stack([masking(batch).labels != IGNORED for _ in range(60)])
    eligible = 16 * 126
    assert masking(batch).masked is None
    assert within(int(chosen.sum()), 0.15, 60 * eligible)
    assert chosen.sum((1, 2)).unique().numel() > 20  # not an exact number
    neighbours = chosen[:, :, 1:-2] & chosen[:, :, 2:-1]
    assert within(int(neighbours.sum()), 0.15**2, 60 * 16 * 125)


# ---------------------------------------------------------------------------------------------- whole words


@pytest.mark.parametrize("scheme", ["exact", "bernoulli"])
def test_words_are_chosen_as_a_whole(scheme: str) -> None:
    batch = a_batch([60, 33, 45, 12, 3])
    batch.input_ids[0, 10:14] = UNK
    batch.input_ids[1, 1] = 700  # a piece that follows [CLS] is a word
    words = words_of(batch)
    assert max(map(len, words)) > 3
    masking = a_masking(MaskingConfig(scheme=scheme, whole_word=True, rate=0.25))  # type: ignore[arg-type]
    ever = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    for _ in range(60):
        chosen = masking(batch).labels != IGNORED
        ever |= chosen
        assert all(len({bool(chosen[place]) for place in word}) == 1 for word in words)
    assert ever.sum() > 0.95 * sum(map(len, words))


def test_words_fill_the_wanted_number_but_for_the_one_that_does_not_fit() -> None:
    batch = a_batch([60, 33, 45, 12, 3])
    longest = max(map(len, words_of(batch)))
    wanted = math.ceil(0.15 * 153)
    masking = a_masking(MaskingConfig(whole_word=True))
    numbers = set()
    for _ in range(60):
        masked = masking(batch)
        assert masked.masked is not None
        assert len(masked.masked) == wanted == masked.masked.unique().numel()
        places = (masked.labels.flatten() != IGNORED).nonzero().flatten()
        assert set(places.tolist()) <= set(masked.masked.tolist())
        numbers.add(len(places))
    assert wanted - longest < min(numbers) <= max(numbers) == wanted


def test_a_word_weighs_as_much_as_its_rarest_token() -> None:
    counts = torch.full((VOCABULARY,), 100)
    counts[700] = 1  # the last piece of the first word
    batch = batch_of(torch.tensor([[5, 600, 700, 6, 601, 602]]))
    masking = a_masking(MaskingConfig(rate=0.5, smoothing=0.5, whole_word=True), counts)  # one of two words
    n = 2000
    first = sum(int(masking(batch).labels[0, 0] != IGNORED) for _ in range(n))
    assert within(first, 10 / 11, n)


# ---------------------------------------------------------------------------------------------- what becomes of them


@pytest.mark.parametrize("config", EVERY_KIND, ids=str)
def test_shares_of_mask_random_and_kept(config: MaskingConfig) -> None:
    batch = a_batch([128] * 64)
    masking = a_masking(config)
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
    assert abs(float(replaced.double().mean()) / VOCABULARY - 0.5) < 0.05


def test_evaluation_masks_hide_every_chosen_token() -> None:
    masked = a_masking(EVALUATION_MASKING)(a_batch([64] * 4))
    assert (masked.input_ids[masked.labels != IGNORED] == MASK).all()


# ---------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("config", EVERY_KIND, ids=str)
def test_the_state_decides_everything(config: MaskingConfig) -> None:
    batch = a_batch([40, 20])
    first, second = a_masking(config, seed=3), a_masking(config, seed=3)
    torch.manual_seed(0)
    once = first(batch)
    state = first.state_dict()
    then = first(batch)
    torch.manual_seed(1)  # torch's own generator plays no part
    assert same(once, second(batch))
    assert not torch.equal(once.labels, then.labels)
    other = a_masking(config, seed=4)
    assert not same(then, other(batch))
    other.load_state_dict({name: value.clone() for name, value in state.items()})
    assert same(then, other(batch))


def same(a: MaskedBatch, b: MaskedBatch) -> bool:
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Waits(TorchDispatchMode):
    """Notes operations that ask the device for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name()
        indexed = "aten::index" in name and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in (args[1] if len(args) > 1 else ())
        )
        if indexed or any(
            word in name for word in ("item", "_local_scalar_dense", "nonzero", "masked_select", "unique")
        ):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", EVERY_KIND, ids=str)
def test_the_host_never_waits(config: MaskingConfig) -> None:
    batch, masking = a_batch([40, 20]), a_masking(config)
    with Waits() as waits:
        masking(batch)
        assert waits.seen == []
        batch.input_ids[batch.input_ids == UNK].sum().item()
    assert len(waits.seen) >= 2  # it would have seen one


# ---------------------------------------------------------------------------------------------- wrong settings


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MaskingConfig(rate=1.5), "expected rate between 0 and 1, got 1.5"),
        (MaskingConfig(mask=0.8, random=0.3), r"expected mask \+ random between 0 and 1, got 1.1"),
        (MaskingConfig(smoothing=-1), "expected a smoothing of 0 or more, got -1"),
    ],
)
def test_settings_that_make_no_sense(config: MaskingConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        a_masking(config)


def test_whole_words_need_to_be_known() -> None:
    with pytest.raises(InputError, match="give `continues`"):
        DynamicMasking(torch.ones(9), SPECIALS, MASK, MaskingConfig(whole_word=True), 0)
