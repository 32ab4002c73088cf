"""Text classification: a row is a text, the network a transformer with a classification head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from orchestrator.data.encoder import Encoder
from orchestrator.data.text import TextEncoder
from orchestrator.models.backbones import text_backbone_folder
from orchestrator.recipe import Model, Recipe
from orchestrator.tasks.task import Task


class TextClassification(Task):
    name = "text_classification"
    input_kind = "text"
    default_backbone = "sentence-transformers/all-MiniLM-L6-v2"
    library = "transformers"
    search_space: ClassVar = {
        "training.learning_rate": {"log_uniform": (1e-5, 3e-4)}, "training.batch_size": {"choice": (16, 32, 64)},
        "training.layer_decay": {"uniform": (0.7, 1.0)}, "training.weight_decay": {"uniform": (0.0, 0.1)},
        "training.warmup_fraction": {"uniform": (0.0, 0.2)}, "training.label_smoothing": {"uniform": (0.0, 0.2)},
    }  # fmt: skip

    def encoder(self, settings: Model, images: Iterable[bytes]) -> Encoder:
        return TextEncoder.from_backbone(str(text_backbone_folder(self.backbone(settings))), settings.max_tokens)

    def learning_rate(self, recipe: Recipe) -> float:
        return recipe.training.learning_rate or 5e-5
