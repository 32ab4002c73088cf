"""Matrices that lose inputs give nearly what they gave, where the inputs that are left tell of those that went."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_networks import labelled, text_network, tokens

from orchestrator.compression.parts import feed_forwards
from orchestrator.compression.reshaping import Sample
from orchestrator.compression.sensitivity import Sensitivity, measure_sensitivity
from orchestrator.compression.structure import Structure, reshape
from orchestrator.models.backbones import Network

BATCHES = [tokens(*[30] * 64), tokens(*[28] * 64)]
UNSEEN = tokens(26, 30, 21)


def error(network: Network, other: Network, inputs: Sample) -> float:
    with torch.no_grad():
        return float((network(**inputs) - other(**inputs)).square().mean())


def test_units_that_say_what_others_say_are_not_missed() -> None:
    network = text_network("Bert")
    pairs = feed_forwards(network)
    with torch.no_grad():
        for pair in pairs:
            up = network.get_submodule(pair.ups[0])
            half = pair.units // 2
            for tensor in (up.weight, up.bias):  # type: ignore[union-attr]
                tensor[half:] = tensor[:half]  # type: ignore[index,operator]
    scores = {pair.down: [1.0] * (pair.units // 2) + [0.0] * (pair.units // 2) for pair in pairs}
    halved = Structure(units=0.5), Sensitivity(units=scores), UNSEEN
    bare, refitted = reshape(network, *halved), reshape(network, *halved, BATCHES)
    assert error(network, bare, UNSEEN) > 1e-4
    assert error(network, refitted, UNSEEN) < 1e-3 * error(network, bare, UNSEEN)


@pytest.mark.parametrize("family", ["Bert", "GPT2", "Llama", "ModernBert"])
@pytest.mark.parametrize("structure", [Structure(units=0.5), Structure(heads=0.5), Structure(heads=0.5, units=0.5)])
def test_what_is_left_answers_more_like_the_whole(family: str, structure: Structure) -> None:
    network = text_network(family)
    before = copy.deepcopy(network.state_dict())
    sensitivity = measure_sensitivity(network, labelled(BATCHES[0]))
    bare = reshape(network, structure, sensitivity, UNSEEN)
    refitted = reshape(network, structure, sensitivity, UNSEEN, BATCHES)
    assert sum(error(network, refitted, batch) for batch in BATCHES) < sum(
        error(network, bare, batch) for batch in BATCHES
    )
    assert [p.shape for p in refitted.parameters()] == [p.shape for p in bare.parameters()]
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())


def test_factored_matrices_stay_as_they_are() -> None:
    network = text_network("Bert")
    factored = reshape(network, Structure(rank=0.5), measure_sensitivity(network, labelled(UNSEEN)), UNSEEN)
    halved = Structure(units=0.5), measure_sensitivity(factored, labelled(UNSEEN)), UNSEEN
    bare, refitted = reshape(factored, *halved), reshape(factored, *halved, BATCHES)
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), refitted.parameters(), strict=True))
