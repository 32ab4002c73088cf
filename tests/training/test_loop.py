"""One step is the same however its rows are dealt."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from orchestrator.recipe import Privacy, Training
from orchestrator.training.loop import Compute, MicroBatch, predict, train_step
from orchestrator.training.optim import build_optimizer, schedule_factor
from orchestrator.training.precision import resolve_precision

CPU = Compute(torch.device("cpu"), "fp32")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)).relu())


def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


def batch(rows: int, weight: float = 1.0) -> MicroBatch:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 6, generator=generator)
    return MicroBatch({"x": x}, torch.arange(rows) % 3, torch.full((rows,), weight))


def split(whole: MicroBatch, sizes: list[int]) -> list[MicroBatch]:
    parts = zip(whole.inputs["x"].split(sizes), whole.labels.split(sizes), whole.weights.split(sizes), strict=True)
    return [MicroBatch({"x": x}, labels, weights) for x, labels, weights in parts]


def step(network: nn.Module, parts: list[MicroBatch], **options: float | None) -> float:
    optimizer = build_optimizer(network, 0.01, 0.1)
    total = float(sum(part.weights.sum() for part in parts))
    return train_step(network, parts, optimizer, losses, CPU, total_weight=total,
                      max_grad_norm=options.get("max_grad_norm", 1.0))[0]  # fmt: skip


def test_accumulated_uneven_parts_give_the_step_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    whole, parts = Tiny(), Tiny()
    parts.load_state_dict(whole.state_dict())
    first, second = step(whole, [batch(10)]), step(parts, split(batch(10), [7, 2, 1]))
    assert first == pytest.approx(second, rel=1e-6)
    for left, right in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_weighted_mean_over_the_rows() -> None:
    torch.manual_seed(0)
    network = Tiny()
    rows = batch(9)
    weights = torch.tensor([1.0, 2.0, 3.0] * 3)
    expected = functional.cross_entropy(
        network(**rows.inputs), rows.labels, weight=torch.tensor([1.0, 2.0, 3.0])
    ).item()
    assert step(network, [MicroBatch(rows.inputs, rows.labels, weights)]) == pytest.approx(expected, rel=1e-6)


def test_a_row_of_weight_zero_changes_nothing() -> None:
    torch.manual_seed(0)
    plain, padded = Tiny(), Tiny()
    padded.load_state_dict(plain.state_dict())
    step(plain, [batch(6)])
    step(padded, [batch(6), batch(1, weight=0.0)])
    for left, right in zip(plain.parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


def test_gradients_are_clipped_to_the_norm() -> None:
    torch.manual_seed(0)
    network = Tiny()
    step(network, [batch(4)], max_grad_norm=1e-3)
    norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
    assert norm <= 1e-3 * 1.001


def test_decay_spares_norms_and_biases() -> None:
    network = Tiny()
    with_decay, without = build_optimizer(network, 0.1, 0.5).param_groups
    assert with_decay["weight_decay"] == 0.5
    assert {id(p) for p in with_decay["params"]} == {id(network.body.weight), id(network.head.weight)}
    assert without["weight_decay"] == 0.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_climbs_then_falls_to_zero(schedule: str) -> None:
    factors = [schedule_factor(step, 100, 0.1, schedule) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0.0 < factors[-1] < 0.02


def test_the_linear_schedule_is_the_one_transformers_uses() -> None:
    from orchestrator.data.torchvision_ops import ensure_torchvision

    ensure_torchvision()
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    for name, factory in (("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = factory(optimizer, 10, 50)
        for step_number in range(10, 50):
            while theirs.last_epoch < step_number:
                optimizer.step()
                theirs.step()
            assert schedule_factor(step_number, 50, 0.2, name) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)


def test_predict_puts_each_row_in_its_place() -> None:
    torch.manual_seed(0)
    network, rows = Tiny(), batch(10).inputs["x"]
    order = np.random.default_rng(0).permutation(10)
    batches = [(part, {"x": rows[part]}) for part in np.array_split(order, 3)]
    with torch.inference_mode():
        expected = network.eval()(rows).softmax(-1).numpy()
    np.testing.assert_allclose(predict(network, batches, 10, CPU), expected, rtol=1e-5)


def test_the_network_trains_again_after_predicting() -> None:
    network = copy.deepcopy(Tiny()).train()
    predict(network, [(np.arange(4), {"x": torch.zeros(4, 6)})], 4, CPU)
    assert network.training


def test_auto_precision_is_bf16_only_where_hardware_has_it() -> None:
    capabilities = torch.cpu.get_capabilities()
    in_hardware = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16")
    assert resolve_precision(Training(), torch.device("cpu")) == ("bf16" if in_hardware else "fp32")
    assert resolve_precision(Training(precision="bf16"), torch.device("cpu")) == "bf16"
    assert resolve_precision(Training(privacy=Privacy()), torch.device("cpu")) == "fp32"


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)).relu())


def test_a_row_alone_uses_the_running_statistics_and_leaves_them_as_they_are() -> None:
    torch.manual_seed(0)
    network = Normed()
    step(network, [batch(8)])
    mean, body = network.norm.running_mean.clone(), network.body.weight.detach().clone()
    step(network, [batch(1)])
    torch.testing.assert_close(network.norm.running_mean, mean, rtol=0, atol=0)
    assert not torch.equal(network.body.weight, body), "and still it learns from the row"
    assert network.norm.training
