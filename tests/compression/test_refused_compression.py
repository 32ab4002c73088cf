"""A compression that cannot be is refused before the data is read."""

from pathlib import Path

import pytest
from compressing import Compressing, recipe_text

from orchestrator.errors import RecipeError


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ("{compression.layer: [0.5]}", "is not a recipe field"),
        ("{training.epochs: [1, 2]}", "cannot be searched: candidates differ in"),
        ("{compression.layers: [0.5, 2.0]}", r"compression\.layers: 2\.0 cannot be"),
    ],
)
def test_a_space_that_does_not_fit_is_refused(space: str, told: str, tiny_backbone: Path, tmp_path: Path) -> None:
    text = recipe_text(tmp_path / "there is none.csv", tiny_backbone, tmp_path, f"trials: 1, space: {space}")
    with pytest.raises(RecipeError, match=told):
        Compressing(text, None).compress()
