"""What a training case is made of: a teacher and a student with random weights, and a masked micro-batch.

Nothing is downloaded, and everything is the same in every run. It knows no losses and no time. Next:
train_objectives.py.
"""

from __future__ import annotations

import math

import torch
from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

from distil_fast.bench.train_cases import TrainCase
from distil_fast.training.batch import IGNORED, MaskedBatch

MASK_ID, FIRST_WORD = 4, 5
MASKED_SHARE = 0.15
SPREAD = 0.05  # of the weights: logits with a standard deviation of about 1, and models that differ


def teacher(case: TrainCase) -> BertForMaskedLM:
    """A BERT without dropout, in evaluation mode."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        num_hidden_layers=case.teacher_layers,
        num_attention_heads=case.heads,
        intermediate_size=4 * case.width,
        initializer_range=SPREAD,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    model.set_attn_implementation(case.attention)
    return model.to(case.device).eval()  # type: ignore[arg-type]  # decorated without types in transformers


def student(case: TrainCase) -> DistilBertForMaskedLM:
    """A DistilBERT of the teacher's width, without dropout: contenders are to agree."""
    torch.manual_seed(1)
    config = DistilBertConfig(
        vocab_size=case.vocabulary,
        dim=case.width,
        n_layers=case.student_layers,
        n_heads=case.heads,
        hidden_dim=4 * case.width,
        initializer_range=SPREAD,
        dropout=0.0,
        attention_dropout=0.0,
    )
    model = DistilBertForMaskedLM(config)
    model.set_attn_implementation(case.attention)
    return model.to(case.device).train()  # type: ignore[arg-type]


def masked_batch(case: TrainCase) -> MaskedBatch:
    """A micro-batch of random words, of which ceil(0.15 tokens) are to be predicted."""
    generator = torch.Generator().manual_seed(2)
    shape = case.batch, case.length
    original = torch.randint(FIRST_WORD, case.vocabulary, shape, generator=generator)
    lengths = torch.linspace(case.shortest, case.length, case.batch).round().long()
    real = torch.arange(case.length) < lengths.unsqueeze(1)
    tokens = real.flatten().nonzero().squeeze(1)
    order = torch.randperm(len(tokens), generator=generator)
    masked = tokens[order[: math.ceil(MASKED_SHARE * len(tokens))]].sort().values
    labels = torch.full((case.batch * case.length,), IGNORED)
    labels[masked] = original.flatten()[masked]
    input_ids = torch.where(labels.view(shape) != IGNORED, MASK_ID, original) * real
    parts = input_ids, real.long(), tokens, labels.view(shape), masked
    return MaskedBatch(*(tensor.to(case.device) for tensor in parts))
