"""ModelOpt's kd_loss mode with our loss of logits as its criterion, padding left out, on tiny random BERTs."""
# needs: modelopt

from __future__ import annotations

import modelopt.torch.distill as mtd
import torch
from transformers import BertConfig, BertForMaskedLM

from distil_fast.integrations.modelopt import LogitsDistillationLoss

VOCABULARY, LENGTH = 2000, 32


def tiny_bert(layers: int, hidden: int) -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=2 * hidden, max_position_embeddings=LENGTH,
        )
    )  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    # ("", ""): the models' whole outputs. ModelOpt's own loss takes tensors only, and knows no mask.
    criterion = {("", ""): LogitsDistillationLoss(temperature=2.0, reduction="token_mean")}
    options = {"teacher_model": tiny_bert(4, 64), "criterion": criterion, "loss_balancer": mtd.StaticLossBalancer(0.5)}
    model = mtd.convert(tiny_bert(2, 32), mode=[("kd_loss", options)])
    model.train()

    ids = torch.randint(VOCABULARY, (4, LENGTH))
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 20, 12, 5])[:, None]
    labels = torch.where(mask & (torch.rand(ids.shape) < 0.15), ids, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(20):
        outputs = model(input_ids=ids, attention_mask=mask.long(), labels=labels)
        loss = model.compute_kd_loss(student_loss=outputs.loss, mask=mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == 19:
            print(f"step {step:2d}  loss {loss.item():.4f}")
    print(f"exported: {type(mtd.export(model)).__name__}")


if __name__ == "__main__":
    main()
