"""A network of which each worker has a part (FSDP2), and its states as those of a whole one.

In: a network and its optimiser, on every worker at once. Out: the same, cut up; whole states on the first worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(network: nn.Module, blocks: Sequence[nn.Module], device: torch.device, world: int) -> nn.Module:
    """The network itself, its parameters now parts. ``blocks``: what is gathered, computed and let go of together."""
    mesh = init_device_mesh(device.type, (world,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return cast(nn.Module, fully_shard(network, mesh=mesh))


def whole_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All tensors in the processor's memory, some of them (step counts, buffers) those that training goes on changing;
    empty on all workers but the first."""
    return {
        "network": get_model_state_dict(network, options=_WHOLE),
        "optimizer": _numbered(get_optimizer_state_dict(network, optimizer, options=_WHOLE), optimizer, network),
    }


def load_whole_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``state``: of the optimiser, as ``whole_state`` gave it, on every worker."""
    named = _named(state, optimizer, network)
    set_optimizer_state_dict(network, optimizer, named, options=StateDictOptions(full_state_dict=True))


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
