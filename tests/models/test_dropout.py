"""Dropout keeps the mean, drops the asked share, and its gradient goes where its values went."""

import pytest
import torch

from orchestrator.models.dropout import draw_kept, dropout


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1_000_003,), (1000, 1001)], ids=str)
def test_the_asked_share_is_dropped_and_the_rest_scaled(probability: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dropped = dropout(torch.ones(shape), probability, training=True)
    share = (dropped == 0).double().mean().item()
    assert share == pytest.approx(probability, abs=5 * (probability * (1 - probability) / 1e6) ** 0.5 + 1e-5)
    kept = dropped[dropped != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - probability)), rtol=1e-3, atol=0.0)


def test_neighbours_are_dropped_independently() -> None:
    """Eight values come from one random word."""
    torch.manual_seed(0)
    mask = (dropout(torch.ones(400_000), 0.3, training=True) == 0).double().view(-1, 8)
    correlation = torch.corrcoef(mask.T)
    assert (correlation - torch.eye(8, dtype=torch.float64)).abs().max() < 0.02


def test_the_gradient_is_that_of_the_same_mask() -> None:
    torch.manual_seed(0)
    values = torch.ones(7, 13, requires_grad=True)
    dropped = dropout(values, 0.5, training=True)
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped.detach())


def test_nothing_happens_in_evaluation_or_without_probability() -> None:
    values = torch.ones(5)
    assert dropout(values, 0.5, training=False) is values
    assert dropout(values, 0.0, training=True) is values


def test_almost_everything_can_be_dropped() -> None:
    torch.manual_seed(0)
    assert dropout(torch.ones(1000), 0.999_999, training=True).isfinite().all()


def test_half_precision_stays_half_precision() -> None:
    assert dropout(torch.ones(64, dtype=torch.bfloat16), 0.5, training=True).dtype == torch.bfloat16


def test_a_share_between_two_steps_of_a_byte_is_met() -> None:
    """0.3 is 76.8 of 256: blocks are compared with 76 or 77."""
    torch.manual_seed(0)
    kept, gain = draw_kept(torch.Size((4096, 256)), 0.3)
    shares = 1 - kept.double().mean(1)
    assert shares.mean().item() == pytest.approx(0.3, abs=2e-3) and gain == pytest.approx(1 / 0.7)
    assert kept.dtype is torch.int8 and set(kept.unique().tolist()) == {0, 1}


def test_the_seed_is_torchs_generators() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (draw_kept(torch.Size((300,)), 0.5)[0] for _ in range(2))
    torch.set_rng_state(state)
    assert torch.equal(draw_kept(torch.Size((300,)), 0.5)[0], first) and not torch.equal(first, second)
