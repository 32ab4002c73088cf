"""Fewer filters of convolutional networks: channels that are added or concatenated somewhere go together.

Which ones those are, and how modules get narrower, is torch-pruning's knowledge (Fang et al. 2023, "DepGraph"); the importance,
the ranking and the proof are ours. Only here is that package, an optional one, known.
"""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from orchestrator.compression.ranking import keep_best, round_to
from orchestrator.compression.reshaping import Reshaping, Sample, agree, answers, first_line, without_kept
from orchestrator.compression.sensitivity import Scores, Sensitivity
from orchestrator.errors import CompressionFailed, RecipeError
from orchestrator.models.backbones import Network, TorchvisionNetwork

_MULTIPLE = 8
_LEAST = 1 / 16
_COUNTS = 0.5
"""Power of a channel's work by which its importance is divided. Without it late filters go first, many and cheap."""
_CONVOLUTION, _BATCH_NORM = nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm
_ACROSS = (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention)
"""What these make of a channel depends on the others: without one, they make something else of all."""


@dataclass(frozen=True)
class _Coupled:
    """Channels that go together: the n-th of one module with the n-th of the others."""

    root: nn.Module
    prune: Any
    """torch-pruning's function for ``root``."""
    channels: int
    blocks: int
    """Of a grouped convolution, which all lose the same channels; else 1."""
    scores: list[float]
    """Of the channels of one block."""
    work: float
    """Of one of these, in the convolutions that make or read it: products per image."""


def apply(state: Reshaping, share: float, sample: Sample) -> Reshaping:
    """Leave this share of all filters that can go, by the root of their work; in each place a multiple of 8.

    Raises:
        RecipeError: torch-pruning is not installed.
        CompressionFailed: filters cannot be taken out of this architecture.
    """
    if not isinstance(state.network, TorchvisionNetwork) or not _scored(state.network):
        raise CompressionFailed("it has no convolutions", "leave filters out")
    pruning = _torch_pruning()
    smaller = copy.deepcopy(state.network).eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parameters beside modules, which it handles
            graph = _graph(pruning, smaller, sample)
            groups = _groups(graph, smaller, state.sensitivity.filters, _positions(smaller, sample))
            gone = _prune(graph, smaller, groups, share)
        result = answers(smaller, sample)
    except CompressionFailed:
        raise
    except Exception as error:  # noqa: BLE001  each architecture fails in its own way
        reason = f"torch-pruning cannot take filters out of it ({first_line(error)})"
        raise CompressionFailed(reason, "leave filters out") from None
    if not gone:
        return state
    twin = copy.deepcopy(state.network)
    _null(twin, gone)
    if not agree(result, answers(twin, sample), answers(state.network, sample)):
        raise CompressionFailed(
            "without some of its filters it does not answer as with zeros in their place", "leave filters out"
        )
    sensitivity = state.sensitivity
    for name, positions in gone.items():
        size = len(sensitivity.filters.get(name, ()))
        sensitivity = sensitivity.keeping("filters", name, without_kept(size, positions))
    return replace(state, network=smaller.train(state.network.training), sensitivity=sensitivity)


def made_up(network: Network, sample: Sample) -> Sensitivity:
    """In which channels differ, by chance."""
    numbers = random.Random(0)
    return Sensitivity(
        filters={name: [numbers.random() for _ in range(_channels(m))] for name, m in _scored(network).items()}
    )


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise RecipeError(
            "compression.filters needs the package torch-pruning, which is not installed",
            "pip install 'ray-orchestrator[compress]'",
        ) from None
    return torch_pruning


def _scored(network: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in network.named_modules() if isinstance(m, (_CONVOLUTION, _BATCH_NORM))}


def _channels(module: nn.Module) -> int:
    size: Any = getattr(module, "out_channels", None) or getattr(module, "num_features", None)
    return int(size)


def _graph(pruning: Any, network: nn.Module, sample: Sample) -> Any:
    device = next(network.parameters()).device
    (pixels,) = sample.values()
    for parameter in network.parameters():
        parameter.requires_grad_(True)  # it follows gradients from the answers to the modules
    return pruning.DependencyGraph().build_dependency(network.get_submodule("model"), pixels[:1].to(device))


def _positions(network: Network, sample: Sample) -> dict[nn.Module, int]:
    """Convolution -> at how many places of an image it is computed."""
    found: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: Any, result: torch.Tensor) -> None:
        found[module] = found.get(module, 0) + result[0, 0].numel()

    convolutions = [module for module in network.modules() if isinstance(module, _CONVOLUTION)]
    handles = [module.register_forward_hook(note) for module in convolutions]
    answers(network, {name: tensor[:1] for name, tensor in sample.items()})
    for handle in handles:
        handle.remove()
    return found


def _groups(graph: Any, network: nn.Module, scores: Scores, positions: Mapping[nn.Module, int]) -> dict[str, _Coupled]:
    """By the name of a convolution in it. Channels that a norm across channels reads are left out."""
    names = {id(module): name for name, module in network.named_modules()}
    head = [module for module in network.modules() if isinstance(module, nn.Linear)][-1:]
    found = {}
    for group in graph.get_all_groups(ignored_layers=head, root_module_types=[nn.Conv2d]):
        root, prune = group[0].dep.target.module, group[0].dep.handler
        modules = [item.dep.target.module for item in group]
        if not any(isinstance(module, _ACROSS) for module in modules):
            channels = _channels(root)
            blocks = max((m.groups for m in modules if _is_grouped(m)), default=1)
            each = _score(group, graph, names, scores, channels).reshape(blocks, -1).sum(0)
            work = blocks * _work(group, graph, positions) / channels
            found[names[id(root)]] = _Coupled(root, prune, channels, blocks, each.tolist(), work)
    if not found:
        raise CompressionFailed(
            "norms across channels read all of its filters, so that none can go", "leave filters out"
        )
    return found


def _work(group: Any, graph: Any, positions: Mapping[nn.Module, int]) -> float:
    """Products per image, in all convolutions that make or read the group's channels."""
    total = 0.0
    for item in group:
        module = item.dep.target.module
        if module in positions:
            makes = graph.is_out_channel_pruning_fn(item.dep.handler)
            weights = module.weight.numel() / (module.out_channels if makes else module.in_channels)
            total += len(item.idxs) * weights * positions[module]
    return max(total, 1.0)


def _is_grouped(module: Any) -> bool:
    return isinstance(module, _CONVOLUTION) and 1 < module.groups < module.out_channels


def _score(group: Any, graph: Any, names: Mapping[int, str], scores: Scores, channels: int) -> torch.Tensor:
    """[channels]: what the batch norms among them say; where there is none, the convolutions."""
    totals = {kind: torch.zeros(channels) for kind in (_CONVOLUTION, _BATCH_NORM)}
    normed = False
    for item in group:
        module, name = item.dep.target.module, names.get(id(item.dep.target.module), "")
        kind = _BATCH_NORM if isinstance(module, _BATCH_NORM) else _CONVOLUTION
        if name in scores and graph.is_out_channel_pruning_fn(item.dep.handler):
            normed = normed or kind is _BATCH_NORM
            totals[kind].index_add_(0, torch.tensor(item.root_idxs), torch.tensor(scores[name])[list(item.idxs)])
    return totals[_BATCH_NORM if normed else _CONVOLUTION]


def _prune(graph: Any, network: nn.Module, groups: Mapping[str, _Coupled], share: float) -> dict[str, list[int]]:
    """In place. Convolution, linear layer or batch norm -> positions, in its channels at the start, that went."""
    work = {name: g.work**_COUNTS for name, g in groups.items()}
    kept = keep_best({n: g.scores for n, g in groups.items()}, share, lambda size: math.ceil(size * _LEAST), work)
    names = {id(module): name for name, module in network.named_modules()}
    alive = {name: list(range(_outputs(m))) for name, m in network.named_modules() if _outputs(m)}
    gone: dict[str, list[int]] = {}
    for name, coupled in groups.items():
        positions = _leaving(coupled, len(kept[name]))
        if not positions:
            continue
        group = graph.get_pruning_group(coupled.root, coupled.prune, positions)
        for item in group:
            place = names.get(id(item.dep.target.module), "")
            if place in alive and graph.is_out_channel_pruning_fn(item.dep.handler):
                here = set(item.idxs)
                gone.setdefault(place, []).extend(alive[place][index] for index in here)
                alive[place] = [channel for index, channel in enumerate(alive[place]) if index not in here]
        group.prune()
    return gone


def _leaving(coupled: _Coupled, kept: int) -> list[int]:
    """The lowest, so that a multiple of 8 stays; the same in each block of a grouped convolution."""
    size = len(coupled.scores)
    left = round_to(kept, _MULTIPLE // math.gcd(_MULTIPLE, coupled.blocks), size)
    lowest = sorted(range(size), key=lambda channel: (coupled.scores[channel], -channel))[: size - left]
    return sorted(block * size + channel for block in range(coupled.blocks) for channel in lowest)


def _outputs(module: nn.Module) -> int:
    """0 for what has no channels."""
    if isinstance(module, nn.Linear):
        return module.out_features
    return _channels(module) if isinstance(module, (_CONVOLUTION, _BATCH_NORM)) else 0


def _null(network: nn.Module, gone: Mapping[str, Sequence[int]]) -> None:
    for name, positions in gone.items():
        with torch.no_grad():
            for parameter in network.get_submodule(name).parameters(recurse=False):
                parameter[list(positions)] = 0.0
