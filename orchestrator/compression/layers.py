"""Fewer layers: those go without which the loss rises least (the first ranking is kept; Sajjad et al. 2023).

There is no network with a zeroed layer to compare with: the remaining layers read and write the same residual stream, and the
network has to run.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

from orchestrator.compression.parts import longest_row
from orchestrator.compression.reshaping import Reshaping, Sample, answers, first_line
from orchestrator.compression.sensitivity import Sensitivity
from orchestrator.errors import CompressionFailed
from orchestrator.models.backbones import Network
from orchestrator.models.reshaped import drop_layers


def apply(state: Reshaping, share: float, sample: Sample) -> Reshaping:
    """Leave this share of the layers, at least one.

    Raises CompressionFailed where there is no row of layers, or the network needs more of them than that.
    """
    row = longest_row(state.network)
    if row is None:
        raise CompressionFailed(_no_row(state.network), "leave layers out")
    kept = _chosen(state.sensitivity.layers, max(1, round(share * row.length)), row.length)
    if len(kept) == row.length:
        return state
    smaller = copy.deepcopy(state.network)
    names = list(smaller.get_submodule(row.path)._modules)
    try:
        drop_layers(smaller, row.path, kept)
        runs = bool(answers(smaller, sample).isfinite().all())
    except Exception as error:  # noqa: BLE001  each architecture fails in its own way
        raise CompressionFailed(
            f"it does not run with fewer layers ({first_line(error)})", "leave layers out"
        ) from None
    if not runs:
        raise CompressionFailed("with fewer layers its answers are no numbers", "leave layers out")
    numbers = {names[old]: new for old, new in zip(kept, smaller.get_submodule(row.path)._modules, strict=True)}
    sensitivity = state.sensitivity.keeping_layers(row.path, numbers, kept)
    return replace(state, network=smaller, sensitivity=sensitivity, layers={row.path: kept})


def made_up(network: Network, sample: Sample) -> Sensitivity:
    """In which every layer that the network runs without counts for nothing."""
    row = longest_row(network)
    return Sensitivity(
        layers=[_rise(network, row.path, row.length, n, sample) for n in range(row.length)] if row else []
    )


def _rise(network: Network, path: str, length: int, layer: int, sample: Sample) -> float:
    smaller = copy.deepcopy(network)
    try:
        drop_layers(smaller, path, [n for n in range(length) if n != layer])
        return 0.0 if bool(answers(smaller, sample).isfinite().all()) else math.inf
    except Exception:  # noqa: BLE001
        return math.inf


def _chosen(rises: list[float], count: int, length: int) -> list[int]:
    if len(rises) != length:
        raise CompressionFailed(
            f"the sensitivity knows {len(rises)} layers, the network has {length}", "measure it again"
        )
    least = max(count, sum(math.isinf(rise) for rise in rises))
    if least == length:
        if count == length:
            return list(range(length))
        raise CompressionFailed("it does not run without any of its layers", "leave layers out")
    return sorted(sorted(range(length), key=lambda layer: (-rises[layer], layer))[:least])


def _no_row(network: Network) -> str:
    config = getattr(network.get_submodule("model"), "config", None)
    if (getattr(config, "num_hidden_layers", None) or 0) > 1:
        return "its layers share their weights, so that none can go alone"
    return "it has no row of layers of one kind"
