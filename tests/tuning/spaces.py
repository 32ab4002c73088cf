"""Spaces that several tests search."""

from typing import Any

from orchestrator.recipe import Recipe
from orchestrator.recipe_tuning import Dimension
from orchestrator.tuning.space import Space

RECIPE = Recipe.model_validate({"name": "r", "task": "text_classification", "data": {"source": "x.csv"}})
PLAIN = {
    "training.learning_rate": {"log_uniform": [1e-5, 1e-3]},
    "training.warmup_fraction": {"uniform": [0.0, 0.5]},
    "training.label_smoothing": {"quantized": [0.0, 0.4, 0.1]},
    "training.batch_size": [16, 32],
}


def space_of(dimensions: dict[str, Any], recipe: Recipe = RECIPE) -> Space:
    return Space(recipe, {path: Dimension.model_validate(value) for path, value in dimensions.items()})
