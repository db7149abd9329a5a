"""Feeds stop anywhere and go on with the very next micro-batch, in this process and in another, on every rank."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distil_fast.training import stream as stream_module
from distil_fast.training import text as text_module
from distil_fast.training.batch import Batch
from distil_fast.training.feed import TokenFeed
from distil_fast.training.protocols import Feed
from distil_fast.training.settings import DataConfig, InputError, MaskingConfig
from distil_fast.training.stream import StreamFeed
from distil_fast.training.text import Text, open_text

ARRANGEMENTS = ["buckets", "packed"]


@pytest.fixture(scope="module")
def make_text(
    text_file: Path, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Text]:
    cache = tmp_path_factory.mktemp("cache")
    text_of = {
        name: open_text(
            DataConfig(text=[text_file], sequence_length=32, arrangement=name, held_out_every=3, cache=cache),  # type: ignore[arg-type]
            tokenizer,
        )
        for name in ARRANGEMENTS
    }
    return text_of.__getitem__


@pytest.fixture(scope="module")
def make_stream(
    sentences: list[str], tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., StreamFeed]]:
    folder = tmp_path_factory.mktemp("stream")
    for i in range(3):
        rows = [f"{sentence}\n{sentence}" for sentence in sentences[i * 40 : i * 40 + 40]]
        Dataset.from_dict({"text": rows}).to_parquet(str(folder / f"{i}.parquet"))
    datasets.disable_progress_bars()

    loaded = datasets.load_dataset(
        "parquet",
        data_files=[str(folder / f"{i}.parquet") for i in range(3)],
        split="train",
        streaming=True,
        cache_dir=str(folder / "cache"),
    )

    def make(arrangement: str, rank: int = 0, ranks: int = 1, skip: int = 0, size: int = 4) -> StreamFeed:
        stream = copy.deepcopy(loaded)
        stream = stream.skip(skip) if skip else stream
        how = (arrangement, 30, size, 5)
        return StreamFeed(stream, "text", tokenizer, *how, rank=rank, ranks=ranks, window_rows=17)  # type: ignore[arg-type]

    yield make
    datasets.enable_progress_bars()


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True) if x is not None and y is not None)


def rows_of(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(row[mask.bool()].tolist()) for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def check_every_position(make: Callable[[], Feed], steps: int, stride: int = 1) -> None:
    """What a fresh feed gives after loading the state of each position is what came after it."""
    unbroken, states, batches = make(), [], []
    for _ in range(steps):
        states.append(json.dumps(unbroken.state_dict()))
        batches.append(next(unbroken))
    used = make()
    next(used)
    for position in range(0, steps, stride):
        for feed in (make(), used):  # whatever it did before
            feed.load_state_dict(json.loads(states[position]))
            assert json.dumps(feed.state_dict()) == states[position]
            for expected in batches[position : position + 3]:
                assert equal(next(feed), expected), position


# ---------------------------------------------------------------------------------------------- a text on disk


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_position_of_two_passes(make_text: Callable[[str], Text], arrangement: str, ranks: int) -> None:
    text = make_text(arrangement)
    for rank in range(ranks):
        steps = 2 * len(text.feed(8, 1, rank=rank, ranks=ranks)) + 3  # type: ignore[arg-type]
        check_every_position(lambda rank=rank: text.feed(8, 1, rank=rank, ranks=ranks), steps, 3)  # type: ignore[misc]


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_ranks_share_a_pass(make_text: Callable[[str], Text], arrangement: str) -> None:
    text = make_text(arrangement)
    feeds = [TokenFeed(text.training, 8, 1, rank=rank, ranks=3) for rank in range(3)]  # type: ignore[arg-type]
    assert len({len(feed) for feed in feeds}) == 1
    for _ in range(2):
        seen = [row for feed in feeds for batch in islice(feed, len(feed)) for row in rows_of(batch)]
        assert len(seen) == len(set(seen)) > len(text.training) - 24  # type: ignore[arg-type]
        assert {json.dumps(feed.state_dict()) for feed in feeds} == {json.dumps(feeds[0].state_dict())}


def test_passes_differ_and_the_seed_decides(make_text: Callable[[str], Text]) -> None:
    def two_passes(seed: int) -> list[list[tuple[int, ...]]]:
        feed = make_text("buckets").feed(8, seed)
        return [[row for batch in islice(feed, len(feed)) for row in rows_of(batch)] for _ in range(2)]  # type: ignore[arg-type]

    first = two_passes(1)
    assert first[0] != first[1]
    assert first == two_passes(1)
    assert first != two_passes(2)


def test_a_state_of_something_else(make_text: Callable[[str], Text]) -> None:
    state = make_text("buckets").feed(8, 1).state_dict()
    for feed, message in (
        (make_text("buckets").feed(8, 2), "expected seed 2, got 1"),
        (make_text("packed").feed(8, 1), "expected sequences '.* packed 32', got '.* buckets 32'"),
        (make_text("buckets").feed(4, 1), "expected micro_batch_size 4, got 8"),
        (make_text("buckets").feed(8, 1, ranks=2), "expected ranks 2, got 1"),
    ):
        with pytest.raises(InputError, match=message):
            feed.load_state_dict(state)


def test_too_few_sequences(make_text: Callable[[str], Text]) -> None:
    with pytest.raises(InputError, match="expected a micro-batch of 500 sequences for each of 2 ranks"):
        make_text("buckets").feed(500, 1, ranks=2)


@pytest.mark.slow
def test_a_restart_in_a_fresh_process(text_file: Path, encoder_folder: Path, tmp_path: Path) -> None:
    options = {"sequence_length": 32, "held_out_every": 3, "text": [text_file], "cache": tmp_path}
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    feed = open_text(DataConfig(**options), tokenizer).feed(8, 1)  # type: ignore[arg-type]
    for _ in range(37):
        next(feed)
    state = json.dumps(feed.state_dict())
    script = f"""
from hashlib import sha256
from pathlib import PosixPath
from transformers import AutoTokenizer
from distil_fast.training.settings import DataConfig
from distil_fast.training.text import open_text
feed = open_text(DataConfig(**{options!r}), AutoTokenizer.from_pretrained({str(encoder_folder)!r})).feed(8, 1)
feed.load_state_dict({state})
for _ in range(40):
    print(sha256(next(feed).input_ids.numpy().tobytes()).hexdigest())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [sha256(next(feed).input_ids.numpy().tobytes()).hexdigest() for _ in range(40)]


# ---------------------------------------------------------------------------------------------- a stream


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize(("rank", "ranks", "skip"), [(0, 1, 0), (1, 2, 0), (0, 1, 23)])
def test_every_position_of_a_stream(
    make_stream: Callable[..., StreamFeed], arrangement: str, rank: int, ranks: int, skip: int
) -> None:
    """Two passes of several windows and files; the third window of one rank's begins within the second file."""
    unbroken = make_stream(arrangement, rank, ranks, skip)
    steps = 0
    while unbroken.epoch < 2:
        next(unbroken)
        steps += 1
    assert steps > 10
    check_every_position(lambda: make_stream(arrangement, rank, ranks, skip), steps, 2)


def test_ranks_share_a_stream(make_stream: Callable[..., StreamFeed]) -> None:
    seen: list[tuple[int, ...]] = []
    for rank in range(3):
        feed = make_stream("buckets", rank, 3, size=1)
        batches = []
        while feed.epoch == 0:
            batches.append(next(feed))
        seen += [row for batch in batches[:-1] for row in rows_of(batch)]  # the last is of the next pass
    whole = make_stream("buckets", size=1)
    rows = []
    while whole.epoch == 0:
        rows += rows_of(next(whole))
    assert sorted(seen) == sorted(rows[:-1])
    assert len(rows) > 120


def test_passes_over_a_stream_differ(make_stream: Callable[..., StreamFeed]) -> None:
    feed = make_stream("buckets", size=1)
    passes: list[list[tuple[int, ...]]] = [[], [], []]
    while feed.epoch < 2:
        epoch = feed.epoch
        rows = rows_of(next(feed))
        passes[feed.epoch if feed.epoch != epoch else epoch] += rows
    assert sorted(passes[0]) == sorted(passes[1])
    assert passes[0] != passes[1]


def test_long_rows_make_small_windows(make_stream: Callable[..., StreamFeed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "WINDOW_CHARACTERS", 1000)  # five rows
    feed = make_stream("buckets", size=1)
    while feed.epoch == 0:
        last = feed.window
        next(feed)
    assert last > 20
    check_every_position(lambda: make_stream("buckets"), 40, 5)


def test_a_stream_too_small(make_stream: Callable[..., StreamFeed]) -> None:
    with pytest.raises(InputError, match="a whole pass does not make 500 sequences"):
        next(make_stream("buckets", size=500))


# ---------------------------------------------------------------------------------------------- the whole


def test_a_streamed_dataset_holds_out_its_first_rows(
    sentences: list[str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Dataset.from_dict({"text": sentences}).save_to_disk(str(tmp_path / "data"))
    monkeypatch.setattr(text_module, "HELD_OUT_ROWS", 40)
    config = DataConfig(dataset=str(tmp_path / "data"), streaming=True, sequence_length=32, cache=tmp_path / "cache")
    text = open_text(config, tokenizer)
    held_out = {tuple(row.tolist()) for row in text.held_out}
    assert len(held_out) == 40
    feed = text.feed(4, 1)
    trained = [row for batch in islice(feed, 280) for row in rows_of(batch)]
    assert len(set(trained)) == 560
    assert not held_out & set(trained)
    assert int(text.counts.sum()) == sum(len(row) - 2 for row in text.held_out)


def test_no_paragraph_is_in_both_parts(make_text: Callable[[str], Text], sentences: list[str]) -> None:
    text = make_text("buckets")
    assert text.summary["training_documents"] + text.summary["held_out_documents"] == 8
    assert text.summary["training_tokens"] == int(text.training.lengths.sum())  # type: ignore[union-attr]
    assert not {tuple(row.tolist()) for row in text.training} & {tuple(row.tolist()) for row in text.held_out}


@pytest.mark.parametrize("part", ["training", "held_out"])
def test_too_little_text(part: str, sentences: list[str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(sentences[:100]))
    (tmp_path / "b.txt").write_text("\n".join(sentences[100:102]))
    config = DataConfig(text=[tmp_path / "b.txt"], held_out=[tmp_path / "a.txt"], sequence_length=32, cache=tmp_path)
    if part == "held_out":
        config = DataConfig(text=config.held_out, held_out=str(tmp_path / "b.txt"), sequence_length=32, cache=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=rf"at least 8 sequences of 32 tokens .* got 2 \({part}\)"):
        open_text(config, tokenizer)


def test_a_dataset_is_found_again_until_it_changes(
    sentences: list[str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    config = DataConfig(dataset=str(path), sequence_length=32, cache=tmp_path / "cache", held_out_every=3)
    keys = []
    for rows in (sentences[:200], sentences[:200], sentences[200:400]):
        path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
        keys.append(open_text(config, tokenizer).training.key)  # type: ignore[union-attr]
        keys.append(open_text(config, tokenizer).training.key)  # type: ignore[union-attr]
    assert keys[0] == keys[1]
    assert keys[-1] == keys[-2] != keys[0]


def test_streaming_is_for_datasets(tokenizer: PreTrainedTokenizerBase, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="streaming needs a `dataset`"):
        open_text(DataConfig(text=[text_file], streaming=True, cache=tmp_path), tokenizer)


def test_masks_for_a_text(make_text: Callable[[str], Text]) -> None:
    text = make_text("buckets")
    masking = text.masking(MaskingConfig(whole_word=True, random=0.2), len(text.tokenizer) + 10, seed=3)
    assert len(masking.log_weight) == len(text.tokenizer) + 10
    assert masking.continues is not None
    batch = next(text.feed(8, 1))
    masked = masking(batch)
    assert masked.masked is not None
    assert int((masked.labels >= 0).sum()) == len(masked.masked)
