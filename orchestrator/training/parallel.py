"""One network on several workers: each with a copy of it (DDP), or each with a part of it (FSDP2).

In: a network and its optimiser. Out: what the loop calls, and states that are the same for both, so that a run may go on with
the other strategy or with another number of workers. Knows no files.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

Strategy = Literal["ddp", "fsdp"]


def place(network: nn.Module, strategy: Strategy, device: torch.device, world: int) -> nn.Module:
    """What the loop calls instead of ``network``. With FSDP the network itself is changed: its parameters become parts, and
    the optimiser has to be made afterwards."""
    if strategy == "fsdp" and world > 1:
        return _sharding().shard(network, _blocks(network), device, world)
    network.to(device)
    if world == 1:
        return network
    cuda = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(network, device_ids=cuda)


def is_sharded(network: nn.Module) -> bool:
    return any(base.__name__ == "FSDPModule" for base in type(network).__mro__)


def _sharding() -> ModuleType:
    """FSDP's modules take a second to import, of each process: only who shards has to wait for them."""
    from orchestrator.training import sharding

    return sharding


def _blocks(network: nn.Module) -> list[nn.Module]:
    """Layers that are repeated: what is gathered, computed and let go of together."""
    rows = [module for module in network.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    return [block for row in rows for block in row if any(True for _ in block.children()) and _has_weights(block)]


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def synchronise(network: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """In the block, a part of a step: gradients cross the wire once per step, in the backward pass of its last part."""
    if is_sharded(network):
        cast(Any, network).set_requires_gradient_sync(last)
    elif isinstance(network, nn.parallel.DistributedDataParallel) and not last:
        waiting: AbstractContextManager[None] = network.no_sync()
        return waiting
    return contextlib.nullcontext()


def clip_gradients(network: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to this global L2 norm; returns what it was."""
    norm = nn.utils.clip_grad_norm_(network.parameters(), max_norm)
    return float(cast(Any, norm).full_tensor() if is_sharded(network) else norm)


def state_of(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of all tensors, whole and in the processor's memory. With FSDP every worker has to call it, and only the first
    gets them."""
    if is_sharded(network):
        return copied(_sharding().whole_state(network, optimizer))
    return copied({"network": network.state_dict(), "optimizer": optimizer.state_dict()})


def load_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """``state``: what ``state_of`` gave as ``optimizer``, whole, on every worker. Decay stays as the recipe has it."""
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    if is_sharded(network):
        _sharding().load_whole_optimizer(network, optimizer, state)
    else:
        optimizer.load_state_dict(state)
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with its tensors copied to the processor's memory, so that training may change its own."""
    copy: dict[str, Any] = pytree.tree_map_only(
        torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state
    )
    return copy
