"""Teacher, student and DistilBERT's three losses in one forward: the module that is trained for masked-LM distillation.

Heads run only on the tokens that a loss needs, through the fused linear losses where logits would be large; nothing
asks the device for a value. It knows nothing of the loop, the optimiser or of text. Next: masked_lm.py, the models'
parts; distil_fast/linear.py, the loss of the heads; trainer.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from distil_fast import distillation_loss, hidden_loss, linear_distillation_loss
from distil_fast.linear import in_autocast
from distil_fast.training.architectures import layer_count
from distil_fast.training.batch import IGNORED, MaskedBatch
from distil_fast.training.dense import by_the_fastest
from distil_fast.training.masked_lm import decoder, encode, transform
from distil_fast.training.protocols import Objective
from distil_fast.training.settings import InputError, LossConfig

# Two such tensors of logits are less than one chunk of the fused head, which then saves no memory: the whole product
# does the same work with fewer calls.
WHOLE_BYTES = 8 << 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Rows(NamedTuple):
    """The tokens that the heads run on: flat positions (None: all), their labels, and which of them the KL counts."""

    positions: Tensor | None
    labels: Tensor | None
    soft_mask: Tensor | None
    gather: bool  # whether only some of them count, so that finding those is worth waiting for a GPU

    def of(self, hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        return flat if self.positions is None else flat.index_select(0, self.positions)


class MaskedLMObjective(Objective):
    """DistilBERT's loss of a batch of masked sequences (Sanh et al. 2019, section 3; docs/math.md, section 10).

        ce   = T^2 / counts_0  sum_A KL(softmax(t / T) || softmax(s / T))    A: all real tokens, or the masked ones M
        mlm  = 1 / counts_1    sum_M -log softmax(s)[label]
        cos  = 1 / counts_2    sum_(real tokens) (1 - cos(h_student, h_teacher))
        loss = alpha_ce ce + alpha_mlm mlm + alpha_cos cos

    With several pairs of layers `cos` is the mean over them, and where widths differ each pair's h_student goes through
    a linear projection of its own, in `projections`: trained with the student, and not a part of its checkpoints.
    A term of weight 0 is not computed and reported as 0; the teacher runs only for the terms that need it.

    The teacher is no submodule: not trained, wrapped, saved, or put into training mode. It moves with the module, and
    at the latest to the device of a batch. Everything that reads a parameter does so inside `forward`, as
    DistributedDataParallel and FSDP require. With alpha_ce and alpha_mlm both 0 the student's head is not trained: its
    own parameters are set to need no gradient.

    Nothing waits for a GPU, with one exception: where the heads need the masked tokens alone and a batch does not say
    where they are (`masked` is None), the fused head asks how many.

    Args:
        student: masked language model of a family in architectures.py; its mode (dropout) is the caller's.
        teacher: likewise, of the same vocabulary; set to evaluation mode and to need no gradient.
        loss: weights and choices.
        precision: "fp32", "bf16" or "fp16": an autocast around the forward; with "fp32" a surrounding one is respected.
        teacher_precision: what the teacher's weights are cast to and computed in, without autocast; None: as they are,
            in the student's autocast.

    Raises:
        InputError: weights, temperature or layers out of range, vocabularies that differ, an unsupported family.
    """

    terms = ("ce", "mlm", "cos")

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        loss: LossConfig,
        *,
        precision: str = "fp32",
        teacher_precision: str | None = None,
    ) -> None:
        super().__init__()
        _check(student, teacher, loss, precision, teacher_precision)
        self.student = student
        self.loss = loss
        self._autocast = None if precision == "fp32" else DTYPES[precision]
        self._teacher_autocast = teacher_precision is None
        if teacher_precision is not None:
            teacher.to(DTYPES[teacher_precision])  # type: ignore[arg-type]  # decorated without types
        self._held = (teacher.train(False).requires_grad_(False),)  # in a tuple: not a submodule
        last = layer_count(student), layer_count(teacher)
        self._last = last
        self._pairs = [(s % (last[0] + 1), t % (last[1] + 1)) for s, t in loss.layers or [(-1, -1)]]
        if not loss.alpha_cos:
            self._pairs = []
        self._head = bool(loss.alpha_ce or loss.alpha_mlm)
        if not self._head:  # DistributedDataParallel waits for a gradient of everything that is trained
            encoder = set(student.base_model.parameters())
            for parameter in set(student.parameters()) - encoder:
                parameter.requires_grad_(False)
        self._compiled = False
        widths = student.config.hidden_size, teacher.config.hidden_size
        projected = self._pairs if widths[0] != widths[1] else []
        self.projections = nn.ModuleList(
            nn.Linear(*widths, device=student.device, dtype=student.dtype) for _ in projected
        )

    @property
    def teacher(self) -> PreTrainedModel:
        return self._held[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLMObjective:
        """Moves and casts the teacher too; but not to the meta device, from where nothing would bring it back."""
        teacher = self.teacher
        if not fn(torch.empty(0, dtype=teacher.dtype, device=teacher.device)).is_meta:
            teacher._apply(fn)
        super()._apply(fn, recurse)
        return self

    def tie_weights(self) -> None:
        """Tie the student's decoder again, after its parameters were replaced (accelerate calls this for FSDP)."""
        self.student.tie_weights()

    def compile_models(self, **options: Any) -> None:
        """torch.compile both encoders in place, with its options; names in checkpoints stay."""
        self._compiled = True
        for model in (self.student, self.teacher):
            model.base_model.compile(**options)

    def counts(self, batch: MaskedBatch) -> Tensor:
        labels = (batch.labels != IGNORED).sum().float()
        tokens = labels.new_full((), batch.tokens.numel())
        return torch.stack([tokens if self.loss.positions == "all" else labels, labels, tokens])

    def forward(self, batch: MaskedBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
        kind = batch.input_ids.device.type
        with nullcontext() if self._autocast is None else torch.autocast(kind, self._autocast):
            rows = self._rows(batch)
            with nullcontext() if self._compiled else by_the_fastest(batch.input_ids.device):
                states_t, features_t = self._teach(batch, rows)
                layers = {s for s, _ in self._pairs} | ({self._last[0]} if self._head else set())
                states = _states(self.student, batch, layers)
            loss = cos = torch.zeros((), device=counts.device)
            ce = mlm = cos
            if self._head:
                features = transform(self.student, rows.of(states[self._last[0]]))
                loss, ce, mlm = self._head_loss(features, features_t, rows, counts)
            if self._pairs:
                cos = self._hidden_loss(states, states_t, batch, counts[2])
                loss = loss + self.loss.alpha_cos * cos
        return loss, torch.stack([ce, mlm, cos]).detach()

    # -------------------------------------------------------------------------------------------- parts

    def _rows(self, batch: MaskedBatch) -> _Rows:
        """Which tokens the heads run on: for the KL all real ones or the masked ones, for the MLM the masked ones."""
        config = self.loss
        everywhere = bool(config.alpha_ce) and config.positions == "all"
        positions = batch.tokens if everywhere or batch.masked is None else batch.masked
        if positions is batch.tokens and _unpadded(batch):
            labels, chosen = batch.labels.flatten(), None
        else:
            labels, chosen = batch.labels.flatten().index_select(0, positions), positions
        soft_mask = labels != IGNORED if config.alpha_ce and not everywhere else None
        return _Rows(chosen, labels if config.alpha_mlm else None, soft_mask, positions is not batch.masked)

    def _teach(self, batch: MaskedBatch, rows: _Rows) -> tuple[Mapping[int, Tensor], Tensor | None]:
        """The teacher's hidden states and, for the KL, what its decoder gets at the rows."""
        config = self.loss
        layers = {t for _, t in self._pairs} | ({self._last[1]} if config.alpha_ce else set())
        if not layers:
            return {}, None
        if self.teacher.device != batch.input_ids.device:
            self.teacher.to(batch.input_ids.device)  # type: ignore[arg-type]  # decorated without types
        with torch.inference_mode(), self._teacher_context(batch.input_ids.device.type):
            states = _states(self.teacher, batch, layers)
            features = transform(self.teacher, rows.of(states[self._last[1]])) if config.alpha_ce else None
        return states, features

    def _teacher_context(self, kind: str) -> AbstractContextManager[object]:
        """No autocast, where the teacher has a precision of its own."""
        return nullcontext() if self._teacher_autocast else torch.autocast(kind, enabled=False)

    def _head_loss(
        self, student: Tensor, teacher: Tensor | None, rows: _Rows, counts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted loss of the logits, KL and MLM, from what the decoders get."""
        config = self.loss
        weight, bias = decoder(self.student)
        weight_t, bias_t = (None, None) if teacher is None else decoder(self.teacher)
        options: dict[str, Any] = {
            "temperature": config.temperature,
            "soft_weight": config.alpha_ce,
            "soft_mask": rows.soft_mask,
            "soft_count": counts[0],
        }
        if rows.labels is not None:
            options |= {"hard_weight": config.alpha_mlm, "hard_count": counts[1]}
        if self._fused(student, weight):
            options |= {"student_bias": bias, "teacher_bias": bias_t}
            options |= {"precision": config.head_precision, "gather": rows.gather}
            if not self._teacher_autocast:
                student = in_autocast(student)
            with self._teacher_context(student.device.type):
                terms = linear_distillation_loss(student, weight, teacher, weight_t, rows.labels, **options)
        else:
            with torch.inference_mode(), self._teacher_context(student.device.type):
                logits_t = None if teacher is None or weight_t is None else F.linear(teacher, weight_t, bias_t)
            terms = distillation_loss(F.linear(student, weight, bias), logits_t, rows.labels, inplace=True, **options)
        return terms.loss, terms.soft, terms.hard

    def _fused(self, features: Tensor, weight: Tensor) -> bool:
        """Whether the head's logits are made in chunks."""
        if self.loss.head != "auto":
            return self.loss.head == "fused"
        dtype = in_autocast(features[:0]).dtype
        if dtype.itemsize < 4 and self.loss.head_precision == "exact":
            return True  # whole logits of a half precision would be rounded
        return 2 * features.shape[0] * weight.shape[0] * dtype.itemsize >= WHOLE_BYTES

    def _hidden_loss(
        self, student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], batch: MaskedBatch, count: Tensor
    ) -> Tensor:
        """The mean over the pairs of layers of the cosine distance at the real tokens."""
        return hidden_loss(
            [student[s] for s, _ in self._pairs],
            [teacher[t] for _, t in self._pairs],
            None if _unpadded(batch) else batch.attention_mask.bool(),
            projections=self.projections if len(self.projections) else None,
            count=count,
        )


def _unpadded(batch: MaskedBatch) -> bool:
    return batch.tokens.numel() == batch.input_ids.numel()


def _states(model: PreTrainedModel, batch: MaskedBatch, layers: set[int]) -> dict[int, Tensor]:
    """Hidden states [B, S, H] by their layer."""
    wanted = sorted(layers)
    mask = None if _unpadded(batch) else batch.attention_mask
    return dict(zip(wanted, encode(model, batch.input_ids, mask, wanted), strict=True))


def _check(
    student: PreTrainedModel, teacher: PreTrainedModel, loss: LossConfig, precision: str, teacher_precision: str | None
) -> None:
    for name, given in (("precision", precision), ("teacher_precision", teacher_precision)):
        if given not in DTYPES and (given is not None or name == "precision"):
            raise InputError(f"{name}: expected one of {', '.join(DTYPES)}, got {given!r}.")
    alphas = {name: getattr(loss, name) for name in ("alpha_ce", "alpha_mlm", "alpha_cos")}
    for name, alpha in alphas.items():
        if not 0 <= alpha < math.inf:
            raise InputError(f"loss.{name}: expected a number >= 0, got {alpha}.")
    if not any(alphas.values()):
        raise InputError("loss: expected at least one term, got a weight of 0 for each of them.")
    if not 0 < loss.temperature < math.inf:
        raise InputError(f"loss.temperature: expected a number > 0, got {loss.temperature}.")
    for pair in loss.layers or []:
        for side, model, layer in zip(("student", "teacher"), (student, teacher), pair, strict=True):
            last = layer_count(model)
            if not -last <= layer + 1 <= last + 1:
                raise InputError(
                    f"loss.layers: expected a {side}'s layer from {-last - 1} to {last} (0: the embeddings), got "
                    f"{layer} in {list(pair)}."
                )
    if loss.layers == []:
        raise InputError(
            "loss.layers: expected pairs [student layer, teacher layer], got none. Leave it out for the last."
        )
    vocabularies = student.config.vocab_size, teacher.config.vocab_size
    if vocabularies[0] != vocabularies[1]:
        raise InputError(
            f"student: expected the teacher's vocabulary of {vocabularies[1]} tokens, got {vocabularies[0]}."
        )
