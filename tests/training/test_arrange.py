"""Sequences, padding, and the order of a pass: every token where it belongs, every sequence once, on one rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from distil_fast.training.arrange import (
    MINIMUM_TOKENS,
    Sequences,
    Specials,
    arrange,
    collate,
    epoch_order,
    evaluation_batches,
    specials_of,
)
from distil_fast.training.settings import InputError
from distil_fast.training.tokenise import Part

PAD, CLS, SEP = 0, 2, 3
SPECIALS = Specials(CLS, SEP, PAD)


def a_part(sizes: list[int], dtype: str = "uint16") -> Part:
    """Documents of so many tokens, all of them different."""
    flat, token = [], 5
    for size in sizes:
        flat += [*range(token, token + size), SEP]
        token += size
    return Part(np.array(flat, dtype), np.cumsum([0, *(size + 1 for size in sizes)]))


def some_sequences(lengths: list[int]) -> Sequences:
    part = a_part([length - 2 for length in lengths], "int32")
    return Sequences(part.tokens, part.offsets[:-1], np.array(lengths), SPECIALS, "some")


# ---------------------------------------------------------------------------------------------- sequences


@pytest.mark.parametrize("length", [3, 8, 20, 64])
def test_a_document_is_cut_where_a_sequence_is_full(length: int) -> None:
    sizes = [1, 2, 18, 19, 27, 28, 0, 36, 37, 100, 9, 10]
    part = a_part(sizes)
    content = length - 2
    documents = [part.tokens[a : b - 1].tolist() for a, b in zip(part.offsets, part.offsets[1:], strict=False)]
    expected = [
        [CLS, *ids[i : i + content], SEP]
        for ids in documents
        for i in range(0, len(ids), content)
        if len(ids) - i + 2 >= min(MINIMUM_TOKENS, length)
    ]
    sequences = arrange(part, length, "buckets", SPECIALS, "key")
    assert [row.tolist() for row in sequences] == expected
    assert sequences.lengths.tolist() == [len(row) for row in expected]
    assert sequences[0].dtype == torch.int64


@pytest.mark.parametrize("length", [3, 8, 20, 64])
def test_packed_sequences_are_full_and_miss_nothing(length: int) -> None:
    part = a_part([1, 2, 18, 19, 27, 28, 36, 37, 100, 9, 10])
    rows = [row.tolist() for row in arrange(part, length, "packed", SPECIALS, "key")]
    assert all(len(row) == length and row[0] == CLS and row[-1] == SEP for row in rows)
    flat = [token for row in rows for token in row[1:-1]]
    assert flat == part.tokens[: len(flat)].tolist()
    assert len(part.tokens) - len(flat) < length - 2


def test_nothing_to_arrange() -> None:
    for arrangement in ("buckets", "packed"):
        assert len(arrange(a_part([]), 20, arrangement, SPECIALS, "key")) == 0  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"sequence_length: expected 3 tokens or more, .* got 2"):
        arrange(a_part([5]), 2, "packed", SPECIALS, "key")


def test_other_arrangements_have_other_keys() -> None:
    part = a_part([50])
    keys = {arrange(part, length, how, SPECIALS, "key").key for length in (8, 9) for how in ("buckets", "packed")}  # type: ignore[arg-type]
    assert len(keys) == 4


def test_a_tokenizer_without_mask(tokenizer: PreTrainedTokenizerBase) -> None:
    assert specials_of(tokenizer) == SPECIALS
    other = type(tokenizer)(vocab=tokenizer.get_vocab())
    other.mask_token = other.cls_token = None
    with pytest.raises(InputError, match=r"got one without \[CLS\], \[MASK\]"):
        specials_of(other)


# ---------------------------------------------------------------------------------------------- batches


def test_a_batch_knows_its_real_tokens() -> None:
    rows = [torch.tensor([CLS, 7, SEP]), torch.tensor([CLS, 5, 6, 8, SEP]), torch.tensor([CLS, SEP])]
    batch = collate(rows, PAD, torch.tensor([1, 0, 1]))
    assert batch.input_ids.tolist() == [[CLS, 7, SEP, PAD, PAD], [CLS, 5, 6, 8, SEP], [CLS, SEP, PAD, PAD, PAD]]
    assert torch.equal(batch.attention_mask, (batch.input_ids != PAD).long())
    assert torch.equal(batch.tokens, (batch.input_ids != PAD).flatten().nonzero().flatten())
    assert batch.labels is not None
    assert all(tensor.dtype == torch.int64 for tensor in batch if tensor is not None)
    indexed = some_sequences([5, 3, 9]).batch(np.array([2, 0]))
    assert [row[:2].tolist() for row in indexed.input_ids] == [[CLS, 9], [CLS, 5]]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_pass_has_no_sequence_twice_and_drops_less_than_a_micro_batch(ranks: int) -> None:
    lengths = np.random.default_rng(0).integers(12, 100, 1003)
    passes = [epoch_order(lengths, 4, ranks, (7, epoch)) for epoch in range(30)]
    for order in passes:
        assert order.shape == (1003 // (4 * ranks), ranks, 4)
        assert np.unique(order).size == order.size
        assert order.size > 1003 - 4 * ranks
    assert len({tuple(order.flatten()) for order in passes}) == len(passes)
    left_out = [set(range(1003)) - set(order.flatten()) for order in passes]
    assert len(set().union(*left_out)) > 15  # others in each pass
    assert np.array_equal(passes[3], epoch_order(lengths, 4, ranks, (7, 3)))
    assert not np.array_equal(passes[3], epoch_order(lengths, 4, ranks, (8, 3)))


@pytest.mark.parametrize("ranks", [1, 4])
def test_little_padding_in_an_order_that_is_not_that_of_lengths(ranks: int) -> None:
    # ragged as articles are: most sequences full, the rests of any length; and far more ragged
    random = np.random.default_rng(0)
    articles = np.minimum(np.where(random.random(4000) < 0.9, 512, random.integers(12, 512, 4000)), 512)
    for lengths in (articles, random.integers(12, 129, 4000)):
        widths = lengths[epoch_order(lengths, 8, ranks, (1, 0))]
        longest = widths.max(-1)
        assert 1 - widths.sum() / (longest.sum() * 8) < 0.03
        assert abs(np.corrcoef(longest[:, 0], np.arange(len(longest)))[0, 1]) < 0.25
        apart = longest.max(1) - longest.min(1)  # ranks wait for the one with the longest sequences
        assert apart.mean() < 0.05 * longest.mean()


def test_evaluation_is_of_all_sequences_in_a_fixed_order() -> None:
    sequences = some_sequences([12, 40, 13, 39, 14, 38, 15])
    batches = list(evaluation_batches(sequences, 3))
    assert [batch.input_ids.shape for batch in batches] == [(3, 14), (3, 39), (1, 40)]
    seen = [row[row != PAD].tolist() for batch in batches for row in batch.input_ids]
    assert sorted(seen) == sorted(row.tolist() for row in sequences)
    assert all(
        torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, evaluation_batches(sequences, 3), strict=True)
    )
