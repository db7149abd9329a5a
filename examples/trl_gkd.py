# needs: trl
"""TRL's GKDTrainer with its loss computed by distil_fast: one line more.

A tiny random student learns from a tiny random teacher on made-up conversations, in seconds on two cores; nothing is
downloaded. With your own models and data only `apply(trainer)` is new. Next: docs/integrations.md, "TRL".
"""

from __future__ import annotations

import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl.experimental.gkd import GKDConfig, GKDTrainer

from distil_fast.integrations.trl import apply

WORDS = ["<pad>", "<eos>", "user", "assistant", *(f"word{i}" for i in range(2044))]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


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


def make_dataset(examples: int) -> Dataset:
    words = [f"word{7 * i % 2044}" for i in range(20 * examples)]
    rows = []
    for i in range(examples):
        text = words[20 * i : 20 * i + 20]
        prompt, answer = " ".join(text[: 4 + i % 5]), " ".join(text[8 : 12 + i % 9])
        rows.append({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]})
    return Dataset.from_list(rows)


def main() -> None:
    set_seed(0)
    with tempfile.TemporaryDirectory() as output:
        trainer = GKDTrainer(
            model=make_model(layers=1, width=32),
            teacher_model=make_model(layers=2, width=64),
            args=GKDConfig(
                output_dir=output,
                max_steps=10,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                lmbda=0.0,  # the data's answers; above 0, the student's own
                beta=0.5,
                logging_steps=5,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=make_dataset(40),
            processing_class=make_tokenizer(),
        )
        apply(trainer)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("loss:", *losses)
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
