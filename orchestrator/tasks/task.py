"""What every task answers, so that no other room has to ask which task it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional

from orchestrator.data.encoder import Encoder
from orchestrator.models.backbones import NETWORKS, Network
from orchestrator.recipe import Model, Recipe


class Task:
    """One kind of problem. Classification's loss and answers live here; inputs and networks in the subclasses."""

    name: ClassVar[str]
    input_kind: ClassVar[Literal["text", "image"]]
    default_backbone: ClassVar[str]
    library: ClassVar[str]
    """Key of ``models.backbones.NETWORKS``."""

    def backbone(self, settings: Model) -> str:
        return settings.backbone or self.default_backbone

    def encoder(self, settings: Model, images: Iterable[bytes]) -> Encoder:
        """The encoder the recipe asks for; ``images`` is a sample of the source's files, for the automatic size."""
        raise TypeError(f"{type(self).__name__} makes no encoder")

    def network(self, settings: Model, labels: tuple[str, ...]) -> Network:
        """Backbone with a fresh head. Raises BackboneError."""
        return NETWORKS[self.library].create(settings, self.backbone(settings), labels)

    def learning_rate(self, recipe: Recipe) -> float:
        """Peak learning rate: the recipe's, else the task's own."""
        raise TypeError(f"{type(self).__name__} names no learning rate")

    def row_losses(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        """Cross-entropy of each row: [batch, classes], [batch] -> [batch]."""
        return functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)

    def answer(self, probabilities: Sequence[float], labels: tuple[str, ...]) -> dict[str, Any]:
        """What a client gets for one input: the most probable label and the probability of each."""
        best = max(range(len(labels)), key=lambda index: probabilities[index])
        return {"label": labels[best], "scores": dict(zip(labels, map(float, probabilities), strict=True))}
