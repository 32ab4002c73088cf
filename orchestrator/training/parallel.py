"""One network on several workers: each with a copy of it (DDP), or each with a part of it (FSDP2).

In: a network and its optimiser. Out: what the loop calls, and states that are the same for both, so that a run may go on with
the other strategy or with another number of workers. Knows no files.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

Strategy = Literal["ddp", "fsdp"]
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def place(network: nn.Module, strategy: Strategy, device: torch.device, world: int) -> nn.Module:
    """What the loop calls instead of ``network``. With FSDP the network itself is changed: its parameters become parts, and
    the optimiser has to be made afterwards."""
    if strategy == "fsdp" and world > 1:
        mesh = init_device_mesh(device.type, (world,))
        for block in _blocks(network):
            fully_shard(block, mesh=mesh)
        return cast(nn.Module, fully_shard(network, mesh=mesh))
    network.to(device)
    if world == 1:
        return network
    cuda = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, device_ids=cuda)


def is_sharded(network: nn.Module) -> bool:
    return isinstance(network, FSDPModule)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Layers that are repeated: what is gathered, computed and let go of together."""
    rows = [module for module in network.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    return [block for row in rows for block in row if any(True for _ in block.children()) and _has_weights(block)]


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def synchronise(network: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """In the block, a part of a step: gradients cross the wire once per step, in the backward pass of its last part."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
    elif isinstance(network, nn.parallel.DistributedDataParallel) and not last:
        waiting: AbstractContextManager[None] = network.no_sync()
        return waiting
    return contextlib.nullcontext()


def clip_gradients(network: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to this global L2 norm; returns what it was."""
    norm = nn.utils.clip_grad_norm_(network.parameters(), max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def state_of(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of all tensors, whole and in the processor's memory. With FSDP every worker has to call it, and only the first
    gets them."""
    if is_sharded(network):
        return {
            "network": get_model_state_dict(network, options=_WHOLE),
            "optimizer": _numbered(get_optimizer_state_dict(network, optimizer, options=_WHOLE), optimizer, network),
        }
    return copied({"network": network.state_dict(), "optimizer": optimizer.state_dict()})


def load_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``state``: what ``state_of`` gave as ``optimizer``, whole, on every worker. Decay stays as the recipe has it."""
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    if is_sharded(network):
        named = _named(state, optimizer, network)
        set_optimizer_state_dict(network, optimizer, named, options=StateDictOptions(full_state_dict=True))
    else:
        optimizer.load_state_dict(state)
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay


def copied(state: Any) -> Any:
    """A state dict with its tensors copied to the processor's memory, so that training may change its own."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)


def _names(optimizer: torch.optim.Optimizer, network: nn.Module) -> list[str]:
    """Of the parameters, in the order in which the optimiser numbers them."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _numbered(named: dict[str, Any], optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Any]:
    """An optimiser's state by parameter names, as the optimiser itself would have it: by numbers."""
    if not named:
        return {}
    numbers = {name: number for number, name in enumerate(_names(optimizer, network))}
    state = {numbers[name]: values for name, values in named["state"].items()}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in named["param_groups"]]
    return {"state": state, "param_groups": groups}


def _named(numbered: dict[str, Any], optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Any]:
    names = _names(optimizer, network)
    state = {names[number]: values for number, values in numbered["state"].items()}
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in numbered["param_groups"]]
    return {"state": state, "param_groups": groups}
