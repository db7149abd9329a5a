"""Which ids of a vocabulary go on with the word before them, by the mark that the tokenizer's family puts on pieces.

It knows tokenizers' vocabularies only. Next: masking.py, which hides whole words.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

CONTINUES = "##"  # begins a piece within a word: WordPiece (BERT, DistilBERT, ELECTRA, MPNet)
BEGINS = ("Ġ", "▁")  # begins a piece at a word's beginning: byte-level BPE (RoBERTa), SentencePiece


def continues_word(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
    """Whether each id continues a word, bool `[vocabulary]`.

    Of the three marks, that one counts which most tokens begin with. In byte-level and SentencePiece vocabularies
    punctuation has no mark, and so is of the word that it follows. Special tokens continue nothing; nor does any
    token of a vocabulary without marks.
    """
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), vocabulary))))]
    marks = {mark: sum(token.startswith(mark) and token != mark for token in tokens) for mark in (CONTINUES, *BEGINS)}
    mark = max(marks, key=lambda mark: marks[mark])
    table = torch.zeros(vocabulary, dtype=torch.bool)
    if marks[mark]:
        table[: len(tokens)] = torch.tensor([token.startswith(mark) == (mark == CONTINUES) for token in tokens])
    table[[i for i in tokenizer.all_special_ids if i < vocabulary]] = False
    return table
