"""Tiny models, a tiny tokenizer and a tiny text, made on the spot: no download and no installed checkpoint."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer, PreTrainedTokenizerBase

transformers.logging.disable_progress_bar()

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NOUNS = ["cat", "dog", "bird", "fish", "horse", "tree", "house", "river", "stone", "king", "child", "ship"]
VERBS = ["sees", "likes", "finds", "leaves", "follows", "hears"]
ADJECTIVES = ["old", "small", "red"]
VOCABULARY = [*SPECIALS, "the", "a", ".", *ADJECTIVES, *NOUNS, *VERBS]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are only slowed down by a second thread, badly so where the other core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY))
    return BertTokenizer.from_pretrained(path.parent)


@pytest.fixture(scope="session")
def make_teacher() -> Callable[..., BertForMaskedLM]:
    def make(layers: int = 4, vocabulary: int = len(VOCABULARY), **config: object) -> BertForMaskedLM:
        torch.manual_seed(layers)
        settings = {
            "vocab_size": vocabulary,
            "hidden_size": 16,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 40,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.3,  # far from uniform logits, so that a wrong weight shows
        }
        model = BertForMaskedLM(BertConfig(**(settings | config)))
        with torch.no_grad():  # biases and LayerNorms away from 0 and 1, so that one left behind shows
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.3 * torch.randn_like(parameter)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """Lines of regular English, no two alike: who does it says how they look and what they do, and to whom is open."""
    choose = random.Random(0).randrange
    lines: dict[str, None] = {}
    while len(lines) < 600:
        pairs = [(choose(len(NOUNS)), choose(len(NOUNS))) for _ in range(3)]
        sentence = [
            f"the {ADJECTIVES[who % 3]} {NOUNS[who]} {VERBS[who % 6]} a {ADJECTIVES[whom % 3]} {NOUNS[whom]} ."
            for who, whom in pairs
        ]
        lines[" ".join(sentence)] = None
    return list(lines)


@pytest.fixture(scope="session")
def text_file(sentences: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(sentences))
    return path


@pytest.fixture(scope="session")
def encoder_folder(
    tokenizer: PreTrainedTokenizerBase,
    make_teacher: Callable[..., BertForMaskedLM],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A checkpoint of an encoder without a masked-LM head, as the packaged one."""
    folder = tmp_path_factory.mktemp("encoder")
    encoder: BertModel = make_teacher().bert
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
