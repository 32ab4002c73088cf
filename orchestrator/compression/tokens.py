"""Fewer tokens in the upper layers: each layer passes on the tokens that its attention looked at most (PoWER-BERT, Goyal et al.
2020), at a rate that falls towards the last ones.

Nothing is taken out of the network, which computes less. What a class hangs on has been gathered in few tokens half way up:
of MiniLM with six layers, the last two read 16 of 70 tokens without any loss (docs/log.md).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from orchestrator.compression.parts import longest_row
from orchestrator.compression.reshaping import TOLERANCE, Reshaping, Sample, answers
from orchestrator.compression.sensitivity import Sensitivity
from orchestrator.errors import CompressionFailed
from orchestrator.models import post_norm
from orchestrator.models.backbones import Network, TransformersNetwork
from orchestrator.recipe import Training

_LEAST_WORK = 1 / 16
"""Share of the tokens that counts for a layer with however few: its weights have to be read all the same."""
_COUNTS = 0.5
"""Power of the share of tokens. Going by the work alone (1) takes too much from the first layers, on which all hangs
(docs/log.md)."""
_FALL = 8
"""From the second layer to the last but one, the number of tokens falls to this fraction, by the same factor each time."""


def apply(state: Reshaping, most: int, sample: Sample) -> Reshaping:
    """Let ``most`` tokens reach the last layer, and ``_FALL`` times as many leave the second one.

    Raises CompressionFailed where the forward pass is not ours, or there are fewer than three layers.
    """
    network = copy.deepcopy(state.network)
    if not isinstance(network, TransformersNetwork) or not post_norm.is_supported(network.model):
        raise CompressionFailed("its forward pass is its library's own, which reads all tokens", "leave tokens out")
    layers = post_norm.layer_count(network.model)
    if layers < 3 and state.layers:  # others went: between the first and the last that are left there is none
        return state
    if layers < 3:
        raise CompressionFailed(f"it has {layers} layers, and it takes three", "leave tokens out")
    _prove(network, layers, sample)
    network.kept_tokens = schedule(layers, most)
    return replace(state, network=network)


def schedule(layers: int, most: int) -> tuple[int | None, ...]:
    """How many tokens each layer passes on at most. The first passes on all: its attention knows little yet. So does the last,
    which computes a single one."""
    between = range(1, layers - 1)
    steps = max(1, len(between) - 1)
    return (None, *(round(most * _FALL ** ((between[-1] - layer) / steps)) for layer in between), None)


def work(state: Reshaping, places: Sequence[str], sample: Sample, *, after: bool) -> dict[str, float]:
    """Module -> what a part of it is taken to cost, by the share of a text's tokens that its layer will compute: before or
    ``after`` its attention left some out. 1 where all layers compute all."""
    row = longest_row(state.network)
    if state.tokens is None or row is None or "attention_mask" not in sample:
        return dict.fromkeys(places, 1.0)
    inputs = state.batches or [sample]
    length = sum(int(i["attention_mask"].sum()) for i in inputs) / sum(len(i["attention_mask"]) for i in inputs)
    left = [length]
    for most in schedule(row.length, state.tokens):
        left.append(min(left[-1], length if most is None else most))
    left[-1] = 1.0
    layers = {f"{row.path}.{name}.": n for n, name in enumerate(state.network.get_submodule(row.path)._modules)}
    numbers = {place: next((n for start, n in layers.items() if place.startswith(start)), 0) for place in places}
    return {place: max(_LEAST_WORK, left[n + after] / length) ** _COUNTS for place, n in numbers.items()}


def that_train(methods: Mapping[str, str], training: Training) -> dict[str, str]:
    """Methods -> nothing, or why not; also where what is left could not be trained on as the recipe asks."""
    if methods.get("tokens", "unknown") or not training.gradient_checkpointing:
        return dict(methods)
    why = "training.gradient_checkpointing needs the library's forward pass, which reads all tokens"
    return {**methods, "tokens": why}


def made_up(network: Network, sample: Sample) -> Sensitivity:
    return Sensitivity()


def _prove(network: TransformersNetwork, layers: int, sample: Sample) -> None:
    """Put the tokens in another order in each layer, and leave none out: the answers stay the library's."""
    wanted, tokens = answers(network, sample), sample["input_ids"].shape[1]
    network.kept_tokens = (tokens,) * layers
    device, training = next(network.parameters()).device, network.training
    with torch.no_grad():
        ours = network.eval()(**{name: tensor.to(device) for name, tensor in sample.items()}).float()
    network.train(training)
    if float((ours - wanted).abs().max()) > TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise CompressionFailed("its answers hang on the order of tokens within a layer", "leave tokens out")
