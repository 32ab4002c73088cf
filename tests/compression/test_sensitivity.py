"""Importance is what it says: the slope of the loss, and parts ranked low are missed less than parts ranked high."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_networks import image_network, labelled, pixels, text_network, tokens
from torch.nn import functional

from orchestrator.compression.parts import attentions, feed_forwards, longest_row
from orchestrator.compression.reshaping import answers
from orchestrator.compression.sensitivity import Batch, Scores, Sensitivity, measure_sensitivity
from orchestrator.compression.structure import Structure, reshape
from orchestrator.models.backbones import Network, TransformersNetwork
from orchestrator.models.reshaped import drop_layers

TEXT = tokens(9, 4, 7, 2)


def loss(network: Network, batches: list[Batch]) -> float:
    losses = [functional.cross_entropy(answers(network, inputs), labels, reduction="sum") for inputs, labels in batches]
    return float(sum(losses)) / sum(len(labels) for _, labels in batches)


@pytest.fixture(scope="module")
def trained() -> tuple[TransformersNetwork, list[Batch]]:
    """Has learned which of three kinds of words a text has most of."""
    network = text_network("Bert", spread=0.08)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 60, (96, 8), generator=generator)
    labels = torch.randint(0, 3, (96,), generator=generator)
    ids[:, 2:6] = 6 + labels[:, None] * 15 + torch.randint(0, 12, (96, 4), generator=generator)
    batches: list[Batch] = [
        ({"input_ids": ids[part], "attention_mask": torch.ones_like(ids[part])}, labels[part])
        for part in torch.arange(96).split(32)
    ]
    torch.manual_seed(6)
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=3e-3)
    for _ in range(25):
        for inputs, told in batches:
            optimizer.zero_grad()
            functional.cross_entropy(network(**inputs), told).backward()
            optimizer.step()
    network.zero_grad(set_to_none=True)
    network.eval()
    assert loss(network, batches) < 0.2
    return network, batches


def reversed_ranking(scores: Scores) -> Scores:
    return {place: [-value for value in values] for place, values in scores.items()}


@pytest.mark.parametrize("method", ["heads", "units"])
def test_parts_ranked_low_are_missed_less_than_parts_ranked_high(
    trained: tuple[TransformersNetwork, list[Batch]], method: str
) -> None:
    network, batches = trained
    sensitivity = measure_sensitivity(network, batches)
    turned = Sensitivity(**{method: reversed_ranking(getattr(sensitivity, method))})
    structure, sample = Structure(**{method: 0.5}), batches[0][0]
    well, badly = (loss(reshape(network, structure, s, sample), batches) for s in (sensitivity, turned))
    assert well < badly


def test_the_layer_that_goes_is_the_one_whose_absence_costs_least(
    trained: tuple[TransformersNetwork, list[Batch]],
) -> None:
    network, batches = trained
    sensitivity = measure_sensitivity(network, batches)
    rises = []
    for layer in range(3):
        smaller = TransformersNetwork(text_network("Bert").model)
        smaller.load_state_dict(network.state_dict())
        drop_layers(smaller, "model.bert.encoder.layer", [n for n in range(3) if n != layer])
        rises.append(loss(smaller, batches) - loss(network, batches))
    assert sensitivity.layers == pytest.approx(rises, abs=1e-4)
    smaller = reshape(network, Structure(layers=0.67), sensitivity, batches[0][0])
    assert loss(smaller, batches) == pytest.approx(min(rises) + loss(network, batches), abs=1e-4)


def test_a_score_is_the_slope_of_the_loss_in_a_factor_on_the_part() -> None:
    network, (batch,) = text_network("Bert"), labelled(tokens(6))
    sensitivity = measure_sensitivity(network, [batch])
    step = 1e-3
    for kind, place, path, part, size in (
        ("heads", (a := attentions(network)[1]).name, a.out, 2, 8),
        ("units", (f := feed_forwards(network)[0]).down, f.down, 5, 1),
    ):
        columns = network.get_submodule(path).weight[:, part * size : (part + 1) * size]  # type: ignore[index]
        losses = []
        for factor in (1 + step, (1 - step) / (1 + step)):
            with torch.no_grad():
                columns.mul_(factor)
            losses.append(loss(network, [batch]))
        slope = (losses[0] - losses[1]) / (2 * step)
        assert getattr(sensitivity, kind)[place][part] == pytest.approx(abs(slope), rel=0.05, abs=2e-4)


def test_padding_and_the_split_into_batches_change_nothing() -> None:
    network = text_network("Bert")
    inputs, labels = labelled(TEXT)[0]
    rows = [({name: t[n : n + 1, : int(TEXT["attention_mask"][n].sum())] for name, t in inputs.items()}, labels[n : n + 1])
            for n in range(4)]  # fmt: skip
    whole, apart = measure_sensitivity(network, [(inputs, labels)]), measure_sensitivity(network, rows)
    assert whole.rows == apart.rows == 4
    assert whole.loss == pytest.approx(apart.loss, rel=1e-4)
    for kind in ("heads", "units"):
        for place, values in getattr(whole, kind).items():
            assert values == pytest.approx(getattr(apart, kind)[place], rel=1e-2, abs=1e-4)


def test_frozen_parameters_do_not_hide_what_lies_below_them() -> None:
    network = text_network("Bert")
    free = measure_sensitivity(network, labelled(TEXT))
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    assert measure_sensitivity(network, labelled(TEXT)) == free
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_it_survives_json_and_blocks_that_cannot_go_are_infinite() -> None:
    network = image_network("resnet50")
    sensitivity = measure_sensitivity(network, labelled(pixels(side=32)))
    row = longest_row(network)
    assert row is not None
    assert (row.path, row.length) == ("model.layer3", 6)
    assert [math.isinf(rise) for rise in sensitivity.layers] == [True] + [False] * 5
    assert set(sensitivity.filters) >= {"model.conv1", "model.bn1"}
    text = json.dumps(sensitivity.to_json(), allow_nan=False)
    assert Sensitivity.from_json(json.loads(text)) == sensitivity
