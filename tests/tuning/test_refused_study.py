"""A study that cannot be is refused before its first trial."""

from pathlib import Path

import pytest
from studying import Studying, recipe_text

from orchestrator.errors import RecipeError, ResourceError
from orchestrator.session import Resources, Session


@pytest.mark.parametrize(
    ("tuning", "training", "told"),
    [
        (
            "concurrency: 512",
            "",
            r"concurrency is 512, which needs 512 .PUs for 1 worker per trial, but the cluster has",
        ),
        ("trials: 2", "workers: 512", "training.workers is 512, but the cluster has"),
        ("trials: 2", "device: cuda", "training.device is cuda, but the cluster has no GPU"),
    ],
)
def test_what_can_never_fit_is_refused_at_once(
    reviews_csv: Path, tiny_backbone: Path, tmp_path: Path, tuning: str, training: str, told: str
) -> None:
    here = Session("", Resources(1, 2.0, 0.0, 2.0, 2.0), tmp_path, is_private=True)
    study = Studying(recipe_text(reviews_csv, tiny_backbone, tmp_path, tuning, training), here)
    study.dataset()
    with pytest.raises(ResourceError, match=told):
        study.tune()
    assert study.trials() == []


@pytest.mark.parametrize(
    ("tuning", "space", "told"),
    [
        ("trials: 2", "training.learning_rat: [1]", "not a recipe field: did you mean training.learning_rate"),
        ("trials: 2", "training.label_smoothing: {uniform: [0.5, 1.5]}", "1.5 cannot be"),
        ("trials: 2", "data.max_rows: [100, 200]", "cannot be searched"),
        ("trials: 2, start: [{training.batch_size: 7}]", "training.batch_size: [8, 16]", "start, point 1.*outside of"),
        ("sampler: grid", "training.label_smoothing: {uniform: [0, 0.5]}", "no end of values"),
    ],
)
def test_a_space_that_does_not_fit_is_refused_before_the_data_is_read(
    tiny_backbone: Path, tmp_path: Path, tuning: str, space: str, told: str
) -> None:
    text = recipe_text(tmp_path / "there is none.csv", tiny_backbone, tmp_path, tuning, "", space)
    with pytest.raises(RecipeError, match=told):
        Studying(text, None).tune()
