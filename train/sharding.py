"""Fully sharded training (`--fsdp`): parameters, gradients and optimizer state are divided among the processes.

PyTorch's `fully_shard` is used rather than mmengine's wrapper around the older FullyShardedDataParallel: parameters
keep their names and shapes, so that weight decay, layer decay, clipping and checks of checkpoints stay the same.
Checkpoints have whole tensors, so that runs with and without it can resume from each other's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.dist import get_world_size, is_main_process
from torch import Tensor, nn
from torch.distributed import broadcast
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

SMALLEST = (
    100_000  # least parameters of a block that is gathered separately; smaller ones are gathered with their parent
)


def shard(model: nn.Module) -> None:
    """Divide a model's parameters among all processes, in place, with the first process's values.

    Every block in a sequence or list of modules is a unit, which is gathered when it is called.
    """
    for tensor in model.state_dict().values():
        broadcast(tensor, 0)
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (get_world_size(),))
    for parent in reversed(list(model.modules())):
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            for block in parent:
                container = isinstance(block, nn.Sequential | nn.ModuleList)
                size = sum(parameter.numel() for parameter in block.parameters())
                if not container and any(True for _ in block.children()) and size >= SMALLEST:
                    fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def divided(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Whole tensors, divided like the model's tensors of the same name; others unchanged."""
    return {name: _divide(value, like.get(name)) for name, value in state.items()}


def divided_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with whole tensors, divided like its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    per_parameter = {
        index: {key: _divide(value, parameters[index]) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": per_parameter}


def _divide(value: Any, like: Any) -> Any:
    if isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


@contextlib.contextmanager
def gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """In this context, `state_dict()` of both returns whole tensors, on the CPU, in the first process.

    All processes must enter it.
    """
    states = _whole(model.state_dict()), _whole(optimizer.state_dict())
    model.state_dict = lambda *args, **kwargs: states[0]  # type: ignore[method-assign]
    optimizer.state_dict = lambda: states[1]  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.state_dict, optimizer.state_dict


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        full = value.full_tensor()  # all processes take part
        return full.cpu() if is_main_process() else None
    if isinstance(value, Mapping):
        return type(value)({key: _whole(item) for key, item in value.items()})  # type: ignore[call-arg]
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value
