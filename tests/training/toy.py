"""A masked language model of a few hundred weights with its objective, a feed and a masking, all resumable.

Small enough that a step takes a millisecond, and with everything that matters to the loop: ragged sequences, two terms
of different denominators, tied weights, dropout, random numbers of its own. Next: test_trainer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from distil_fast.training.batch import IGNORED, Batch, MaskedBatch
from distil_fast.training.protocols import Objective
from distil_fast.training.settings import CheckpointConfig, OptimiserConfig, TrainConfig

VOCABULARY, WIDTH = 31, 8


def toy_config(output: Path, **changes: Any) -> TrainConfig:
    optimiser = OptimiserConfig(learning_rate=0.01, weight_decay=0.1, **changes.pop("optimiser", {}))
    checkpoint = CheckpointConfig(**({"interval": 0} | changes.pop("checkpoint", {})))
    settings: dict[str, Any] = {
        "steps": 12,
        "micro_batch_size": 4,
        "accumulation_steps": 2,
        "precision": "fp32",
        "log_interval": 4,
        "seed": 3,
    }
    return TrainConfig(output=output, optimiser=optimiser, checkpoint=checkpoint, **(settings | changes))


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.decoder = nn.Linear(WIDTH, VOCABULARY)
        self.decoder.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        seen = self.embedding(input_ids)
        return self.decoder(self.dropout(self.norm(seen + seen.mean(1, keepdim=True))))


class ToyObjective(Objective):
    """Cross-entropy with a fixed teacher's distribution at the real tokens, and with the hidden ids at the masked."""

    terms: ClassVar[tuple[str, ...]] = ("ce", "mlm")

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.student: Any = Student()
            self.teacher = [torch.randn(VOCABULARY, VOCABULARY)]  # in a list: no part of the state

    def counts(self, batch: MaskedBatch) -> Tensor:
        real = torch.full((), float(batch.tokens.numel()), device=batch.input_ids.device)
        return torch.stack([real, (batch.labels != IGNORED).sum().float()])

    def forward(self, batch: MaskedBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.student(batch.input_ids).float().flatten(0, 1)
        target = self.teacher[0].to(logits)[batch.input_ids.flatten()].softmax(-1)
        soft = F.cross_entropy(logits, target, reduction="none") * batch.attention_mask.flatten()
        hard = F.cross_entropy(logits, batch.labels.flatten(), reduction="sum", ignore_index=IGNORED)
        terms = torch.stack([soft.sum(), hard]) / counts.clamp(min=1e-9)
        return 5 * terms[0] + 2 * terms[1], terms.detach()


class ToyFeed:
    """Batch number i is made from the seed i; ranks take turns."""

    def __init__(self, rows: int = 4, rank: int = 0, ranks: int = 1) -> None:
        self.rows, self.rank, self.ranks = rows, rank, ranks
        self.position = 0

    def __iter__(self) -> ToyFeed:
        return self

    def __next__(self) -> Batch:
        self.position += 1
        number = (self.position - 1) * self.ranks + self.rank
        return a_batch(number, self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": 0, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def a_batch(seed: int, rows: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 17, (rows, 1), generator=generator)
    attention_mask = (torch.arange(int(lengths.max())) < lengths).long()
    input_ids = torch.randint(1, VOCABULARY, attention_mask.shape, generator=generator) * attention_mask
    return Batch(input_ids, attention_mask, attention_mask.flatten().nonzero().flatten())


class ToyMasking:
    """Hides every fourth token or so behind the id 0."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: Batch) -> MaskedBatch:
        chosen = torch.rand(batch.input_ids.shape, generator=self.generator) < 0.25
        chosen &= batch.attention_mask.bool()
        labels = torch.where(chosen, batch.input_ids, IGNORED)
        return MaskedBatch(batch.input_ids.masked_fill(chosen, 0), batch.attention_mask, batch.tokens, labels, None)

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])


class AsItIs:
    """No preparation: the feed's batches are masked already."""

    def __call__(self, batch: Any) -> Any:
        return batch

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


class Given:
    """A feed of batches made before, again and again."""

    def __init__(self, batches: Sequence[MaskedBatch]) -> None:
        self.batches, self.position = batches, 0

    def __iter__(self) -> Given:
        return self

    def __next__(self) -> Any:
        self.position += 1
        return self.batches[(self.position - 1) % len(self.batches)]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def pieces(batch: MaskedBatch, rows: int) -> list[MaskedBatch]:
    """A masked batch in parts, each cut to its own longest row, so that they have other padding than the whole."""
    parts = []
    for i in range(0, len(batch.input_ids), rows):
        width = int(batch.attention_mask[i : i + rows].sum(1).max())
        ids, mask, labels = (t[i : i + rows, :width] for t in (batch.input_ids, batch.attention_mask, batch.labels))
        parts.append(MaskedBatch(ids, mask, mask.flatten().nonzero().flatten(), labels, None))
    return parts
