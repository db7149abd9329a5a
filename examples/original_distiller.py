"""A step of the original DistilBERT distiller with its loss block, from masked_select to cosine, in one call.

needs: transformers
The step's surroundings are the original's in short; models are small random ones, and the text is random ids.
"""

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM, PreTrainedModel

from distil_fast.integrations.distilbert import step_losses

VOCABULARY, IGNORED = 1024, -100


class Distiller:
    temperature, alpha_ce, alpha_mlm, alpha_clm, alpha_mse, alpha_cos = 2.0, 5.0, 2.0, 0.0, 0.0, 1.0
    restrict_ce_to_mask = False

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        self.student, self.teacher = student, teacher.eval()
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4, eps=1e-6, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, input_ids: Tensor, attention_mask: Tensor, lm_labels: Tensor) -> Tensor:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "output_hidden_states": True}
        student_outputs = self.student(**given)
        with torch.no_grad():
            teacher_outputs = self.teacher(**given)

        losses = step_losses(  # in the place of Distiller.step from `if self.params.restrict_ce_to_mask` on
            student_outputs["logits"],
            teacher_outputs["logits"],
            student_outputs["hidden_states"],
            teacher_outputs["hidden_states"],
            attention_mask,
            lm_labels,
            temperature=self.temperature,
            alpha_ce=self.alpha_ce,
            alpha_mlm=self.alpha_mlm,
            alpha_clm=self.alpha_clm,
            alpha_mse=self.alpha_mse,
            alpha_cos=self.alpha_cos,
            restrict_ce_to_mask=self.restrict_ce_to_mask,
        )
        losses.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack(losses).detach()  # on the device: read it once in a while, not at every step


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    teacher = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, initializer_range=0.1, **sizes))
    student = DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=VOCABULARY, dim=128, n_layers=2, n_heads=4, hidden_dim=256)
    )
    distiller = Distiller(student, teacher)
    for step in range(30):
        attention_mask = torch.arange(48) < torch.randint(12, 49, (8, 1))
        ids = torch.randint(5, VOCABULARY, (8, 48))
        chosen = (torch.rand(8, 48) < 0.15) & attention_mask
        losses = distiller.step(ids.masked_fill(chosen, 4), attention_mask.long(), ids.masked_fill(~chosen, IGNORED))
        if step % 10 == 9:
            names = ("loss", "ce", "mlm", "clm", "mse", "cos")
            print({name: round(value, 4) for name, value in zip(names, losses.tolist(), strict=True)})


if __name__ == "__main__":
    main()
