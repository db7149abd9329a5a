"""Teachers load with their tokenizer, of every family; what cannot be a teacher is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer, PreTrainedModel

from distil_fast.training import teacher as teacher_module
from distil_fast.training.settings import InputError
from distil_fast.training.teacher import load_teacher, require_head
from tests.training.families import FAMILIES, PADDING, VOCABULARY, make_batch, make_model

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tokenizer(folder: Path, padding: int = 0, size: int = VOCABULARY) -> None:
    words = [f"w{i}" for i in range(size)]
    words[: len(SPECIALS)] = SPECIALS
    words[0], words[padding] = words[padding], words[0]
    (folder / "tokenizer.json").unlink(missing_ok=True)  # of an earlier call
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)


def checkpoint(folder: Path, family: str = "bert", model: PreTrainedModel | None = None) -> PreTrainedModel:
    model = make_model(family) if model is None else model
    model.save_pretrained(folder)
    tokenizer(folder, PADDING.get(family, 0))
    return model


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_loads_as_it_was_saved(family: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, family)
    teacher = load_teacher(str(tmp_path))
    assert type(teacher.model) is type(model)
    assert teacher.has_head
    assert teacher.name == str(tmp_path)
    assert not teacher.model.training
    assert teacher.model.dtype == torch.float32
    assert teacher.tokenizer.pad_token_id == PADDING.get(family, 0)
    batch = make_batch(family)
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        assert torch.equal(teacher.model(**inputs).logits, model(**inputs).logits)
    require_head(teacher)


def test_a_bert_without_a_head_says_so(tmp_path: Path) -> None:
    checkpoint(tmp_path, model=make_model("bert").bert)
    teacher = load_teacher(str(tmp_path))
    assert not teacher.has_head
    with pytest.raises(InputError, match="is an encoder without a masked-LM head"):
        require_head(teacher)


def test_the_packaged_encoder_is_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "an_encoder_in_a_package"  # like the real one, which only the demo installs
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it must not be imported')")
    checkpoint(package / "model", model=make_model("bert").bert)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(teacher_module, "PACKAGE", package.name)
    teacher = load_teacher(None)
    assert teacher.name == package.name
    assert not teacher.has_head
    require_head(teacher)


@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert"])
def test_other_encoders_need_their_head(family: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, family, make_model(family).base_model)
    with pytest.raises(InputError, match=r"lacks weights of the masked-LM head: .* saved from a"):
        load_teacher(str(tmp_path))


def drop(folder: Path, part: str) -> None:
    path = folder / "model.safetensors"
    save_file({name: x for name, x in load_file(path).items() if part not in name}, path, metadata={"format": "pt"})


def test_unusable_checkpoints_are_refused(tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        checkpoint(tmp_path / name)
        return tmp_path / name

    drop(broken("part"), "layer.1.attention.self.query")
    (broken("weights") / "model.safetensors").unlink()
    path = broken("cut") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    edit(broken("shape"), intermediate_size=48)
    edit(broken("decoder"), is_decoder=True)
    edit(broken("relative"), position_embedding_type="relative_key")
    edit(broken("mobile"), model_type="mobilebert")
    (broken("json") / "config.json").write_text("{")
    tokenizer(broken("larger"), size=VOCABULARY + 1)
    tokenizer(broken("smaller"), size=VOCABULARY // 2 - 1)
    path = broken("none")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    messages = {
        "part": r"lacks weights of the encoder: bert\.encoder\.layer\.1\.attention\.self\.query",
        "weights": "could not be loaded",
        "cut": "could not be loaded",
        "shape": "could not be loaded",
        "decoder": "configured as a decoder",
        "relative": "expected absolute position embeddings",
        "mobile": "one of the types bert, .*, got a 'mobilebert'",
        "json": "could not be loaded",
        "larger": "68 tokens for a vocabulary of 67",
        "smaller": "32 tokens for a vocabulary of 67",
        "none": "5 tokens for a vocabulary of 67",  # transformers makes one of the special tokens alone
    }
    for name, message in messages.items():
        with pytest.raises(InputError, match=message):
            load_teacher(str(tmp_path / name))
    with pytest.raises(InputError, match="there is no folder"):
        load_teacher(str(tmp_path / "absent"))


@pytest.mark.parametrize("kind", ["mask", "pad"])
def test_a_tokenizer_needs_its_special_tokens(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path)
    monkeypatch.setattr(BertTokenizer, f"{kind}_token_id", None, raising=False)
    with pytest.raises(InputError, match=f"without a {kind} token"):
        load_teacher(str(tmp_path))


def test_positions_that_count_from_another_padding(tmp_path: Path) -> None:
    checkpoint(tmp_path, "roberta")
    tokenizer(tmp_path, padding=0)
    with pytest.raises(InputError, match=r"positions from its padding token 1, .* pads with 0"):
        load_teacher(str(tmp_path))
