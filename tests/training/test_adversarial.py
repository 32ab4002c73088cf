"""The fast gradient method moves each row by epsilon, raises its loss, and means the same however a batch is dealt."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from orchestrator.models.backbones import Network, TorchvisionNetwork, TransformersNetwork
from orchestrator.recipe import Model
from orchestrator.training.adversarial import FastGradient, steepest
from orchestrator.training.loop import Compute, MicroBatch, train_step

CPU = Compute(torch.device("cpu"), "fp32")


@pytest.fixture(params=["text", "images"])
def case(request: pytest.FixtureRequest, tiny_backbone: Path) -> tuple[Network, MicroBatch]:
    torch.manual_seed(0)
    labels, weights = torch.tensor([0, 1, 1, 0]), torch.tensor([1.0, 2.0, 0.5, 1.0])
    if request.param == "text":
        ids = torch.randint(4, 40, (4, 9))
        mask = (torch.arange(9) < torch.tensor([9, 6, 3, 9])[:, None]).long()
        network: Network = TransformersNetwork.create(Model(dropout=0.0), str(tiny_backbone), ("a", "b")).train()
        return network, MicroBatch({"input_ids": ids * mask, "attention_mask": mask}, labels, weights)
    network = TorchvisionNetwork.create(Model(weights="none"), "shufflenet_v2_x0_5", ("a", "b")).train()
    pixels = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        for _ in range(30):  # statistics that let something through
            network(pixels=pixels)
    return network.eval(), MicroBatch({"pixels": pixels}, labels, weights)


def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


def gradients(network: Network, parts: list[MicroBatch], adversary: FastGradient | None) -> dict[str, torch.Tensor]:
    still = torch.optim.SGD(network.parameters(), lr=0.0)
    total = float(sum(part.weights.sum() for part in parts))
    train_step(network, parts, still, losses, CPU, total_weight=total, max_grad_norm=None, adversary=adversary)
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def split(whole: MicroBatch, sizes: list[int]) -> list[MicroBatch]:
    dealt = zip(*(x.split(sizes) for x in whole.inputs.values()), strict=True)
    inputs = [dict(zip(whole.inputs, values, strict=True)) for values in dealt]
    return [
        MicroBatch(*part) for part in zip(inputs, whole.labels.split(sizes), whole.weights.split(sizes), strict=True)
    ]


def test_each_row_moves_by_epsilon_and_its_loss_grows(case: tuple[Network, MicroBatch]) -> None:
    network, rows = case
    moved, found = [], []
    for _ in FastGradient(network, 0.01).passes():
        with network.moving(lambda x: moved.append(x.detach().clone()) or x):
            loss = losses(network(**rows.inputs), rows.labels)
            loss.sum().backward()
            found.append(loss.detach())
    distance = (moved[1] - moved[0]).flatten(1).norm(dim=1)
    torch.testing.assert_close(distance, torch.full((4,), 0.01), rtol=1e-3, atol=0.0)
    assert (found[1] > found[0]).all()


def test_gradients_add_up_and_do_not_depend_on_how_the_batch_is_dealt(case: tuple[Network, MicroBatch]) -> None:
    network, rows = case
    adversary = FastGradient(network, 0.5)
    whole, parts = (gradients(network, dealt, adversary) for dealt in ([rows], split(rows, [1, 2, 1])))
    clean = gradients(network, [rows], None)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    added = torch.cat([(whole[name] - clean[name]).flatten() for name in clean]).norm()
    assert added > 0.1 * torch.cat([gradient.flatten() for gradient in clean.values()]).norm()
    after = gradients(network, [rows], None)
    assert all(torch.equal(after[name], clean[name]) for name in clean), "nothing of it is left in the network"


def test_frozen_embeddings_can_be_moved_too(tiny_backbone: Path) -> None:
    network = TransformersNetwork.create(Model(dropout=0.0), str(tiny_backbone), ("a", "b")).train()
    network.model.get_input_embeddings().requires_grad_(False)
    ids = torch.randint(4, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    rows = MicroBatch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.tensor([0, 1]), torch.ones(2))
    assert gradients(network, [rows], FastGradient(network, 1.0))


def test_batch_norms_learn_from_the_rows_as_they_are_alone() -> None:
    torch.manual_seed(0)
    network = TorchvisionNetwork.create(Model(weights="none"), "shufflenet_v2_x0_5", ("a", "b")).train()
    rows = MicroBatch({"pixels": torch.randn(4, 3, 32, 32)}, torch.tensor([0, 1, 1, 0]), torch.ones(4))
    gradients(network, [rows], FastGradient(network, 5.0))
    assert {int(b) for name, b in network.named_buffers() if name.endswith("num_batches_tracked")} == {1}


def test_a_row_of_weight_zero_is_not_moved_and_small_gradients_are_not_lost() -> None:
    moves = steepest(torch.tensor([[0.0, 0.0], [3e-30, 4e-30], [3e10, 4e10]]), 2.0)
    torch.testing.assert_close(moves, torch.tensor([[0.0, 0.0], [1.2, 1.6], [1.2, 1.6]]))
