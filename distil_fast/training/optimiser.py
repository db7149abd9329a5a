"""AdamW over an objective's trainable parameters, and the learning rate as a function of the step.

It knows modules by their type and parameters by their name; nothing of losses or ranks. Next: health.py, which decides
whether an update is made; trainer.py, which makes it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from distil_fast.training.settings import InputError, OptimiserConfig

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, each once, under the first of its names: tied weights have several."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def decayed(module: nn.Module) -> set[str]:
    """The names in `trainable` that weight decay applies to: all but those of normalisation layers, and biases.

    By the type of the module: a list of names misses DistilBERT's `sa_layer_norm` and `output_layer_norm`, as the
    original's did.
    """
    exempt = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in module.named_modules()
        for name, _ in part.named_parameters(recurse=False)
        if isinstance(part, NORMS) or "Norm" in type(part).__name__ or name.endswith("bias")
    }
    return trainable(module).keys() - exempt


def make_optimiser(module: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019), which can leave out an update without asking the device.

    Raises:
        InputError: nothing to train.
    """
    parameters, decay = trainable(module), decayed(module)
    if not parameters:
        raise InputError("The objective has no parameter with requires_grad: there is nothing to train.")
    groups = [
        {"params": [p for name, p in parameters.items() if (name in decay) == is_decayed], "weight_decay": amount}
        for is_decayed, amount in ((True, config.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def learning_rates(config: OptimiserConfig, steps: int) -> Callable[[int], float]:
    """The learning rate of optimiser step i, counted from 0, by the schedule of transformers that has this name.

    It depends on the step alone, so a checkpoint holds no state of it.

    Raises:
        InputError: no such schedule, or one that needs more than the step.
    """
    stand_in = torch.optim.SGD([nn.Parameter(torch.empty(0))], 1.0)
    try:
        schedule = get_scheduler(
            config.schedule, stand_in, num_warmup_steps=round(config.warmup * steps), num_training_steps=steps
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"optimiser.schedule: transformers.get_scheduler says: {error}") from error
    if not isinstance(schedule, LambdaLR):
        raise InputError(
            f"optimiser.schedule: {config.schedule!r} needs more than the number of the step. Expected one such as "
            "'linear', 'cosine' or 'constant_with_warmup'."
        )
    factor = schedule.lr_lambdas[0]
    return lambda step: config.learning_rate * float(factor(step))
