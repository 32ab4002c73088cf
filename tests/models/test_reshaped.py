"""A reshaped network is a network: it saves, loads, trains and exports as any other."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from tiny_networks import image_network, labelled, pixels, text_network, tokens
from torch import nn

from orchestrator.compression.sensitivity import measure_sensitivity
from orchestrator.compression.structure import Structure, reshape
from orchestrator.data.text import TextEncoder
from orchestrator.errors import IntegrityError
from orchestrator.models.backbones import Network, TransformersNetwork, load_network
from orchestrator.models.checkpoint import count_parameters, load_model, save_model
from orchestrator.models.reshaped import ReshapedNetwork
from orchestrator.recipe import Model
from orchestrator.training.freezing import freeze
from orchestrator.training.optim import layer_depths

TEXT, PIXELS = tokens(9, 4, 7, 2), pixels()
SMALLER = Structure(layers=0.67, heads=0.5, units=0.5)
EVERYTHING = Structure(layers=0.67, heads=0.5, units=0.7, vocabulary=0.5, rank=0.7, sparsity=0.2)


def smaller_text(family: str = "Bert", structure: Structure = SMALLER) -> ReshapedNetwork:
    network = text_network(family)
    result = reshape(network, structure, measure_sensitivity(network, labelled(TEXT)), TEXT)
    assert isinstance(result, ReshapedNetwork)
    return result


def smaller_image(architecture: str, structure: Structure) -> ReshapedNetwork:
    network = image_network(architecture)
    result = reshape(network, structure, measure_sensitivity(network, labelled(PIXELS)), PIXELS)
    assert isinstance(result, ReshapedNetwork)
    return result


def saved(network: Network, folder: Path) -> Network:
    network.save(folder)
    return load_network(folder).eval()


def same_bits(one: Network, other: Network, inputs: dict[str, torch.Tensor]) -> None:
    with torch.inference_mode():
        assert torch.equal(one(**inputs), other(**inputs))


@pytest.mark.parametrize("structure", [SMALLER, EVERYTHING], ids=["smaller", "everything"])
@pytest.mark.parametrize(
    "family", ["Bert", "DistilBert", "DebertaV2", "Deberta", "GPT2", "GPTNeoX", "Llama", "ModernBert"]
)
def test_a_saved_text_network_gives_the_same_bits(family: str, structure: Structure, tmp_path: Path) -> None:
    network = smaller_text(family, structure)
    again = saved(network, tmp_path)
    same_bits(network, again, TEXT)
    assert again.state_dict().keys() == network.state_dict().keys()
    assert isinstance(again, ReshapedNetwork)
    assert again.blueprint == network.blueprint


@pytest.mark.parametrize(
    ("architecture", "structure"),
    [
        ("resnet18", Structure(filters=0.5, layers=0.5)),
        ("mobilenet_v3_small", Structure(filters=0.6, rank=0.5)),
        ("regnet_y_400mf", Structure(filters=0.6)),
        ("convnext_tiny", Structure(layers=0.7, units=0.5)),
    ],
)
def test_a_saved_image_network_gives_the_same_bits(architecture: str, structure: Structure, tmp_path: Path) -> None:
    if structure.filters < 1.0:
        pytest.importorskip("torch_pruning", reason="an optional package")
    network = smaller_image(architecture, structure)
    same_bits(network, saved(network, tmp_path), PIXELS)


def test_a_network_that_was_made_smaller_twice_is_saved_as_it_is(tmp_path: Path) -> None:
    once = smaller_text()
    twice = reshape(once, Structure(layers=0.5, heads=0.5), measure_sensitivity(once, labelled(TEXT)), TEXT)
    same_bits(twice, saved(twice, tmp_path), TEXT)


def test_a_loaded_network_can_be_made_smaller_again(tmp_path: Path) -> None:
    loaded = saved(smaller_text("Llama"), tmp_path)
    again = reshape(loaded, Structure(units=0.5), measure_sensitivity(loaded, labelled(TEXT)), TEXT)
    assert count_parameters(again) < count_parameters(loaded)


def test_config_json_tells_what_it_is(tmp_path: Path) -> None:
    smaller_text().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["library"], config["of"]) == ("reshaped", "transformers")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_weights_that_do_not_fit_the_description_are_refused(tmp_path: Path) -> None:
    smaller_text().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["blueprint"]["layers"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"no network that its config\.json describes"):
        load_network(tmp_path)


def test_it_is_saved_as_a_whole_model_and_served_from_there(tiny_backbone: Path, tmp_path: Path) -> None:
    network = TransformersNetwork.create(Model(), str(tiny_backbone), ("bad", "good")).eval()
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]), "attention_mask": torch.ones(2, 4).long()}
    sensitivity = measure_sensitivity(network, [(inputs, torch.tensor([0, 1]))])
    smaller = reshape(network, Structure(layers=0.5, units=0.5), sensitivity, inputs)
    save_model(tmp_path, smaller, TextEncoder(tiny_backbone, 32), ("bad", "good"), "text_classification")
    model = load_model(tmp_path, verify=False)
    assert model.card["parameters"] == count_parameters(smaller)
    same_bits(smaller, model.network, inputs)


# ------------------------------------------------------------------------------------------------------------ training


def test_all_parameters_train_and_keep_the_names_they_had() -> None:
    parent, network = text_network("Bert"), smaller_text().train()
    names = [name for name, _ in network.named_parameters()]
    assert set(names) <= {name for name, _ in parent.named_parameters()}
    nn.functional.cross_entropy(network(**TEXT), torch.tensor([0, 1, 2, 0])).backward()
    silent = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert not silent
    assert max(layer_depths(names).values()) == 3  # two layers and the embeddings
    freeze(network, ["bert.embeddings.*"])
    assert not network.get_parameter("model.bert.embeddings.word_embeddings.weight").requires_grad


def test_a_copy_is_of_its_own() -> None:
    network = smaller_text()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert not torch.equal(twin(**TEXT), network(**TEXT))
    assert twin.inner.get_submodule("model") is twin.model


def test_recomputing_and_moving_reach_the_network_inside() -> None:
    network = smaller_text("Bert").train()
    with torch.no_grad():
        before = network.eval()(**TEXT)
        with network.moving(lambda rows: rows + 1.0):
            moved = network(**TEXT)
    assert not torch.equal(before, moved)
    network.recompute()
    assert any(getattr(module, "gradient_checkpointing", False) for module in network.modules())
    nn.functional.cross_entropy(network.train()(**TEXT), torch.tensor([0, 1, 2, 0])).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_hidden_states_can_be_watched_and_there_are_fewer_of_them() -> None:
    network = smaller_text()
    with torch.no_grad():
        logits, states, _ = network.watched(**TEXT)
        assert torch.equal(logits, network(**TEXT))
    assert len(states) == 2
    assert states[0].shape == (4, 9, 32)


def test_batch_norms_that_are_frozen_keep_their_statistics() -> None:
    network = smaller_image("resnet18", Structure(layers=0.5))
    freeze(network, ["bn1.*"])
    norm = network.get_submodule("model.bn1")
    before = norm.running_mean.clone()  # type: ignore[operator, union-attr]
    network.train()(**PIXELS)
    assert torch.equal(norm.running_mean, before)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- export


class ByPosition(nn.Module):
    """What exporters want."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(input_ids=input_ids, attention_mask=attention_mask)
        return logits


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_it_exports_with_any_number_of_rows_and_tokens(family: str) -> None:
    network = smaller_text(family, EVERYTHING)
    rows, length = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("tokens", min=2, max=40)
    shapes = ({0: rows, 1: length}, {0: rows, 1: length})
    program = torch.export.export(ByPosition(network), tuple(TEXT.values()), dynamic_shapes=shapes).module()
    for inputs in (TEXT, tokens(12, 3)):
        with torch.no_grad():
            torch.testing.assert_close(program(*inputs.values()), network(**inputs), rtol=1e-4, atol=1e-4)


def test_an_image_network_exports() -> None:
    network = smaller_image("resnet18", Structure(layers=0.5))
    program = torch.export.export(network, (), PIXELS).module()
    with torch.no_grad():
        torch.testing.assert_close(program(**PIXELS), network(**PIXELS), rtol=1e-4, atol=1e-4)
