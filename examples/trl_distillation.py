# needs: trl
"""TRL's DistillationTrainer, which compares hidden states through both heads, with its loss computed by distil_fast.

A tiny random student writes completions and learns a tiny random teacher's distribution over them, in seconds on two
cores; nothing is downloaded. Only `apply(trainer)` is new. Next: docs/integrations.md, "TRL"; trl_gkd.py.
"""

from __future__ import annotations

import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import DistillationConfig, DistillationTrainer

from distil_fast.integrations.trl import apply

WORDS = ["<pad>", "<eos>", *(f"word{i}" for i in range(2046))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def make_model(layers: int, width: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def main() -> None:
    set_seed(0)
    prompts = [" ".join(f"word{(7 * i + j) % 2046}" for j in range(3 + i % 5)) for i in range(40)]
    with tempfile.TemporaryDirectory() as output:
        trainer = DistillationTrainer(
            model=make_model(layers=1, width=32),
            teacher_model=make_model(layers=2, width=64),
            args=DistillationConfig(
                output_dir=output,
                max_steps=6,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                max_completion_length=16,
                beta=0.5,
                logging_steps=2,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=make_tokenizer(),
        )
        apply(trainer)
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    print("loss:   ", *(entry["loss"] for entry in entries))
    print("entropy:", *(entry["entropy"] for entry in entries))
    assert entries[-1]["loss"] < entries[0]["loss"]


if __name__ == "__main__":
    main()
