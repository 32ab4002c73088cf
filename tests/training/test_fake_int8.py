"""Training under rounding to int8: what is rounded and how, and that nothing of it is left outside of a step."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from knobs import changed, image_job, text_job, trained, weights
from torch import nn
from torch.nn import functional

from orchestrator.evaluation.metrics import summary
from orchestrator.models import post_norm
from orchestrator.models.backbones import TransformersNetwork, load_network
from orchestrator.models.checkpoint import load_model
from orchestrator.recipe import Model
from orchestrator.storage import METRICS, Storage
from orchestrator.training.fake_int8 import rounded_activation, rounded_weight, rounding
from orchestrator.training.folds import training_splits
from orchestrator.training.metrics_log import read_metrics
from orchestrator.training.worker import TrainJob


def by_hand(weight: torch.Tensor) -> torch.Tensor:
    """Each row in 1/127 of its largest value."""
    step = weight.abs().flatten(1).amax(1).reshape(-1, *[1] * (weight.ndim - 1)) / 127
    return (weight / step).round() * step


def by_hand_within(values: torch.Tensor) -> torch.Tensor:
    """In 1/255 of the range, which holds 0."""
    low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    return ((values / step).round().clamp(-zero, 255 - zero)) * step


def test_each_output_channel_is_rounded_to_its_own_steps() -> None:
    torch.manual_seed(0)
    for shape in ((5, 7), (4, 3, 3, 3)):
        weight = torch.randn(shape) * torch.logspace(-3, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        torch.testing.assert_close(rounded_weight(weight), by_hand(weight), rtol=1e-5, atol=0)
    assert torch.equal(rounded_weight(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_activations_are_rounded_within_their_range_and_zero_stays() -> None:
    torch.manual_seed(0)
    for values in (torch.randn(50, 40), torch.rand(500) * 3 + 1, -torch.rand(500) - 2):
        found = rounded_activation(values)
        torch.testing.assert_close(found, by_hand_within(values), rtol=1e-4, atol=1e-6)
        assert len(found.unique()) <= 256
    assert rounded_activation(torch.tensor([-0.37, 0.0, 1.0]))[1] == 0.0
    assert torch.equal(rounded_activation(torch.zeros(3)), torch.zeros(3))
    assert rounded_activation(torch.randn(4).bfloat16()).dtype == torch.float32


def test_gradients_pass_the_rounding_as_if_it_were_not_there() -> None:
    torch.manual_seed(0)
    weight, values = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    (rounded_weight(weight) * 2 + rounded_activation(values) * 3).sum().backward()
    assert weight.grad is not None and values.grad is not None
    assert torch.equal(weight.grad, torch.full((3, 4), 2.0)) and torch.equal(values.grad, torch.full((3, 4), 3.0))


def test_layers_answer_as_with_rounded_weights_and_inputs_in_the_block_alone() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 2))
    pixels, names = torch.randn(2, 3, 4, 4), list(network.state_dict())
    plain = network(pixels)
    hidden = functional.conv2d(by_hand_within(pixels), by_hand(network[0].weight), network[0].bias).relu().flatten(1)
    expected = functional.linear(by_hand_within(hidden), by_hand(network[3].weight), network[3].bias)
    with rounding(network):
        rounded = network(pixels)
        assert list(network.state_dict()) == names
    torch.testing.assert_close(rounded, expected, rtol=1e-4, atol=1e-4)
    assert (rounded - plain).abs().max() > 1e-4
    assert torch.equal(network(pixels), plain)
    with rounding(network, on=False):
        assert torch.equal(network(pixels), plain)


def test_an_error_in_the_block_leaves_the_network_plain() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ZeroDivisionError), rounding(network):
        raise ZeroDivisionError
    assert type(network[0]) is nn.Linear and type(copy.deepcopy(network)[0]) is nn.Linear


def test_the_fast_path_of_text_networks_rounds_nothing_and_so_is_not_taken(tiny_backbone: Path) -> None:
    torch.manual_seed(0)
    network = TransformersNetwork.create(Model(dropout=0.0), str(tiny_backbone), ("a", "b")).train()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(4, 40, (3, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = network(**inputs)
    with rounding(network):
        assert not post_norm.is_supported(network.model)
        rounded = network(**inputs)
    assert post_norm.is_supported(network.model)
    explicit = copy.deepcopy(network)
    with torch.no_grad():
        for module in explicit.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(by_hand(module.weight))
                module.register_forward_pre_hook(lambda _, args: (by_hand_within(args[0]),))
    expected = explicit.model(**inputs).logits
    assert (rounded - plain).abs().max() > 1e-3
    torch.testing.assert_close(rounded, expected, rtol=1e-2, atol=1e-2)  # a value on a border may fall to either side


def test_recomputed_activations_give_the_same_gradients(tiny_backbone: Path) -> None:
    ids, gradients = torch.randint(4, 40, (3, 7), generator=torch.Generator().manual_seed(0)), []
    for recomputed in (False, True):
        torch.manual_seed(0)
        network = TransformersNetwork.create(Model(dropout=0.0), str(tiny_backbone), ("a", "b")).train()
        if recomputed:
            network.recompute()
        with rounding(network):
            network(input_ids=ids, attention_mask=torch.ones_like(ids)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


# -------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def text(reviews_csv: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    return text_job(reviews_csv, tiny_backbone, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def images(shapes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    return image_job(shapes_folder, tmp_path_factory.mktemp("images"), "shufflenet_v2_x0_5")


@pytest.mark.parametrize("knob", [{}, {"averaging": {"decay": 0.9}, "precision": "bf16"}], ids=str)
def test_a_stopped_run_on_texts_ends_in_the_same_weights(
    text: TrainJob, knob: dict[str, object], at_every_step: None
) -> None:
    runs = [changed(text, f"{name}{len(knob)}", {"fake_int8": True, **knob}) for name in ("whole", "parts")]
    assert trained(runs[0]) == trained(runs[1], stops=(2, 8))
    assert trained(runs[0])[0] != trained(changed(text, f"plain{len(knob)}", knob))[0], "rounding changes the weights"


def test_a_stopped_run_on_images_ends_in_the_same_weights(images: TrainJob, at_every_step: None) -> None:
    runs = [changed(images, name, {"fake_int8": True}) for name in ("whole", "parts")]
    assert trained(runs[0]) == trained(runs[1], stops=(1, 3))


def test_what_is_saved_and_validated_is_the_plain_network(text: TrainJob) -> None:
    rounded, plain = changed(text, "saved", {"fake_int8": True}), changed(text, "plain", {})
    trained(rounded)
    trained(plain)
    ours, theirs = weights(rounded), weights(plain)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in ours.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in theirs.items()
    }
    storage = Storage(text.recipe.storage)
    folder = storage.path(f"{rounded.run}/model")
    network = load_network(folder)
    assert isinstance(network, TransformersNetwork) and post_norm.is_supported(network.model)
    validation = training_splits(storage.path(text.dataset), None)[1]
    answers = load_model(folder).probabilities(validation.inputs(np.arange(len(validation))))
    epochs = [line for line in read_metrics(storage.path(f"{rounded.run}/{METRICS}")) if line["kind"] == "validation"]
    best = min(line["loss"] for line in epochs)
    assert summary(validation.labels, answers)["loss"] == pytest.approx(best, abs=1e-5)
