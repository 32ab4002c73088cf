"""Frozen parameters stay to the bit what they were, and a pattern that says nothing is an error."""

import pytest
import torch

from orchestrator.errors import RecipeError
from orchestrator.models.backbones import TorchvisionNetwork, TransformersNetwork
from orchestrator.recipe import Model
from orchestrator.training.freezing import freeze

LABELS = ("a", "b")


@pytest.fixture
def text(tiny_backbone) -> TransformersNetwork:
    return TransformersNetwork.create(Model(), str(tiny_backbone), LABELS).train()


@pytest.fixture
def images() -> TorchvisionNetwork:
    return TorchvisionNetwork.create(Model(weights="none"), "resnet18", LABELS).train()


def frozen(network: torch.nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_patterns_name_parameters_with_or_without_their_first_part(text: TransformersNetwork, prefix: str) -> None:
    freeze(text, [f"{prefix}bert.embeddings.*", f"{prefix}bert.encoder.layer.[0].*"])
    expected = ("model.bert.embeddings.", "model.bert.encoder.layer.0.")
    assert frozen(text) == {name for name, _ in text.named_parameters() if name.startswith(expected)}


def test_nothing_is_frozen_without_a_pattern(text: TransformersNetwork) -> None:
    freeze(text, [])
    assert frozen(text) == set()


def test_a_pattern_that_matches_nothing_names_its_neighbours(text: TransformersNetwork) -> None:
    with pytest.raises(RecipeError, match=r"'bert.embedings.\*' matches no parameter: did you mean bert.embeddings.\*"):
        freeze(text, ["bert.embedings.*"])


def test_freezing_everything_is_an_error(text: TransformersNetwork) -> None:
    with pytest.raises(RecipeError, match="leaves nothing to train of"):
        freeze(text, ["*"])


def test_frozen_batch_norms_keep_their_statistics_and_the_others_do_not(images: TorchvisionNetwork) -> None:
    freeze(images, ["bn1.*", "layer1.*"])
    images.eval().train()  # as after each validation
    before = {name: buffer.clone() for name, buffer in images.named_buffers()}
    images(pixels=torch.randn(4, 3, 32, 32))
    kept = {name for name, buffer in images.named_buffers() if torch.equal(buffer, before[name])}
    assert kept == {name for name in before if name.startswith(("model.bn1.", "model.layer1."))}
