"""LoRA trains little, and what is saved is an ordinary model that answers as the adapted one did."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.errors import RecipeError
from orchestrator.models import post_norm
from orchestrator.models.backbones import TransformersNetwork
from orchestrator.recipe import Lora, Model
from orchestrator.training.freezing import frozen_sha256, load_trained_state, trained_state
from orchestrator.training.lora import adapt, merge

LABELS = ("a", "b")
TOKENS = {
    "input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
}


@pytest.fixture
def network(tiny_backbone: Path) -> TransformersNetwork:
    torch.manual_seed(0)
    return TransformersNetwork.create(Model(), str(tiny_backbone), LABELS).train()


def trained(network: TransformersNetwork) -> TransformersNetwork:
    """Adapters start as nothing; these have something to say."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return network.eval()


def test_only_adapters_and_the_head_train(network: TransformersNetwork) -> None:
    adapt(network, Lora(rank=2))
    names = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {name for name in names if "lora_" not in name} == {
        f"model.{layer}.{kind}" for layer in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")
    }
    assert len([name for name in names if "lora_" in name]) == 2 * 2 * 2, "A and B of query and value, in two layers"


def test_adapted_layers_are_left_to_the_library(network: TransformersNetwork) -> None:
    before = network.eval()(**TOKENS)
    adapt(network, Lora())
    assert not post_norm.is_supported(network.model)
    torch.testing.assert_close(network.eval()(**TOKENS), before)  # adapters start as nothing


def test_merged_weights_answer_as_the_adapters_did(network: TransformersNetwork, tmp_path: Path) -> None:
    names = set(network.state_dict())
    plain = network.eval()(**TOKENS)
    adapt(network, Lora(rank=3, alpha=5.0, targets=("query", "key", "dense")))
    expected = trained(network)(**TOKENS)
    assert (expected - plain).abs().max() > 0.01
    merged = copy.deepcopy(network)
    merge(merged)
    assert set(merged.state_dict()) == names and post_norm.is_supported(merged.model)
    torch.testing.assert_close(merged(**TOKENS), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network(**TOKENS), expected, rtol=0, atol=0)  # the one that trains is untouched


def test_the_saved_folder_has_no_trace_of_peft(
    network: TransformersNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForSequenceClassification

    adapt(network, Lora())
    expected = trained(network)(**TOKENS)
    merge(network)
    network.save(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(**TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert not [path for path in tmp_path.iterdir() if "adapter" in path.name]
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "lora" in name or "base_layer" in name]
    assert not {"peft", "lora"} & set(json.dumps(json.loads((tmp_path / "config.json").read_text())).lower().split('"'))


def test_a_checkpoint_holds_only_what_trains(network: TransformersNetwork, tiny_backbone: Path) -> None:
    adapt(network, Lora(rank=2))
    adapted = trained(network)
    state = trained_state(adapted, adapted.state_dict())
    assert sum(tensor.numel() for tensor in state.values()) < 0.1 * sum(p.numel() for p in network.parameters())
    torch.manual_seed(0)
    again = TransformersNetwork.create(Model(), str(tiny_backbone), LABELS)
    adapt(again, Lora(rank=2))
    assert frozen_sha256(again) == frozen_sha256(network)
    load_trained_state(again, state)
    torch.testing.assert_close(again.eval()(**TOKENS), network(**TOKENS), rtol=0, atol=0)
    again.model.bert.embeddings.word_embeddings.weight.data[3, 3] += 1e-3
    assert frozen_sha256(again) != frozen_sha256(network)


@pytest.mark.parametrize(
    ("targets", "message"),
    [(("quary",), r"training.lora: .*quary.*: set training.lora.targets to some of \['classifier', 'dense', 'key'"),
     (("word_embeddings",), r"word_embeddings is not linear: choose some of")],
)  # fmt: skip
def test_targets_that_are_no_linear_layers_are_refused(
    network: TransformersNetwork, targets: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        adapt(network, Lora(targets=targets))


def test_without_the_package_the_next_step_is_named(
    network: TransformersNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError, match=r"pip install 'ray-orchestrator\[lora\]'"):
        adapt(network, Lora())
