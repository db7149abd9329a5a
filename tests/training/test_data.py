"""Text to batches: prose is told from code, nothing leaks into the held-out part, and little is padded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from distil_fast.training import data
from distil_fast.training.config import InputError
from distil_fast.training.corpus import documents_from_installed_packages, prose
from distil_fast.training.data import batches, documents_from_file, pack, split_documents, token_counts

PAD, CLS, SEP = 0, 2, 3


def some_sequences(lengths: list[int]) -> list[torch.Tensor]:
    return [torch.full((length,), 5 + i % 20) for i, length in enumerate(lengths)]


# ---------------------------------------------------------------------------------------------- documents


def test_lines_become_paragraphs_in_runs_of_documents(tmp_path: Path) -> None:
    lines = [f"line {i} " + "word " * 30 for i in range(100)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(lines))
    documents = documents_from_file(path)
    assert [paragraph for document in documents for paragraph in document] == [line.strip() for line in lines]
    sizes = [sum(map(len, document)) for document in documents[:-1]]
    assert all(data.DOCUMENT_CHARACTERS <= size < data.DOCUMENT_CHARACTERS + 200 for size in sizes)


def test_one_endless_line_is_cut_between_words(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(5000)]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(words))
    documents = documents_from_file(path)
    assert len(documents) > 5
    assert " ".join(paragraph for document in documents for paragraph in document).split() == words


def test_unusable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        documents_from_file(tmp_path / "absent.txt")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        documents_from_file(tmp_path)
    (tmp_path / "binary").write_bytes(b"text \xff\xfe more")
    with pytest.raises(InputError, match=r"expected UTF-8 text, and .* has the byte 0xff at 5"):
        documents_from_file(tmp_path / "binary")
    (tmp_path / "blank").write_text(" \n\n \t\n")
    with pytest.raises(InputError, match="is empty"):
        documents_from_file(tmp_path / "blank")


def test_split_is_deterministic_and_shares_no_paragraph() -> None:
    documents = [[f"own {i}", f"shared {i % 7}", f"own {i}", f"also own {i}"] for i in range(100)]
    training, held_out = split_documents(documents)
    assert (training, held_out) == split_documents(documents)
    seen = [{paragraph for document in part for paragraph in document} for part in (training, held_out)]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == {paragraph for document in documents for paragraph in document}
    assert sum(len(document) for part in (training, held_out) for document in part) == 207  # each once
    assert len(held_out) == 5


def test_a_document_of_nothing_new_does_not_shift_the_split() -> None:
    documents = [[f"paragraph {i}"] for i in range(40)]
    assert split_documents(documents) == split_documents([*documents[:10], documents[3], *documents[10:]])


# ---------------------------------------------------------------------------------------------- prose


def test_prose_is_kept_and_its_markup_removed() -> None:
    text = (
        """Return the ``value`` of the :class:`~package.Thing` that was
    """.rstrip()
        + """
given to this *function*, or the one that it had before, if `nothing` was given.

A second paragraph that is long enough to be kept, because it is a sentence of the kind that people read."""
    )
    assert prose(text) == [
        "Return the value of the package.Thing that was given to this function, or the one that it had before, if "
        "nothing was given.",
        "A second paragraph that is long enough to be kept, because it is a sentence of the kind that people read.",
    ]


@pytest.mark.parametrize(
    "block",
    [
        ">>> x = the.value(of, a, thing) if it is not None else the.other(that, is, in, the, list)",
        "x : array_like\n    The input of the function, which is one of the things that are to be added to the other.",
        "Too short to be of use.",
        "| column of the table | that is | not a sentence | but has the words of one | and | more | of | them |.",
        "no capital at the beginning of this sentence, which is otherwise as good as any that you can think of.",
        "Names only: alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma.",
    ],
)
def test_what_is_not_prose_is_dropped(block: str) -> None:
    assert prose(block) == []


@pytest.mark.slow
def test_installed_packages_hold_enough_text_in_a_fixed_order() -> None:
    documents = documents_from_installed_packages()
    assert sum(len(paragraph) for document in documents for paragraph in document) > 1_000_000
    assert documents == documents_from_installed_packages()


# ---------------------------------------------------------------------------------------------- sequences


def test_sequences_hold_every_token_once_and_in_order(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [["the old cat sees a small dog ."] * count for count in (1, 2, 5, 9, 3, 4, 6, 7, 8)]
    sequences = pack(documents, tokenizer, length=20)
    assert all(data.MINIMUM_TOKENS <= len(s) <= 20 and s[0] == CLS and s[-1] == SEP for s in sequences)
    one = tokenizer.encode(documents[0][0], add_special_tokens=False)
    assert len(one) == 8
    expected = []
    for document in documents:
        tokens = one * len(document)
        expected += [tokens[i : i + 18] for i in range(0, len(tokens), 18) if len(tokens) - i >= 10]
    assert [s[1:-1].tolist() for s in sequences] == expected


def test_too_little_text(tokenizer: PreTrainedTokenizerBase) -> None:
    for documents in ([], [["the old cat sees a small dog . the old cat sees a small dog ."]] * 7):
        with pytest.raises(InputError, match=rf"at least 8 sequences of 20 tokens .* got {len(documents)}\."):
            pack(documents, tokenizer, length=20)


def test_token_counts() -> None:
    assert token_counts([torch.tensor([1, 2, 2]), torch.tensor([4, 2])], 6).tolist() == [0, 1, 3, 0, 1, 0]


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("shuffled", [True, False])
def test_a_pass_has_every_sequence_once(shuffled: bool) -> None:
    sequences = [torch.cat([torch.tensor([100 + i]), torch.ones(i % 17 + 1)]).long() for i in range(203)]
    generator = torch.Generator().manual_seed(0) if shuffled else None
    seen = []
    for input_ids, attention_mask, *_ in batches(sequences, 8, PAD, generator):
        lengths = attention_mask.sum(1)
        assert len(input_ids) <= 8
        assert int(lengths.max()) == input_ids.shape[1]
        assert torch.equal(attention_mask, (input_ids != PAD).long())
        assert all(
            torch.equal(row[:n], sequences[int(row[0]) - 100]) for row, n in zip(input_ids, lengths, strict=True)
        )
        seen += input_ids[:, 0].tolist()
    assert sorted(seen) == list(range(100, 303))


def test_little_padding_and_another_order_each_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(12, 129, (3000,), generator=generator).tolist()  # far more ragged than packed text
    sequences = some_sequences(lengths)
    passes = [list(batches(sequences, 8, PAD, generator)) for _ in range(2)]
    padded = sum(int((b.attention_mask == 0).sum()) for b in passes[0])
    assert padded / sum(b.attention_mask.numel() for b in passes[0]) < 0.03
    assert [len(b.input_ids[0]) for b in passes[0]] != [len(b.input_ids[0]) for b in passes[1]]
    widths = torch.tensor([float(b.input_ids.shape[1]) for b in passes[0]])
    assert torch.corrcoef(torch.stack([widths, torch.arange(len(widths))]))[0, 1].abs() < 0.2  # not sorted by length


def test_order_is_the_generators() -> None:
    sequences = some_sequences([20, 30, 25, 40] * 20)
    runs = [list(batches(sequences, 4, PAD, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)]
    same = [all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(runs[0], run, strict=True)) for run in runs[1:]]
    assert same == [True, False]
