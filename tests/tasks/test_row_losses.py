"""The loss of each row against the formula written out."""

import math

import pytest
import torch

from orchestrator.tasks import TASKS

TASK = TASKS["text_classification"]
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3], [-3.0, 4.0, 0.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2, 0])


def by_hand(logits: list[float], label: int, smoothing: float, gamma: float) -> float:
    total = sum(math.exp(value) for value in logits)
    loss = 0.0
    for index, value in enumerate(logits):
        p = math.exp(value) / total
        target = smoothing / len(logits) + (1 - smoothing if index == label else 0.0)
        loss -= target * (1 - p) ** gamma * math.log(p)
    return loss


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_loss_is_the_formula(gamma: float, smoothing: float) -> None:
    found = TASK.row_losses(LOGITS, LABELS, smoothing, gamma)
    expected = [by_hand(row, int(label), smoothing, gamma) for row, label in zip(LOGITS.tolist(), LABELS, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_gamma_near_zero_is_near_cross_entropy() -> None:
    near, exact = (TASK.row_losses(LOGITS, LABELS, 0.1, gamma) for gamma in (1e-6, 0.0))
    torch.testing.assert_close(near, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_gradients_stay_numbers_where_a_row_is_answered_for_certain(gamma: float) -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    TASK.row_losses(logits, torch.tensor([0, 0]), 0.0, gamma).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert logits.grad[1].abs().max() > 0.5, "the row that is wrong still teaches"
