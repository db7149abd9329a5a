"""Distils a masked language model with transformers' Trainer: three lines more than the Trainer alone.

needs: transformers, accelerate
Teacher and student are small random models made from configurations, and the text is arithmetic: nothing is downloaded.
"""

import tempfile

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM, TrainingArguments

from distil_fast.integrations.transformers import DistillationTrainer

VOCABULARY, MASK, IGNORED = 512, 1, -100


def collate(sequences: list[Tensor]) -> dict[str, Tensor]:
    """Padded and masked: 15 % of the tokens, chosen anew each time."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids, real = pad(sequences, True), pad([torch.ones_like(s) for s in sequences], True)
    chosen = (torch.rand(ids.shape) < 0.15) & real.bool()
    return {
        "input_ids": ids.masked_fill(chosen, MASK),
        "attention_mask": real,
        "labels": ids.masked_fill(~chosen, IGNORED),
    }


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    teacher = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, initializer_range=0.1, **sizes))
    student = DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=VOCABULARY, dim=128, n_layers=2, n_heads=4, hidden_dim=256)
    )
    text = [2 + (torch.arange(12 + i % 30) * (1 + i % 7) + i) % (VOCABULARY - 2) for i in range(256)]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,  # micro-batches of any lengths: the step is that of 32 sequences
            num_train_epochs=3,
            learning_rate=1e-3,
            logging_steps=8,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = DistillationTrainer(
            student, args, collate, text, eval_dataset=text[:64], teacher=teacher, temperature=2.0, soft_weight=5.0
        )
        trainer.train()
        print(f"eval_loss {trainer.evaluate()['eval_loss']:.4f}")


if __name__ == "__main__":
    main()
