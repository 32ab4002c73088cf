"""Fewer feed-forward units: rows of the matrices that expand, columns of the one that contracts.

Units are ranked over the whole network; a layer keeps at least a sixteenth of its own, in multiples of 8.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

from orchestrator.compression.matrices import keep_inputs, keep_outputs, output_size, zero_inputs
from orchestrator.compression.parts import feed_forwards
from orchestrator.compression.ranking import keep_best, rounded
from orchestrator.compression.refit import refit
from orchestrator.compression.reshaping import Reshaping, Sample, without, without_kept
from orchestrator.compression.sensitivity import Sensitivity
from orchestrator.compression.tokens import work
from orchestrator.errors import CompressionFailed
from orchestrator.models.backbones import Network

MULTIPLE = 8
_LEAST = 1 / 16


def apply(state: Reshaping, share: float, sample: Sample) -> Reshaping:
    """Leave this share of all units.

    Raises CompressionFailed where units cannot be taken out of this architecture.
    """
    pairs = feed_forwards(state.network)
    if not pairs:
        raise CompressionFailed("it has no pair of linear layers that expands and contracts", "leave units out")
    try:
        scores = {pair.down: state.sensitivity.units[pair.down] for pair in pairs}
    except KeyError as error:
        raise CompressionFailed(f"the sensitivity does not know the matrix {error}", "measure it again") from None
    best = keep_best(
        scores, share, lambda units: math.ceil(units * _LEAST), work(state, list(scores), sample, after=True)
    )
    kept = rounded(best, scores, MULTIPLE)
    if all(len(kept[pair.down]) == pair.units for pair in pairs):
        return state

    def null(network: Network) -> None:
        for pair in pairs:
            zero_inputs(network.get_submodule(pair.down), without_kept(pair.units, kept[pair.down]))

    def remove(network: Network) -> None:
        for pair in pairs:
            for path in pair.ups:
                up = network.get_submodule(path)
                parts = output_size(up) // pair.units  # two: the gate and what it lets through, in one matrix
                keep_outputs(up, [part * pair.units + unit for part in range(parts) for unit in kept[pair.down]])
            keep_inputs(network.get_submodule(pair.down), kept[pair.down])

    smaller = without(state.network, [remove], null, sample, "some of its feed-forward units")
    sensitivity = state.sensitivity
    for pair in pairs:
        for kind in ("units", "inputs"):
            sensitivity = sensitivity.keeping(kind, pair.down, kept[pair.down])
    refit(state.network, smaller, {pair.down: kept[pair.down] for pair in pairs}, state.batches)
    return replace(state, network=smaller, sensitivity=sensitivity)


def made_up(network: Network, sample: Sample) -> Sensitivity:
    """In which units differ, by chance."""
    numbers = random.Random(0)
    return Sensitivity(units={f.down: [numbers.random() for _ in range(f.units)] for f in feed_forwards(network)})
