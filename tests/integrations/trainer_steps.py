"""A step of DistillationTrainer on tiny models and ragged sequences, and its truth in plain float64 torch.

It knows transformers' models and Trainer; what is asserted of them is test_transformers.py's affair.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from distil_fast.integrations.transformers import DistillationTrainer
from tests.training.families import relative_error

VOCABULARY, IGNORED = 37, -100
T, SOFT, HARD = 3.0, 0.7, 0.4

Example = dict[str, Tensor]


def model_of(kind: str, seed: int) -> PreTrainedModel:
    """Without dropout, and far from uniform logits."""
    torch.manual_seed(seed)
    heads = {"vocab_size": VOCABULARY, "initializer_range": 0.3}
    if kind == "distilbert":
        return DistilBertForMaskedLM(
            DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, dropout=0.0, attention_dropout=0.0, **heads)
        )
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**sizes, **heads))  # with dropout, that a teacher must not use
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **off, **ends, **heads))
    return LlamaForCausalLM(LlamaConfig(**sizes, **ends, **heads))


def pair(kind: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher."""
    teacher = {"distilbert": "bert", "gpt2": "gpt2", "llama": "gpt2"}[kind]
    return model_of(kind, 1), model_of(teacher, 2)


def sequences(count: int = 16, labelled: float = 0.3, seed: int = 0) -> list[Example]:
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (int(torch.randint(3, 14, (), generator=g)),), generator=g)
        labels = torch.where(torch.rand(ids.shape, generator=g) < labelled, ids, IGNORED)
        made.append({"input_ids": ids, "labels": labels})
    return made


def collate(examples: list[Example]) -> Example:
    """Padded on the right to the longest."""
    names = {"input_ids": 0, "labels": IGNORED}
    pad = nn.utils.rnn.pad_sequence
    batch = {
        name: pad([e[name] for e in examples], True, value) for name, value in names.items() if name in examples[0]
    }
    return batch | {"attention_mask": pad([torch.ones_like(e["input_ids"]) for e in examples], True, 0)}


class Gradients(TrainerCallback):
    """Those of each optimiser step, as the optimiser gets them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        named = more["model"].named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **(settings | changes))


IN_FOUR = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}


def ours(
    kind: str, folder: Path, data: list[Example], changes: dict[str, Any] | None = None, **options: Any
) -> DistillationTrainer:
    student, teacher = pair(kind)
    options = {"temperature": T, "soft_weight": SOFT, "hard_weight": HARD} | options
    return DistillationTrainer(student, arguments(folder, **(changes or {})), collate, data, teacher=teacher, **options)


def trained(trainer: Trainer) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What the first step logs, and its gradients."""
    recorded = Gradients()
    trainer.add_callback(recorded)
    trainer.train()
    return trainer.state.log_history[0], recorded.steps[0]


def truth(
    kind: str, data: list[Example], positions: str = "all", smoothing: float = 0.0
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Loss, terms and gradients of all sequences as one batch, in float64."""
    student, teacher = (model.eval().double() for model in pair(kind))
    batch = collate(data)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        t = teacher(**inputs).logits
    s = student(**inputs).logits
    labels, mask = batch["labels"], batch["attention_mask"].bool()
    if kind != "distilbert":
        s, t, labels, mask = s[:, :-1], t[:, :-1], labels[:, 1:], mask[:, 1:]
    mask = mask if positions == "all" else labels != IGNORED
    log_q, p = F.log_softmax(s[mask] / T, -1), F.softmax(t[mask] / T, -1)
    soft = F.kl_div(log_q, p, reduction="batchmean") * T**2
    known = labels != IGNORED
    hard = s.sum() * 0.0
    if known.any():
        hard = F.cross_entropy(s[known], labels[known], label_smoothing=smoothing)
    loss = SOFT * soft + HARD * hard
    loss.backward()
    values = {"loss": loss.item(), "soft_loss": soft.item(), "hard_loss": hard.item()}
    return values, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative, of all gradients as one vector."""
    assert actual.keys() == expected.keys()
    flat = (torch.cat([grads[name].double().flatten() for name in expected]) for grads in (actual, expected))
    return relative_error(*flat)


def assert_same(
    actual: tuple[dict[str, float], dict[str, Tensor]], expected: tuple[dict[str, float], dict[str, Tensor]]
) -> None:
    for name, value in expected[0].items():
        assert actual[0][name] == pytest.approx(value, rel=1e-5), name
    assert difference(actual[1], expected[1]) < 1e-5
