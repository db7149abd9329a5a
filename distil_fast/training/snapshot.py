"""What a checkpoint holds of a run, and how it is put back: weights, moments, generators, data position, history.

Tensors are whole and by the parameter's name, however ranks share them out; data position and generators are each
rank's own. It knows no files. Next: checkpoint.py for these, trainer.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distil_fast.training import randomness
from distil_fast.training.checkpoint import Contents
from distil_fast.training.distributed import from_all, part_like, whole
from distil_fast.training.health import Health
from distil_fast.training.metrics import History
from distil_fast.training.optimiser import trainable
from distil_fast.training.protocols import Feed, Prepare
from distil_fast.training.randomness import Randomness
from distil_fast.training.settings import InputError, TrainConfig

# What changes nothing in what the model becomes, so that a run may go on with another value.
FREE = (
    "output",
    "data.workers",
    "data.cache",
    "checkpoint",
    "compile",
    "log_interval",
    "evaluation_interval",
    "evaluation_batches",
    "non_finite",
    "trackers",
)


class Parts(NamedTuple):
    """Everything of a run that changes while it trains."""

    objective: nn.Module
    optimiser: torch.optim.Optimizer
    health: Health
    feed: Feed
    prepare: Prepare
    history: History


def collect(parts: Parts, config: TrainConfig, accelerator: Accelerator) -> Contents:
    """The contents of a checkpoint; all ranks must call it, and all get the same."""
    own = randomness.capture(accelerator.device)
    tensors = {f"torch.{name}": tensor for name, tensor in own.tensors.items()}
    tensors |= {f"prepare.{name}": tensor.cpu() for name, tensor in parts.prepare.state_dict().items()}
    ranks = from_all((tensors, own.numbers, parts.feed.state_dict()), accelerator)
    return Contents(
        tensors={
            "model": {name: whole(tensor).cpu() for name, tensor in weights(parts.objective).items()},
            "optimiser": {
                f"{name}.{key}": whole(tensor).cpu()
                for name, parameter in trainable(parts.objective).items()
                for key, tensor in parts.optimiser.state[parameter].items()
            },
            "rng": {f"{i}.{name}": tensor for i, (states, _, _) in enumerate(ranks) for name, tensor in states.items()},
            "history": {"rows": parts.history.rows},
        },
        state={
            "step": len(parts.history.rows),
            "ranks": len(ranks),
            "config": choices(config),
            "feed": [feed for _, _, feed in ranks],
            "numbers": [numbers for _, numbers, _ in ranks],
            "loss_scale": parts.health.state_dict(),
            "columns": list(parts.history.columns),
            "evaluations": parts.history.evaluations,
        },
    )


def put_back(contents: Contents, parts: Parts, config: TrainConfig, accelerator: Accelerator) -> None:
    """Make a run what it was; all ranks must call it.

    Raises:
        InputError: the checkpoint is of another configuration, another number of ranks or another model, which is found
            before anything is changed.
    """
    state, tensors = contents.state, contents.tensors
    _check_same(state, config, accelerator.num_processes, parts.history.columns)
    model = weights(parts.objective)
    _check_shapes(tensors["model"], model)
    rank = accelerator.process_index
    with torch.no_grad():
        for name, tensor in model.items():
            tensor.copy_(part_like(tensors["model"][name], tensor))
    _restore_moments(parts, tensors["optimiser"])
    parts.health.load_state_dict(state["loss_scale"])
    parts.feed.load_state_dict(state["feed"][rank])
    own = {name.removeprefix(f"{rank}."): t for name, t in tensors["rng"].items() if name.startswith(f"{rank}.")}
    parts.prepare.load_state_dict(_below("prepare.", own))
    randomness.restore(Randomness(_below("torch.", own), state["numbers"][rank]), accelerator.device)
    parts.history.rows = tensors["history"]["rows"]
    parts.history.evaluations = [(step, dict(values)) for step, values in state["evaluations"]]


def weights(objective: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, each once: under the first of its names, where weights are tied."""
    named = dict(objective.named_parameters())
    ties = {name for name, _ in objective.named_parameters(remove_duplicate=False)}
    persistent = {name: tensor for name, tensor in objective.state_dict(keep_vars=True).items() if name not in ties}
    return {name: tensor.detach() for name, tensor in (named | persistent).items()}


def choices(config: TrainConfig) -> dict[str, Any]:
    """The configuration's fields by their dotted names, as JSON has them, without those that are `FREE` to change."""
    flat: dict[str, Any] = {}

    def enter(value: Any, prefix: str) -> None:
        for key, inner in value.items():
            name = f"{prefix}{key}"
            if name in FREE:
                continue
            if isinstance(inner, dict):
                enter(inner, f"{name}.")
            else:
                flat[name] = inner

    enter(json.loads(json.dumps(dataclasses.asdict(config), default=str)), "")
    return flat


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_same(state: dict[str, Any], config: TrainConfig, ranks: int, columns: tuple[str, ...]) -> None:
    then, now = state["config"], choices(config)
    pairs = {name: (then.get(name), now.get(name)) for name in sorted(then.keys() | now.keys())}
    pairs["number of ranks"] = (state["ranks"], ranks)
    pairs["columns of the history"] = (state["columns"], list(columns))
    if changed := [f"{name} was {old!r} and is {new!r} now" for name, (old, new) in pairs.items() if old != new]:
        raise InputError(
            f"The checkpoint is of another run: {'; '.join(changed)}. Go on with what it was, or choose another output "
            "folder to start anew."
        )


def _check_shapes(saved: Mapping[str, Tensor], model: Mapping[str, Tensor]) -> None:
    then, now = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (saved, model))
    different = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    if different:
        name = different[0]
        raise InputError(
            f"The checkpoint is of another model: {len(different)} of {len(now)} tensors differ; the first is {name}, "
            f"of shape {then.get(name, 'none')} in the checkpoint and {now.get(name, 'none')} here. Choose another "
            "output folder to start anew."
        )


def _restore_moments(parts: Parts, saved: Mapping[str, Tensor]) -> None:
    for name, parameter in trainable(parts.objective).items():
        mine = {key: tensor for key, tensor in _below(f"{name}.", saved).items() if "." not in key}
        if mine:
            parts.optimiser.state[parameter] = {
                key: part_like(tensor, parameter) if tensor.dim() else tensor.to(parameter.device)
                for key, tensor in mine.items()
            }
