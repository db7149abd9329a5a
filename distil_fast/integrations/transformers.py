"""transformers' Trainer with a teacher: soft and hard term in one pass, and denominators of the whole optimiser step.

It knows the Trainer's way from micro-batches to a gradient (accumulation, ranks, mixed precision); the mathematics is
`distillation_loss`'s, models and data are the caller's. Next: docs/integrations.md for what differs from the host.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distil_fast import distillation_loss
from distil_fast.integrations.replaced import HostChangedError, expect_parameters
from distil_fast.reference import Divergence

IGNORED = -100
POSITIONS = ("all", "labelled")
HOST = "transformers.Trainer"


class DistillationTrainer(Trainer):
    """A `transformers.Trainer` whose loss is `distil_fast.distillation_loss` of the student's and a teacher's logits.

    With the step's micro-batches on all ranks taken together as one batch (Hinton et al. 2015, section 2):

        soft = T^2 / |A| sum_A D(softmax(t / T), softmax(s / T))        hard = 1 / |M| sum_M -log softmax(s)[label]
        loss = soft_weight * soft + hard_weight * hard

    A: positions of the soft term; M: those with a label. |A| and |M| are counted over the whole optimiser step, so that
    a step does not depend on how it is cut into micro-batches and (with `average_tokens_across_devices`, the default)
    ranks. The labels are not given to the student, which would compute a loss of its own with them: one that, for
    masked language models, ignores the Trainer's count (transformers issue 47688).

    The teacher is run in evaluation mode under inference_mode; it is no part of the student, and in no checkpoint.
    Under fp16 or bf16 the logits reach the loss as the models made them, without accelerate's copy in float32, and
    `predict` and `preprocess_logits_for_metrics` see them so. Both terms are logged, as "soft_loss" and "hard_loss",
    read from the device when the Trainer logs. An evaluation's loss is the host's mean over its batches, each of which
    is exact.

    Args:
        positional, named: the Trainer's arguments, but for `compute_loss_func`. Labels are "labels" of a batch, -100
            where there is none, or "shift_labels", already shifted; `args.label_smoothing_factor` is the hard term's.
        teacher: a model with the student's tokenizer, whose output has `logits`; moved to the student's device unless
            it is spread over several. It is given those inputs of the student that its forward names.
        temperature: T > 0.
        soft_weight, hard_weight: of the terms; one that is 0 is not computed, and needs no teacher run or labels.
        divergence, t_squared, vocab_size: as in `distillation_loss`.
        soft_positions: "all" that the attention mask has, padding left out; or those that are "labelled".
        shift_labels: position i is to predict the token at i + 1: labels and mask are shifted, never the logits. None:
            True of causal language models, False of others.
        inplace: write the gradient over the student's logits in training, as in `distillation_loss`.

    Raises:
        ValueError, TypeError: an argument that is not as above; `distillation_loss`'s at a step.
        NotImplementedError: context or sequence parallelism, where a rank has a part of each sequence.
        HostChangedError: this Trainer is not the one that was tested.
    """

    loss_is_scaled_for_ga = True  # by the counts

    def __init__(
        self,
        *positional: Any,
        teacher: nn.Module,
        temperature: float | Tensor = 2.0,
        soft_weight: float = 1.0,
        hard_weight: float = 1.0,
        divergence: str | Divergence = "forward_kl",
        t_squared: bool = True,
        soft_positions: str = "all",
        shift_labels: bool | None = None,
        vocab_size: int | None = None,
        inplace: bool = False,
        **named: Any,
    ) -> None:
        _check_host()
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher: expected an nn.Module, got {type(teacher).__name__}.")
        if soft_positions not in POSITIONS:
            raise ValueError(f"soft_positions: expected one of {', '.join(POSITIONS)}, got {soft_positions!r}.")
        super().__init__(*positional, **named)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func: expected None, as the loss is this trainer's. Use Trainer with it.")
        if self.get_cp_size() * self.get_sp_size() > 1:
            raise NotImplementedError("Expected whole sequences on each rank. Use no context or sequence parallelism.")
        if getattr(teacher, "hf_device_map", None) is None:
            teacher = teacher.to(self.args.device)
        self.teacher = teacher.eval()
        taken = inspect.signature(teacher.forward).parameters
        self._teacher_takes = frozenset(taken) if "input_ids" in taken else None
        self.temperature, self.divergence, self.t_squared = temperature, divergence, t_squared
        self.soft_weight, self.hard_weight = soft_weight, hard_weight
        self.soft_positions, self.vocab_size, self.inplace = soft_positions, vocab_size, inplace
        self.shift_labels = self._is_causal() if shift_labels is None else shift_labels
        self._sums = torch.zeros(2, device=self.args.device)  # of soft and hard, since they were last logged
        self._steps = 0  # likewise

    def _is_causal(self) -> bool:
        """The host's own attribute does not know GPT-2 and others whose class is not named ...ForCausalLM."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if hasattr(model, "get_base_model"):  # of peft
            model = model.get_base_model()
        return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or self._loss_shifts_labels

    # -------------------------------------------------------------------------------------------- denominators

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The step's micro-batches with their denominators; called once a step."""
        self._steps += 1
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """What a rank divides by, float [2] for soft and hard term; the host hands it to `compute_loss`."""
        if not batch_samples:
            return None
        counts = torch.stack([self._count(batch) for batch in batch_samples]).sum(0).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            # DistributedDataParallel averages gradients: what is to be divided by N once is divided by N / world here.
            return self.accelerator.reduce(counts, "sum") / self.accelerator.num_processes
        return counts.float()

    def _count(self, batch: Mapping[str, Any]) -> Tensor:
        labels, mask = self._positions(batch)
        hard = mask.new_zeros((), dtype=torch.int64) if labels is None else (labels != IGNORED).sum().to(mask.device)
        return torch.stack([mask.sum(), hard])

    def _positions(self, batch: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
        """Labels, and the mask of the soft term, both beside the logits that they are about."""
        labels: Tensor | None = batch.get("shift_labels")
        if labels is None:
            labels = batch.get("labels")
            if labels is not None and self.shift_labels:
                labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
        if labels is None and (self.hard_weight or self.soft_positions == "labelled"):
            raise ValueError(
                f"labels: expected them in each batch, got {', '.join(batch)}. Without labels train with hard_weight=0 "
                "and soft_positions='all'."
            )
        if self.soft_positions == "labelled":
            assert labels is not None
            return labels, labels != IGNORED
        mask: Tensor | None = batch.get("attention_mask")
        mask = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
        if self.shift_labels:  # a real token that a real token follows
            mask = mask & F.pad(mask[..., 1:], (0, 1), value=False)
        return labels, mask

    # -------------------------------------------------------------------------------------------- the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch, a share of its step's; a batch by itself where no counts are given.

        Raises:
            HostChangedError: the Trainer brought a count that is not `_get_num_items_in_batch`'s.
        """
        soft_count, hard_count = self._counts(inputs, num_items_in_batch)
        labels, mask = self._positions(inputs)
        given = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        teacher_logits = self._teacher_logits(given) if self.soft_weight else None
        self._without_float32_copies(model)
        outputs = model(**given)
        soft = teacher_logits is not None
        hard = bool(self.hard_weight)
        terms = distillation_loss(
            _logits(outputs, "student"),
            teacher_logits,
            labels if hard else None,
            temperature=self.temperature,
            soft_weight=self.soft_weight,
            hard_weight=self.hard_weight if hard else None,
            soft_mask=mask if soft else None,
            soft_count=soft_count if soft else None,
            hard_count=hard_count if hard else None,
            divergence=self.divergence,
            t_squared=self.t_squared,
            label_smoothing=self.args.label_smoothing_factor if hard else 0.0,
            vocab_size=self.vocab_size,
            inplace=self.inplace and not return_outputs,
        )
        if model.training:
            self._sums += torch.stack([terms.soft, terms.hard])
        return (terms.loss, outputs) if return_outputs else terms.loss

    def _counts(self, inputs: Mapping[str, Any], counts: Tensor | int | None) -> Tensor:
        if counts is None:
            return self._count(inputs).float()
        if not isinstance(counts, Tensor) or counts.shape != (2,):
            raise HostChangedError(
                f"{HOST}: expected it to pass on the counts of both terms, got {counts}, which is a count of its own. "
                "docs/integrations.md names the versions that were tested."
            )
        return counts

    def _teacher_logits(self, inputs: dict[str, Any]) -> Tensor:
        taken = self._teacher_takes
        given = inputs if taken is None else {name: value for name, value in inputs.items() if name in taken}
        with torch.inference_mode():
            return _logits(self.teacher(**given), "teacher").to(self.args.device)

    def _without_float32_copies(self, model: nn.Module) -> None:
        """Undo the wrapper that accelerate puts around a forward in mixed precision.

        It is autocast, which is around the whole loss here, and a copy of every output in float32.
        """
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        plain = vars(inner).get("_original_forward")
        if plain is not None:
            inner.forward = plain

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[Any]:
        """Autocast of student, teacher and loss together."""
        return self.accelerator.autocast()

    # -------------------------------------------------------------------------------------------- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's, with the terms beside the loss: means over the steps since the last time, over all ranks."""
        if "loss" in logs and self._steps:
            means = self.accelerator.reduce(self._sums, "mean") / self._steps
            logs["soft_loss"], logs["hard_loss"] = means.tolist()
            self._sums.zero_()
            self._steps = 0
        super().log(logs, start_time)


def _logits(outputs: Any, whose: str) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{whose}: expected an output with logits, got {type(outputs).__name__}. Use a model with a head, such as "
            "AutoModelForMaskedLM, and return_dict=True."
        )
    return logits


def _check_host() -> None:
    if not hasattr(Trainer, "loss_is_scaled_for_ga"):
        raise HostChangedError(
            f"{HOST}: expected the attribute loss_is_scaled_for_ga, which this version does not have. "
            "docs/integrations.md names the versions that were tested."
        )
    expect_parameters(Trainer.get_batch_samples, ("epoch_iterator", "num_batches", "device"), HOST)
    expect_parameters(Trainer._get_num_items_in_batch, ("batch_samples", "device"), HOST)
    expect_parameters(Trainer.compute_loss, ("model", "inputs", "return_outputs", "num_items_in_batch"), HOST)
