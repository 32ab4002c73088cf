"""One trained model for all compressions: each works on a copy of its storage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from compressing import Compressing, recipe_text

from orchestrator.session import Session


@pytest.fixture(scope="session")
def trained(
    reviews_csv: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: Session
) -> Path:
    storage = tmp_path_factory.mktemp("trained") / "runs"
    Compressing(recipe_text(reviews_csv, tiny_backbone, storage, "trials: 1"), ray_session).pipeline.walk("train")
    return storage


@pytest.fixture
def storage(trained: Path, tmp_path: Path) -> Path:
    """With the dataset and the model that the recipes of ``recipe_text`` begin with."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))
