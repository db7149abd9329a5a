"""torchtune's KD loss from a config, replaced by ours: a step of its KD recipe on tiny random Llamas."""
# needs: torchtune

from __future__ import annotations

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchtune import config
from torchtune.models.llama3 import llama3
from torchtune.modules.loss import CEWithChunkedOutputLoss

CONFIG = """
kd_ratio: 0.5
kd_loss:
  # _component_: torchtune.modules.loss.ForwardKLWithChunkedOutputLoss
  _component_: distil_fast.integrations.torchtune.ForwardKLWithChunkedOutputLoss
"""


def tiny_llama(layers: int, width: int) -> nn.Module:
    return llama3(
        vocab_size=1000, num_layers=layers, num_heads=4, num_kv_heads=2, embed_dim=width, max_seq_len=64,
        intermediate_dim=2 * width,
    )  # fmt: skip


def recipe_loss(student: nn.Module, teacher: nn.Module, tokens: Tensor, ce: nn.Module, kd: nn.Module) -> Tensor:
    """What `_loss_step` and `train` of torchtune's KD recipes compute for a batch."""
    logits = student(tokens)  # lists of chunks
    with torch.no_grad():
        teacher_logits = teacher(tokens)
    labels = torch.hstack((tokens[:, 1:], torch.full((len(tokens), 1), -100)))
    return 0.5 * ce(logits, labels) + 0.5 * kd(logits, teacher_logits, labels)


def main() -> None:
    torch.manual_seed(0)
    student, teacher = tiny_llama(1, 32), tiny_llama(2, 64).eval()
    tokens = torch.randint(1000, (2, 45))  # not divisible by 8 chunks
    cfg = OmegaConf.create(CONFIG)
    ce_loss, kd_loss = CEWithChunkedOutputLoss(), config.instantiate(cfg.kd_loss)
    for model in (student, teacher):
        model.set_num_output_chunks(kd_loss.num_output_chunks)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for step in range(20):
        loss = recipe_loss(student, teacher, tokens, ce_loss, kd_loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == 19:
            print(f"step {step:2d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
