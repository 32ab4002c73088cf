"""Averaged weights: a second network that follows the one that trains, and is the one validated, kept and saved.

In: the network after each optimiser step. Out: a network with the mean of its weights. The statistics of batch norms are
averaged like weights, and integer buffers copied.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import distributed

from orchestrator.models.backbones import Network
from orchestrator.recipe import Averaging
from orchestrator.training.freezing import load_trained_state, trained_state


class Average:
    def __init__(self, network: Network, settings: Averaging, total_steps: int) -> None:
        """``total_steps``: of the whole run, of which ``settings.start_fraction`` is a share."""
        self.network = copy.deepcopy(network)
        self._settings = settings
        self._first = round(settings.start_fraction * total_steps) if settings.kind == "swa" else 0
        self._counted = 0

    @torch.no_grad()
    def update(self, network: Network, step: int) -> None:
        """Take in the weights after optimiser step number ``step`` (0-based); before the start they are the average."""
        started = step >= self._first
        self._counted += started
        share = self._share() if started else 1.0
        ours, theirs = _tensors(self.network), _tensors(network)
        for name, average in ours.items():
            if average.is_floating_point():
                average.lerp_(theirs[name], share)
            else:
                average.copy_(theirs[name])

    def _share(self) -> float:
        """Weight of the newest network. Of EMA with the start's bias taken out (as Adam does), so the first counts whole."""
        if self._settings.kind == "swa":
            return 1.0 / self._counted
        decay = self._settings.decay
        return (1.0 - decay) / (1.0 - decay**self._counted)

    def agree(self) -> None:
        """Have all workers validate with the first one's batch-norm statistics, which are those that are saved."""
        if distributed.is_initialized():
            for buffer in self.network.buffers():
                distributed.broadcast(buffer, 0)

    def state_dict(self) -> dict[str, Any]:
        return {"network": trained_state(self.network, self.network.state_dict()), "counted": self._counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_trained_state(self.network, state["network"])
        self._counted = state["counted"]


def _tensors(network: Network) -> dict[str, torch.Tensor]:
    """What changes in training: parameters that train, and all buffers."""
    trained = {name: parameter.data for name, parameter in network.named_parameters() if parameter.requires_grad}
    return trained | dict(network.named_buffers())
