"""A network while it is made smaller, and the proof that what was taken out is what was meant.

A part is out when the network without it answers as the one in which the part's results are zero. Architectures hide much in
their forward pass (fixed widths, biases by head, fused matrices in several orders), so names and shapes are not trusted: each
removal is compared on a sample of real inputs, and refused where the two disagree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from orchestrator.compression.sensitivity import Sensitivity
from orchestrator.errors import CompressionFailed
from orchestrator.models.backbones import Network
from orchestrator.models.reshaped import library_logits

Sample = Mapping[str, torch.Tensor]
"""Inputs of a network, a few rows."""
TOLERANCE = 1e-4
"""Of logits; relative to the largest where that is above 1."""
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Reshaping:
    """What there is so far. Networks are never changed: each method hands on another one."""

    network: Network
    """Of its library."""
    sensitivity: Sensitivity
    """Of ``network`` as it is now."""
    batches: Sequence[Sample] = ()
    """Inputs by which what stays takes over the work of what goes; none: weights stay as they were."""
    layers: dict[str, list[int]] = field(default_factory=dict)
    """Row -> positions, in the row at the start, of the layers that are left."""
    tokens: int | None = None
    """How many tokens of a text will reach the last layer, at most; None: all."""


def answers(network: Network, sample: Sample) -> torch.Tensor:
    """Logits [rows, classes] in evaluation mode, float32."""
    training, device = network.training, next(network.parameters()).device
    network.eval()
    try:
        with torch.no_grad():
            return library_logits(network, {name: tensor.to(device) for name, tensor in sample.items()}).float()
    finally:
        network.train(training)


def without(
    network: Network,
    remove: Sequence[Callable[[Network], None]],
    null: Callable[[Network], None],
    sample: Sample,
    what: str,
) -> Network:
    """A copy from which parts were removed, in the first of these ways that is right.

    ``null``: sets the same parts' results to zero.
    Raises:
        CompressionFailed: no way is; says why of the first.
    """
    untouched, twin = answers(network, sample), copy.deepcopy(network)
    null(twin)
    zeroed = answers(twin, sample)
    reason = ""
    for way in remove:
        smaller = copy.deepcopy(network)
        try:
            way(smaller)
            result = answers(smaller, sample)
        except Exception as error:  # noqa: BLE001  each architecture fails in its own way
            reason = reason or f"it does not run without {what} ({first_line(error)})"
            continue
        if agree(result, zeroed, untouched):
            return smaller
        reason = reason or f"without {what} it does not answer as with zeros in their place"
    raise CompressionFailed(reason, "leave this method out")


def agree(result: torch.Tensor, zeroed: torch.Tensor, untouched: torch.Tensor) -> bool:
    """Equal but for rounding; and far nearer to each other than to the answers before, which the wrong parts could be too."""
    if result.shape != zeroed.shape or not bool(result.isfinite().all()):
        return False
    scale = max(1.0, float(zeroed.abs().max()))
    error, effect = float((result - zeroed).abs().max()), float((untouched - zeroed).abs().max())
    return error <= TOLERANCE * scale and error <= 0.1 * effect + _ROUNDING * scale


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def without_kept(size: int, kept: Sequence[int]) -> list[int]:
    """Positions below ``size`` that go."""
    return sorted(set(range(size)) - set(kept))
