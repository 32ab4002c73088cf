"""Adversarial training by the fast gradient method (Miyato et al. 2017).

In: a network whose rows can be moved (word embeddings, pixels). Out: for each micro-batch two passes, whose gradients add
up: the rows as they are, and the rows moved to where their own loss grows fastest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from orchestrator.models.backbones import Network
from orchestrator.models.recomputing import statistics_kept


@dataclass(frozen=True)
class FastGradient:
    network: Network
    epsilon: float
    """Length (L2) of each row's move, over all its tokens or pixels."""

    def passes(self) -> Iterator[bool]:
        """Within each turn one forward and backward pass has to be made; gives whether it is the last one.

        Batch norms learn statistics from the rows as they are alone.
        """
        probe = torch.zeros(())

        def watch(rows: torch.Tensor) -> torch.Tensor:
            nonlocal probe
            probe = torch.zeros_like(rows, requires_grad=True)
            return rows + probe

        with self.network.moving(watch):
            yield False
        assert probe.grad is not None
        move = steepest(probe.grad, self.epsilon)
        with self.network.moving(lambda rows: rows + move), statistics_kept(self.network):
            yield True


def steepest(gradients: torch.Tensor, length: float) -> torch.Tensor:
    """Each row's gradient, scaled to this L2 norm; zero stays zero. A row's weight in the loss thus does not matter."""
    flat = gradients.flatten(1)
    flat = flat / _nonzero(flat.abs().amax(1, keepdim=True))  # squares of small numbers would vanish
    return (length * flat / _nonzero(flat.norm(dim=1, keepdim=True))).view_as(gradients)


def _nonzero(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values > 0, values, 1.0)
