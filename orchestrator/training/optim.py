"""The optimiser and its schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

Schedule = Literal["linear", "cosine", "constant"]


_BLOCK = re.compile(r".*?(?:^|[._])(?:layers?|blocks?|stage|features|denseblock|h)[._]?\d+(?=\.)")
"""A parameter's name up to the number of the outermost block that it is in."""


def build_optimizer(
    network: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) whose decay spares norms and biases: every parameter with fewer than two axes.

    The rate of each block is ``layer_decay`` times that of the one above it; the head has ``learning_rate``.

    Fused: one pass over memory instead of ten, a third of the time.
    """
    named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    depths = layer_depths([name for name, _ in network.named_parameters()]) if layer_decay < 1.0 else {}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        groups.setdefault((depths.get(name, 0), parameter.ndim < 2), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": groups[depth, spared],
                "weight_decay": 0.0 if spared else weight_decay,
                "scale": layer_decay**depth,
            }
            for depth, spared in sorted(groups)
        ],
        lr=learning_rate,
        fused=True,
    )


def layer_depths(names: Sequence[str]) -> dict[str, int]:
    """How many blocks lie above each parameter: 0 for the head, the most for embeddings or the stem.

    ``names``: of all parameters, in the network's order. What comes before the first block is the stem, what follows the
    last is the head, and what stands between two belongs to the lower one. Where no name tells of blocks, the network's
    children are the blocks and the last of them is the head.
    """
    blocks = [match[0] if (match := _BLOCK.match(name)) else None for name in names]
    if not any(blocks):
        children = [name.removeprefix("model.").split(".")[0] for name in names]
        blocks = [child if child != children[-1] else None for child in children]
    order = {block: number for number, block in enumerate(dict.fromkeys(b for b in blocks if b), start=1)}
    last = max((index for index, block in enumerate(blocks) if block), default=-1)
    depths, height = {}, 0
    for index, (name, block) in enumerate(zip(names, blocks, strict=True)):
        height = order[block] if block else height
        above = 0 if index > last else len(order) + 1 - height
        depths[name] = len(order) + 1 if "embedding" in name and not block else above
    return depths


def schedule_factor(step: int, total_steps: int, warmup_fraction: float, schedule: Schedule) -> float:
    """What the peak learning rate is multiplied with at ``step`` (0-based): up linearly, then down to zero."""
    warmup_steps = round(warmup_fraction * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """``learning_rate`` is the head's; each group has its own share of it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["scale"]
