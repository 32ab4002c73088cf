"""Mixup is planned for the whole batch, and its loss is the formula's."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from orchestrator.training.loop import MicroBatch, _weighted_loss
from orchestrator.training.mixup import blend, plan_mixup

BATCH = np.array([5, 3, 11, 7, 2])


def test_partners_are_the_batch_in_another_order_drawn_anew_at_each_step() -> None:
    plans = [plan_mixup(BATCH, 0.4, 17, step) for step in range(20)]
    assert all(sorted(partners) == sorted(BATCH) for partners, _ in plans)
    assert len({tuple(partners) for partners, _ in plans}) > 10
    assert len({share for _, share in plans}) == 20
    again = plan_mixup(BATCH, 0.4, 17, 3)
    assert again[0].tolist() == plans[3][0].tolist() and again[1] == plans[3][1]


def test_the_share_is_drawn_from_the_symmetric_beta() -> None:
    shares = np.array([plan_mixup(BATCH, 0.5, 1, step)[1] for step in range(4000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.5 + 1)), rel=0.05)


def test_without_alpha_nothing_is_drawn() -> None:
    partners, share = plan_mixup(BATCH, 0.0, 17, 3)
    assert partners is BATCH and share == 1.0


def test_the_loss_is_that_of_the_blended_pixels_against_both_labels() -> None:
    network = torch.nn.Linear(4, 3)
    network.forward = lambda pixels: functional.linear(pixels, network.weight, network.bias)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 4, generator=generator), torch.tensor([0, 1, 2, 0, 1])
    other, weights = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([1.0, 2.0, 1.0, 0.5, 1.0])
    blended = blend(
        MicroBatch({"pixels": x}, y, weights), MicroBatch({"pixels": x[other]}, y[other], weights[other]), 0.3
    )
    found = _weighted_loss(network, blended, lambda a, b: functional.cross_entropy(a, b, reduction="none"))
    logits = network(0.3 * x + 0.7 * x[other])
    expected = sum(
        0.3 * weights[i] * functional.cross_entropy(logits[i], y[i])
        + 0.7 * weights[other[i]] * functional.cross_entropy(logits[i], y[other[i]])
        for i in range(5)
    )
    torch.testing.assert_close(found, expected)
