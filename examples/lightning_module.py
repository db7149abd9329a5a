"""Distils a small GPT-2 in Lightning: exact under accumulate_grad_batches, and the teacher in no checkpoint.

needs: lightning, transformers
Both models are random ones made from configurations, and the text is arithmetic: nothing is downloaded.
"""

import lightning
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from distil_fast import distillation_loss
from distil_fast.integrations.lightning import StepCounts

VOCABULARY, IGNORED = 64, -100


def next_tokens(batch: dict[str, Tensor]) -> Tensor:
    """Labels beside the logits that predict them; the logits stay where they are."""
    real = batch["input_ids"].where(batch["attention_mask"].bool(), IGNORED)
    return F.pad(real[:, 1:], (0, 1), value=IGNORED)


class Distiller(lightning.LightningModule):
    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, temperature: float = 2.0) -> None:
        super().__init__()
        self.student, self.temperature = student, temperature
        self.__dict__["teacher"] = teacher.eval()  # past nn.Module: no checkpoint, optimiser or wrapper has it

    def on_fit_start(self) -> None:
        self.teacher.to(self.device)

    @staticmethod
    def count(batch: dict[str, Tensor]) -> Tensor:
        labelled = (next_tokens(batch) != IGNORED).sum()
        return torch.stack([labelled, labelled])  # of the soft and of the hard term

    def training_step(self, given: tuple[dict[str, Tensor], Tensor], batch_idx: int) -> Tensor:
        batch, counts = given
        soft_count, hard_count = self.trainer.strategy.reduce(counts, reduce_op="mean")
        labels = next_tokens(batch)
        with torch.inference_mode():
            teacher_logits = self.teacher(**batch).logits
        terms = distillation_loss(
            self.student(**batch).logits,
            teacher_logits,
            labels,
            temperature=self.temperature,
            soft_mask=labels != IGNORED,
            soft_count=soft_count,
            hard_count=hard_count,
        )
        self.log_dict({"soft": terms.soft, "hard": terms.hard})
        return terms.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=3e-3)


def model(layers: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=layers, n_head=4, **ends))


def collate(sequences: list[Tensor]) -> dict[str, Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    return {"input_ids": pad(sequences, True), "attention_mask": pad([torch.ones_like(s) for s in sequences], True)}


def main() -> None:
    text = [(torch.arange(8 + i % 17) * (1 + i % 5) + i) % VOCABULARY for i in range(256)]  # each counts in its steps
    loader = DataLoader(text, batch_size=8, shuffle=True, collate_fn=collate)
    distiller = Distiller(model(1, seed=0), model(4, seed=1))
    trainer = lightning.Trainer(
        max_epochs=2, accumulate_grad_batches=4, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(distiller, StepCounts(loader, Distiller.count, accumulate_grad_batches=4))
    print({name: round(value.item(), 4) for name, value in trainer.logged_metrics.items()})


if __name__ == "__main__":
    main()
