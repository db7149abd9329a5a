"""Ranks: one Accelerator, how it wraps an objective (DDP or FSDP2), and tensors whole or in parts.

accelerate starts the process group and knows the device and the trackers; DDP is its own. FSDP2 is torch's
`fully_shard`, called here: accelerate ignores its FSDP plugin on a CPU, and exchanges the parameters of an optimiser
that is there already. It knows nothing of losses. Next: trainer.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distil_fast.training.settings import InputError, TrainConfig


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The Accelerator of this process, under torchrun, `accelerate launch` or alone; made before the feed, which needs
    its device.

    Raises:
        InputError: a tracker that accelerate does not know or that is not installed; a strategy other than DDP, FSDP2.
    """
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision="no",  # precision.py: accelerate has no fp16 on a CPU, and no scaler that can be masked
            log_with=list(config.trackers) or None,
            project_dir=str(config.output),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # no copy of all gradients
        )
    except (ValueError, ImportError) as error:
        raise InputError(f"accelerate says: {error}") from error
    got = [str(getattr(tracker, "value", tracker)) for tracker in accelerator.log_with]
    if missing := sorted(set(config.trackers) - set(got)):
        raise InputError(f"trackers: {', '.join(missing)} is not installed; found {', '.join(got) or 'none'}.")
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InputError(f"Expected DDP or FSDP2, got {accelerator.distributed_type.value} from accelerate's settings.")
    return accelerator


def wrap(objective: nn.Module, accelerator: Accelerator, parallel: str) -> nn.Module:
    """The objective on its device, and where there are several ranks in what averages its gradients over them.

    Under FSDP2 it is one unit: tied weights would stand in two otherwise, and the heads' weights are used by losses
    outside of their modules' forward. A student is small; what is shared out are its moments and gradients.

    Raises:
        InputError: an accelerator with a precision of its own, on top of the configuration's.
    """
    if accelerator.mixed_precision != "no":
        raise InputError(
            f"accelerator: expected mixed_precision 'no', as make_accelerator has it, got "
            f"{accelerator.mixed_precision!r}. The precision is the configuration's."
        )
    objective.to(accelerator.device)
    if accelerator.num_processes == 1:
        return objective
    if parallel == "fsdp2" or accelerator.distributed_type == DistributedType.FSDP:
        for tensor in objective.state_dict().values():
            dist.broadcast(tensor, 0)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        fully_shard(objective, mesh=mesh, reshard_after_forward=False)
        objective.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo has no average
        return objective
    wrapped: nn.Module = accelerator.prepare_model(objective)
    return wrapped


@contextmanager
def accumulating(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients of forward and backward in this context stay on the rank, unless they are the step's last."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
        yield
    elif last or not isinstance(model, nn.parallel.DistributedDataParallel):
        yield
    else:
        with model.no_sync():
            yield


def add_over_ranks(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """In place, and the same bits on every rank."""
    if accelerator.num_processes > 1:
        dist.all_reduce(tensor)
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this rank may hold a part; under FSDP2 all ranks must call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """This rank's part of a whole tensor, on the device and as `reference` is shared out."""
    tensor = tensor.to(reference.device)
    if not isinstance(reference, DTensor):
        return tensor
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def make_whole(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Put whole parameters in the place of those that FSDP2 has shared out, so that the submodules can be used and
    saved by themselves. All ranks must call it.

    Returns:
        What was replaced, for `share_out`.
    """
    if not isinstance(model, FSDPModule):
        return []
    model.reshard()
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    wholes = {id(p): nn.Parameter(whole(p), p.requires_grad) for p in dict.fromkeys(p for _, _, p in places)}
    for module, name, parameter in places:
        module.register_parameter(name, wholes[id(parameter)])
    return places


def share_out(model: nn.Module, places: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
    """Undo `make_whole`."""
    if isinstance(model, FSDPModule):
        model.reshard()
    for module, name, parameter in places:
        module.register_parameter(name, parameter)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """In this context every rank holds all weights."""
    places = make_whole(model)
    try:
        yield
    finally:
        share_out(model, places)


def from_main(value: Any, accelerator: Accelerator) -> Any:
    """The first rank's value, of plain data, on all ranks."""
    if accelerator.num_processes == 1:
        return value
    return broadcast_object_list([value])[0]


def from_all(value: Any, accelerator: Accelerator) -> list[Any]:
    """Every rank's value, of plain data, in the order of the ranks."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]
