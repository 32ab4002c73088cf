"""What is left of a network: the shares that a candidate keeps, and the network that has only these.

In: a trained network, a ``Structure``, and what ``sensitivity.py`` found. Out: another network, physically smaller, that saves,
loads and trains as any other. Each method is a file and a line in ``METHODS``; each proves by doing that it applies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from orchestrator.compression import filters, heads, layers, low_rank, sparsity, tokens, units, vocabulary
from orchestrator.compression.reshaping import TOLERANCE, Reshaping, Sample, answers, first_line
from orchestrator.compression.sensitivity import Sensitivity
from orchestrator.errors import CompressionFailed, OrchestratorError
from orchestrator.models.backbones import Network, TransformersNetwork
from orchestrator.models.reshaped import ReshapedNetwork, base_of

_PROOF_ROWS = 4


@dataclass(frozen=True)
class Structure:
    """Shares that are KEPT of the network as it is; 1 leaves it alone."""

    layers: float = 1.0
    """Of a transformer's layers, or of a convolutional network's longest row of like blocks; at least one stays."""
    heads: float = 1.0
    """Of all attention heads; at least one stays in each layer."""
    units: float = 1.0
    """Of all feed-forward units; at least a sixteenth stays in each layer, in multiples of 8."""
    filters: float = 1.0
    """Of a convolutional network's filters; in multiples of 8."""
    vocabulary: float = 1.0
    """Of the rows of the table of tokens; tokens without one of their own read that of another."""
    rank: float = 1.0
    """Linear layers as two, with this share of the rank at which both cost the same as one."""
    sparsity: float = 0.0
    """Share of the weights of linear and convolution layers that is set to ZERO. It brings no speed."""
    tokens: int | None = None
    """How many tokens of a text reach the last layer, at most."""


@dataclass(frozen=True)
class Method:
    apply: Callable[[Reshaping, Any, Sample], Reshaping]
    made_up: Callable[[Network, Sample], Sensitivity]
    """What ``apply`` reads, for a trial."""
    untouched: float | None = 1.0
    trial: float = 0.5
    """Value with which the method is tried on an architecture."""


METHODS: Mapping[str, Method] = {
    "layers": Method(layers.apply, layers.made_up),
    "heads": Method(heads.apply, heads.made_up),
    "units": Method(units.apply, units.made_up),
    "filters": Method(filters.apply, filters.made_up),
    "vocabulary": Method(vocabulary.apply, vocabulary.made_up),
    "rank": Method(low_rank.apply, low_rank.made_up),
    "sparsity": Method(sparsity.apply, sparsity.made_up, untouched=0.0),
    "tokens": Method(tokens.apply, tokens.made_up, untouched=None, trial=8),
}
"""Field of ``Structure`` -> how. In this order: what goes first needs not be ranked or factored, and each sees all tokens."""


def methods_of(network: Network, sample: Sample) -> dict[str, str]:
    """Field of ``Structure`` -> nothing if it applies to this architecture, else the reason why not, in one sentence.

    Proved by doing: parts are taken out, and the network answers as with zeros in their place. ``sample``: inputs of at
    least one row, of which a few are used.
    """
    try:
        inner = _inner(network)
        base_of(inner)
    except CompressionFailed as error:
        return dict.fromkeys(METHODS, error.message)
    few = {name: tensor[:_PROOF_ROWS] for name, tensor in sample.items()}
    return {field: _why_not(method, inner, few) for field, method in METHODS.items()}


def reshape(
    network: Network, structure: Structure, sensitivity: Sensitivity, sample: Sample, batches: Sequence[Sample] = ()
) -> Network:
    """What ``structure`` leaves of the network; the given one stays as it is.

    ``sample``: a few rows of inputs, on which each removal is checked. ``batches``: calibration inputs, by which the
    matrices that lose inputs are refitted; none: every weight stays as it was.
    Raises:
        CompressionFailed: a method does not apply to this architecture; ``methods_of`` would have said so.
        RecipeError: a package is missing.
    """
    base_of(network)
    start, before = _with_all_tokens(_inner(network))
    if structure.tokens is None and before:
        structure = replace(structure, tokens=before)
    few = {name: tensor[:_PROOF_ROWS] for name, tensor in sample.items()}
    state = Reshaping(start, sensitivity, batches, tokens=structure.tokens)
    for field, method in METHODS.items():
        if (value := getattr(structure, field)) != method.untouched:
            try:
                state = method.apply(state, value, few)
            except CompressionFailed as error:
                raise CompressionFailed(
                    f"compression.{field} is {value}, but {error.message}", error.next_step
                ) from None
    if structure == Structure():
        return copy.deepcopy(network)
    result = ReshapedNetwork.of(network, state.network, state.layers, sparse=structure.sparsity > 0.0)
    _check_fast_path(result, few)
    return result


def _inner(network: Network) -> Network:
    return network.inner if isinstance(network, ReshapedNetwork) else network


def _with_all_tokens(network: Network) -> tuple[Network, int | None]:
    """The network in which every layer reads every token, and how many reach the last layer of the given one if not all."""
    if not isinstance(network, TransformersNetwork) or not network.kept_tokens:
        return network, None
    whole = copy.deepcopy(network)
    whole.kept_tokens = ()
    return whole, network.kept_tokens[-2]


def _why_not(method: Method, network: Network, sample: Sample) -> str:
    try:
        before = Reshaping(network, method.made_up(network, sample))
        after = method.apply(before, method.trial, sample)
    except OrchestratorError as error:
        return error.message
    except Exception as error:  # noqa: BLE001  an architecture that nobody has seen may fail anywhere
        return f"trying it failed ({first_line(error)})"
    return "" if after is not before else "there is too little of it to take any out"


def _check_fast_path(network: ReshapedNetwork, sample: Sample) -> None:
    """What serves and trains has to answer as the library's modules do."""
    whole, _ = _with_all_tokens(network.inner)
    device, training = next(network.parameters()).device, network.training
    whole.eval()
    with torch.no_grad():
        ours = whole(**{name: tensor.to(device) for name, tensor in sample.items()}).float()
    whole.train(training)
    theirs = answers(network, sample)
    if float((ours - theirs).abs().max()) > TOLERANCE * max(1.0, float(theirs.abs().max())):
        raise CompressionFailed("the fast forward pass does not answer as the library does", "report the architecture")
