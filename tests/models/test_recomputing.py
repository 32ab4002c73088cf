"""Gradient checkpointing keeps fewer bytes and gives the same gradients, dropout and batch-norm statistics included."""

import copy
from pathlib import Path

import pytest
import torch

from orchestrator.errors import RecipeError
from orchestrator.models.backbones import Network, TorchvisionNetwork, TransformersNetwork
from orchestrator.recipe import Model

LABELS = ("a", "b")


def images(architecture: str) -> tuple[Network, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    network = TorchvisionNetwork.create(Model(weights="none", dropout=0.3), architecture, LABELS)
    return network.train(), {"pixels": torch.randn(4, 3, 64, 64)}


def step(network: Network, inputs: dict[str, torch.Tensor]) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that the forward pass leaves allocated for the backward pass, and the gradients and buffers after it."""
    torch.manual_seed(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = network(**inputs).logsumexp(-1).sum()
    kept = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    loss.backward()
    result = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return kept, result | dict(network.named_buffers())


def compare(network: Network, inputs: dict[str, torch.Tensor], share: float) -> None:
    saving = copy.deepcopy(network)
    saving.recompute()
    (bytes_all, expected), (bytes_few, found) = step(network, inputs), step(saving, inputs)
    assert bytes_few < share * bytes_all
    assert found.keys() == expected.keys() and len(found) > 10
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("architecture", ["resnet18", "mobilenet_v3_small"])
def test_images_keep_less_and_give_the_same_gradients_and_statistics(architecture: str) -> None:
    """The second has modules that change their input in place, dropout among them."""
    compare(*images(architecture), share=0.6)


def test_texts_keep_less_and_give_the_same_gradients(tiny_backbone: Path) -> None:
    torch.manual_seed(0)
    network = TransformersNetwork.create(Model(dropout=0.2), str(tiny_backbone), LABELS).train()
    network.forward = lambda **inputs: network.model(**inputs).logits  # the library's own pass, which recomputes
    ids = torch.randint(4, 40, (8, 24), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    saving = copy.deepcopy(network)
    del saving.forward
    saving.recompute()
    (bytes_all, expected), (bytes_few, found) = step(network, inputs), step(saving, inputs)
    assert bytes_few < 0.5 * bytes_all
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_statistics_are_counted_once() -> None:
    network, inputs = images("resnet18")
    network.recompute()
    step(network, inputs)
    assert {int(b) for name, b in network.named_buffers() if name.endswith("num_batches_tracked")} == {1}


def test_a_saved_network_has_the_names_it_always_had(tmp_path: Path) -> None:
    network, inputs = images("resnet18")
    network.recompute()
    network.save(tmp_path)
    loaded = TorchvisionNetwork.load(tmp_path).eval()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(**inputs), network.eval()(**inputs))


def test_an_architecture_without_sequences_is_refused() -> None:
    network = TorchvisionNetwork.create(Model(weights="none"), "resnet18", LABELS)
    network.model = torch.nn.Linear(2, 2)
    with pytest.raises(RecipeError, match="no sequence of modules to cut"):
        network.recompute()
