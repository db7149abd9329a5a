"""How large and how fast BERT-base and DistilBERT are: parameters from their configurations, latency of one sequence.

Weights are random, which neither depends on. It knows nothing of training. Next: train_report.py for its table.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from distil_fast.bench import measure, suite
from distil_fast.bench.measure import Canary, Effort, Timing
from distil_fast.bench.results import Results, Row
from distil_fast.bench.train_cases import BERT_BASE, DISTILBERT, PARAMETERS, EncoderCase

FIRST_WORD = 1000


def models(case: EncoderCase) -> dict[str, nn.Module]:
    """Both encoders; the teacher has its pooler, as the released one."""
    heads = max(1, case.width // 64)
    teacher = BertConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        intermediate_size=4 * case.width,
    )
    student = DistilBertConfig(
        vocab_size=case.vocabulary,
        dim=case.width,
        n_layers=case.layers // 2,
        n_heads=heads,
        hidden_dim=4 * case.width,
    )
    return {BERT_BASE: BertModel(teacher).eval(), DISTILBERT: DistilBertModel(student).eval()}


@dataclass(frozen=True)
class Encoder:
    """An encoder as the clock takes it: one sequence."""

    model: nn.Module
    input_ids: torch.Tensor
    calls: int = 1
    device: str = "cpu"

    def prepare(self) -> None:
        """Nothing is to be prepared."""

    @torch.inference_mode()
    def call(self) -> object:
        return self.model(input_ids=self.input_ids)


def run(chosen: Sequence[EncoderCase], effort: Effort, *, processes: int, command: str, note: suite.Note) -> Results:
    """Measures the cases; `note` is told what is going on."""
    return suite.conducted(timed, chosen, effort, lambda found: found, processes=processes, command=command, note=note)


def timed(chosen: Sequence[EncoderCase], effort: Effort, note: suite.Note = lambda text: None) -> Results:
    """Everything that the clock tells, in this process."""
    evict = measure.CacheEvictor()
    copy = measure.Copy(evict)
    rows: list[Row] = []
    copies: list[float] = []
    for case in chosen:
        note(case.name)
        made = models(case)
        input_ids = torch.arange(case.length).unsqueeze(0) + min(FIRST_WORD, case.vocabulary - case.length)
        contenders = [Encoder(model, input_ids) for model in made.values()]
        copied, *samples = measure.in_turn([copy, *contenders], effort, evict)
        copies += copied
        rate = copy.gb_per_s(statistics.median(copied))
        for (name, model), seconds in zip(made.items(), samples, strict=True):
            facts = {PARAMETERS: float(sum(p.numel() for p in model.parameters()))}
            rows.append(Row(case.name, name, 0, rate, facts=facts, timing=Timing.of(seconds)))
    return Results(rows, copy.method, canary=Canary.of(copies))
