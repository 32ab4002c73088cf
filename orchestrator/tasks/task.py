"""What every task answers, so that no other room has to ask which task it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional

from orchestrator.data.encoder import Encoder
from orchestrator.models.backbones import NETWORKS, Network
from orchestrator.recipe import Model, Recipe

_TINY = 1e-8
"""The focal loss takes no probability for closer to 1: its slope there would be infinite."""


class Task:
    """One kind of problem. Classification's loss and answers live here; inputs and networks in the subclasses."""

    name: ClassVar[str]
    input_kind: ClassVar[Literal["text", "image"]]
    default_backbone: ClassVar[str]
    library: ClassVar[str]
    """Key of ``models.backbones.NETWORKS``."""
    search_space: ClassVar[Mapping[str, Mapping[str, Sequence[float]]]]
    """What is usual to search, as a recipe's ``tuning.space`` has it."""

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

    def row_losses(
        self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0, focal_gamma: float = 0.0
    ) -> torch.Tensor:
        """Cross-entropy of each row: [batch, classes], [batch] -> [batch].

        With ``focal_gamma`` each class's term is scaled by (1 - p) ** focal_gamma, p being its probability.
        """
        if focal_gamma == 0.0:
            return functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        log_p = logits.log_softmax(-1)
        targets = torch.full_like(log_p, label_smoothing / log_p.shape[-1])
        targets.scatter_add_(-1, labels[:, None], torch.full_like(log_p[:, :1], 1.0 - label_smoothing))
        others = (-torch.expm1(log_p)).clamp_min(_TINY)
        return -(targets * others**focal_gamma * log_p).sum(-1)

    def answer(self, probabilities: Sequence[float], labels: tuple[str, ...]) -> dict[str, Any]:
        """What a client gets for one input: the most probable label and the probability of each."""
        best = max(range(len(labels)), key=lambda index: probabilities[index])
        return {"label": labels[best], "scores": dict(zip(labels, map(float, probabilities), strict=True))}
