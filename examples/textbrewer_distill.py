"""TextBrewer's GeneralDistiller with our KD and hidden-state losses: one line more, on tiny random BERTs."""
# needs: textbrewer

from __future__ import annotations

import tempfile
from typing import Any

import textbrewer
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from distil_fast.integrations.textbrewer import apply

VOCABULARY, LENGTH = 2000, 32


def tiny_bert(layers: int, hidden: int) -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=2 * hidden, max_position_embeddings=LENGTH,
        )
    )  # fmt: skip


def adaptor(batch: dict[str, Tensor], outputs: Any) -> dict[str, Any]:
    mask = batch["attention_mask"]
    return {"logits": outputs.logits, "hidden": outputs.hidden_states, "logits_mask": mask, "inputs_mask": mask}


def main() -> None:
    torch.manual_seed(0)
    teacher, student = tiny_bert(4, 64), tiny_bert(2, 32)
    mask = (torch.arange(LENGTH) < torch.tensor([LENGTH, 20, 12, 5])[:, None]).long()
    batches = [{"input_ids": torch.randint(VOCABULARY, (4, LENGTH)), "attention_mask": mask} for _ in range(4)]
    match = {"feature": "hidden", "weight": 1.0, "proj": ["linear", 32, 64]}
    matches = [
        match | {"layer_S": 0, "layer_T": 0, "loss": "hidden_mse"},
        match | {"layer_S": 2, "layer_T": 4, "loss": "cos"},
    ]
    with tempfile.TemporaryDirectory() as folder:
        distiller = textbrewer.GeneralDistiller(
            textbrewer.TrainingConfig(device="cpu", output_dir=folder),
            textbrewer.DistillationConfig(temperature=4, intermediate_matches=matches),
            teacher, student, adaptor, adaptor,
        )  # fmt: skip
        apply(distiller)  # the line
        before, _ = distiller.train_on_batch(batches[0], {"output_hidden_states": True})
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
        with distiller:
            distiller.train(optimizer, batches, num_epochs=5, output_hidden_states=True)
        after, parts = distiller.train_on_batch(batches[0], {"output_hidden_states": True})
    print(f"loss {before.item():.4f} -> {after.item():.4f}")
    for name, loss in parts.items():
        print(f"  {name:45s} {loss.item():.4f}")


if __name__ == "__main__":
    main()
