"""Which tokens continue a word, in the three families of vocabularies."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from distil_fast.training.words import continues_word

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def fast(pieces: list[str], pre_tokenizer: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*SPECIALS, *pieces])}, [], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    names = ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, SPECIALS, strict=True)))


def continuing(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[str]:
    table = continues_word(tokenizer, vocabulary)
    assert table.shape == (vocabulary,)
    return [tokenizer.convert_ids_to_tokens(i) for i in table.nonzero().flatten().tolist()]


def test_wordpiece() -> None:
    pieces = ["un", "##believ", "##able", "##", "#", "Ġ", "[MASK]", "[CLS]", "[SEP]", "[PAD]", "[UNK]"]
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
    assert continuing(tokenizer, 11) == ["##believ", "##able", "##"]
    assert continuing(tokenizer, 20) == ["##believ", "##able", "##"]  # a model may have more ids than its tokenizer
    assert continuing(tokenizer, 2) == ["##believ"]


@pytest.mark.parametrize(
    ("mark", "pre_tokenizer"),
    [("Ġ", pre_tokenizers.ByteLevel(add_prefix_space=False)), ("▁", pre_tokenizers.Metaspace())],
)
def test_marks_of_beginnings(mark: str, pre_tokenizer: pre_tokenizers.PreTokenizer) -> None:
    pieces = [f"{mark}the", "believ", "able", f"{mark}un", "##", ",", mark]
    assert continuing(fast(pieces, pre_tokenizer), 12) == ["believ", "able", "##", ","]


def test_a_vocabulary_of_words(tokenizer: PreTrainedTokenizerBase) -> None:
    assert continuing(tokenizer, len(tokenizer)) == []
