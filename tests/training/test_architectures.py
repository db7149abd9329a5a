"""Every family's parts, run one by one, are the whole model; other families are refused by name."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, MobileBertConfig, MobileBertForMaskedLM

from distil_fast.training.architectures import ARCHITECTURES, layer_count, longest_sequence
from distil_fast.training.masked_lm import apply_head, decoder, encode, transform
from distil_fast.training.settings import InputError
from tests.training.families import CONFIGURATIONS, FAMILIES, LAYERS, POSITIONS, VOCABULARY, make_batch, make_model


def test_every_family_is_tested() -> None:
    assert ARCHITECTURES.keys() == CONFIGURATIONS.keys()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_are_the_whole(family: str, attention: str) -> None:
    model = make_model(family).double()
    if attention == "sdpa":
        if not getattr(model, "_supports_sdpa", False):
            pytest.skip("the class has none")
        model.set_attn_implementation("sdpa")
    batch = make_batch(family)
    real = batch.attention_mask.bool()
    with torch.no_grad():
        whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
        hidden = encode(model, batch.input_ids, batch.attention_mask)
        states = encode(model, batch.input_ids, batch.attention_mask, [-1, 0, 2, 0])
        features = transform(model, hidden)
        weight, bias = decoder(model)
        logits = apply_head(model, hidden)
    assert len(whole.hidden_states) == LAYERS + 1 == layer_count(model) + 1
    assert whole.logits[real].std() > 0.5
    bound = {"rtol": 0, "atol": 1e-12 * whole.logits[real].abs().max().item()}
    for layer, state in zip([-1, 0, 2, 0], states, strict=True):
        torch.testing.assert_close(state[real], whole.hidden_states[layer][real], **bound)
    torch.testing.assert_close(logits[real], whole.logits[real], **bound)
    torch.testing.assert_close((features @ weight.T + bias)[real], whole.logits[real], **bound)
    assert weight is model.get_input_embeddings().weight
    assert weight.shape == (VOCABULARY, features.shape[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_padding_no_mask_is_needed(family: str) -> None:
    model, batch = make_model(family), make_batch(family, (11, 11))
    with torch.no_grad():
        expected = encode(model, batch.input_ids, batch.attention_mask)
        torch.testing.assert_close(encode(model, batch.input_ids, None), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_encoding_asks_the_device_for_nothing(attention: str) -> None:
    """On a CPU, where asking costs nothing; on a GPU the same ops would wait."""
    asked: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "item", "masked_select"):
                asked.append(str(func))
            return func(*args, **(kwargs or {}))

    for family in FAMILIES:
        model, batch = make_model(family), make_batch(family)
        if attention == "sdpa" and not getattr(model, "_supports_sdpa", False):
            continue
        model.set_attn_implementation(attention)
        with Watch():
            encode(model, batch.input_ids, batch.attention_mask, [0, -1])
        assert not asked, family
    with Watch():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    assert asked  # transformers' own way does ask: the watch sees


@pytest.mark.parametrize("family", FAMILIES)
def test_longest_sequence_is_the_longest_that_runs(family: str) -> None:
    model = make_model(family)
    assert longest_sequence(model) == POSITIONS
    with torch.no_grad():
        encode(model, torch.full((1, POSITIONS), 7), None)
        with pytest.raises((IndexError, RuntimeError)):
            encode(model, torch.full((1, POSITIONS + 1), 7), None)


def test_a_layer_that_is_not_there() -> None:
    model, batch = make_model("bert"), make_batch("bert")
    for layer in (LAYERS + 1, -LAYERS - 2):
        with pytest.raises(ValueError, match=f"expected numbers from -4 to 3, got .{layer}"):
            encode(model, batch.input_ids, None, [layer])


def test_other_families_are_refused_by_name() -> None:
    shape = {"vocab_size": 31, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 8, "embedding_size": 8}
    mobile = MobileBertForMaskedLM(MobileBertConfig(**shape, num_attention_heads=2, intra_bottleneck_size=8))
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    for model, name in ((mobile, "mobilebert"), (gpt, "gpt2")):
        with pytest.raises(InputError, match=rf"types bert, distilbert, roberta, .*, got a '{name}'"):
            layer_count(model)
    with pytest.raises(InputError, match="expected a ElectraForMaskedLM, which has a masked-LM head"):
        layer_count(make_model("electra").electra)
