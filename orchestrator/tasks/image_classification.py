"""Image classification: a row is an image, the network a torchvision architecture with a fresh head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from orchestrator.data.encoder import Encoder
from orchestrator.data.images import ImageEncoder, median_short_side
from orchestrator.recipe import Model, Recipe
from orchestrator.tasks.task import Task

# Channel means and deviations of ImageNet, which torchvision's pretrained weights were trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageClassification(Task):
    name = "image_classification"
    input_kind = "image"
    default_backbone = "resnet50"
    library = "torchvision"
    search_space: ClassVar = {
        "training.learning_rate": {"log_uniform": (1e-4, 3e-3)}, "training.batch_size": {"choice": (16, 32, 64)},
        "training.weight_decay": {"uniform": (0.0, 0.1)}, "training.label_smoothing": {"uniform": (0.0, 0.2)},
        "training.augmentation.crop_scale": {"uniform": (0.6, 1.0)},
    }  # fmt: skip

    def encoder(self, settings: Model, images: Iterable[bytes]) -> Encoder:
        size = settings.image_size or automatic_size(median_short_side(images))
        return ImageEncoder(size, _MEAN, _STD)

    def learning_rate(self, recipe: Recipe) -> float:
        default = 1e-3 if recipe.model.weights == "none" else 3e-4
        return recipe.training.learning_rate or default


def automatic_size(short_side: float) -> int:
    """Rounded up to a multiple of 32 within 64 and 224 pixels: small images are not blown up to ImageNet's size."""
    return min(224, max(64, -(-int(short_side) // 32) * 32))
