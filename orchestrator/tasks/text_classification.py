"""Text classification: a row is a text, the network a transformer with a classification head."""

from __future__ import annotations

from collections.abc import Iterable

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

    def encoder(self, settings: Model, images: Iterable[bytes]) -> Encoder:
        return TextEncoder.from_backbone(str(text_backbone_folder(self.backbone(settings))), settings.max_tokens)

    def learning_rate(self, recipe: Recipe) -> float:
        return recipe.training.learning_rate or 5e-5
