"""The feed of labelled texts: every example once an epoch, shared among ranks, and resumed at any micro-batch."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from distil_fast.training.batch import Batch
from distil_fast.training.classification_feed import ClassificationFeed, Examples, collate, in_order, tokenise
from distil_fast.training.settings import InputError


@pytest.fixture(scope="module")
def examples(tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> Examples:
    """53 texts of 3 to about 20 tokens; the label is the number of the example."""
    texts = [(" ".join(sentence.split()[: 1 + 7 * i % 18]),) for i, sentence in enumerate(sentences[:53])]
    return tokenise(texts, list(range(53)), tokenizer, 20)


def labels_of(batch: Batch) -> list[int]:
    assert batch.labels is not None
    return batch.labels.tolist()


def test_texts_are_the_tokenizers_own(tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = [("the cat sees a dog .", "a king"), ("fish", "the river hears the old horse .")]
    batch = collate(tokenise(pairs, [0.5, 2.0], tokenizer, 32), [0, 1])
    wanted = tokenizer([p[0] for p in pairs], [p[1] for p in pairs], padding=True, return_tensors="pt")
    assert torch.equal(batch.input_ids, wanted["input_ids"])
    assert torch.equal(batch.attention_mask, wanted["attention_mask"])
    assert batch.token_type_ids is not None
    assert torch.equal(batch.token_type_ids, wanted["token_type_ids"])
    assert torch.equal(batch.tokens, wanted["attention_mask"].flatten().nonzero().squeeze(1))
    assert batch.labels is not None
    assert batch.labels.dtype == torch.float32
    assert collate(tokenise(pairs, [0, 1], tokenizer, 6), [0, 1]).input_ids.shape == (2, 6)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_an_epoch_without_repetition(examples: Examples, ranks: int) -> None:
    feeds = [ClassificationFeed(examples, 4, seed=7, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(feed) for feed in feeds}) == 1
    epochs = []
    for _ in range(2):
        seen = [label for feed in feeds for _ in range(len(feed)) for label in labels_of(next(feed))]
        assert len(seen) == len(set(seen))
        assert len(seen) > 53 - 4 * ranks
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_batches_are_of_similar_length(examples: Examples) -> None:
    feed = ClassificationFeed(examples, 4, seed=7)
    padding = [1 - batch.attention_mask.float().mean().item() for batch in (next(feed) for _ in range(len(feed)))]
    assert sum(padding) / len(padding) < 0.1


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_goes_on_from_its_state_at_every_position(examples: Examples, ranks: int) -> None:
    feed = ClassificationFeed(examples, 4, seed=7, rank=ranks - 1, ranks=ranks)
    states, seen = [], []
    for _ in range(2 * len(feed) + 1):
        states.append(json.dumps(feed.state_dict()))
        seen.append(labels_of(next(feed)))
    for index, state in enumerate(states):
        other = ClassificationFeed(examples, 4, seed=7, rank=ranks - 1, ranks=ranks)
        next(other), next(other)
        other.load_state_dict(json.loads(state))
        assert [labels_of(next(other)) for _ in seen[index:]] == seen[index:]


def test_a_fixed_order_has_each_example_once(examples: Examples) -> None:
    batches = list(in_order(examples, 8))
    assert sorted(label for batch in batches for label in labels_of(batch)) == list(range(53))
    widths = [batch.input_ids.shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)


def test_what_cannot_be_fed_is_refused(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="a micro-batch for each of 4 ranks, got 53"):
        ClassificationFeed(examples, 20, seed=0, ranks=4)
    with pytest.raises(InputError, match="state with seed 7, got 8"):
        ClassificationFeed(examples, 4, seed=7).load_state_dict(ClassificationFeed(examples, 4, seed=8).state_dict())
    with pytest.raises(InputError, match="at least one, got none"):
        tokenise([], [], tokenizer, 20)
