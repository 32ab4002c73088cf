"""What a served model multiplies in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from served_models import png, publish_image_model, publish_text_model

from orchestrator.models.checkpoint import SavedModel
from orchestrator.recipe_serving import Serving
from orchestrator.serving import runtime
from orchestrator.serving.predictor import Predictor
from orchestrator.serving.runtime import settled
from orchestrator.storage import Storage, version_location

TEXTS = ["rich and smooth", "stale", "a longer text about coffee that we bought"]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Predictor:
    storage = Storage(str(tmp_path_factory.mktemp("precision")))
    publish_text_model(storage, "reviews", 1, tiny_backbone)
    return Predictor.from_folder(storage.path(version_location("reviews", 1)))


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on hardware that multiplies bf16 much faster."""
    monkeypatch.setattr(runtime, "has_bf16", lambda device: True)
    monkeypatch.setattr(runtime, "_fastest", lambda predictors, inputs: predictors[-1])


def probabilities(predictor: Predictor, inputs: list[str | bytes]) -> np.ndarray:
    return np.array([prediction.probabilities for prediction in predictor.predict(inputs)])


def test_fp32_stays_what_was_loaded(predictor: Predictor, faster: None) -> None:
    assert settled(predictor, Serving(precision="fp32"), TEXTS) is predictor


def test_bf16_is_a_copy_that_answers_nearly_the_same(predictor: Predictor, faster: None) -> None:
    exact = probabilities(predictor, list(TEXTS))
    chosen = settled(predictor, Serving(precision="auto"), TEXTS)
    assert chosen.model.precision == "bf16"
    assert {p.dtype for p in chosen.model.network.parameters()} == {torch.bfloat16}
    got = probabilities(chosen, list(TEXTS))
    assert 0 < np.abs(got - exact).max() < 0.01
    assert np.array_equal(probabilities(predictor, list(TEXTS)), exact), "the one that was loaded is as it was"


def test_images_go_as_well(tmp_path: Path, faster: None) -> None:
    storage = Storage(str(tmp_path))
    publish_image_model(storage, "shapes", 1)
    exact = Predictor.from_folder(storage.path(version_location("shapes", 1)))
    pictures: list[str | bytes] = [png(seed) for seed in range(3)]
    chosen = settled(exact, Serving(precision="bf16"), [])
    np.testing.assert_allclose(probabilities(chosen, pictures), probabilities(exact, pictures), atol=0.05)


def test_auto_keeps_fp32_where_bf16_is_emulated(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_bf16", lambda device: False)
    assert settled(predictor, Serving(precision="auto"), TEXTS) is predictor


def test_auto_keeps_fp32_where_an_answer_would_change(
    predictor: Predictor, faster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inexact = SavedModel.in_bf16

    def worse(model: SavedModel) -> SavedModel:
        copy = inexact(model)
        with torch.no_grad():
            next(p for name, p in copy.network.named_parameters() if name.endswith("classifier.bias")).add_(
                torch.tensor([3.0] + [0.0] * (len(model.labels) - 1))
            )
        return copy

    monkeypatch.setattr(SavedModel, "in_bf16", worse)
    assert settled(predictor, Serving(precision="auto"), TEXTS) is predictor
    assert settled(predictor, Serving(precision="bf16"), TEXTS) is not predictor, "who names it gets it"


def test_auto_keeps_fp32_where_bf16_is_no_faster(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "has_bf16", lambda device: True)
    monkeypatch.setattr(runtime, "_WORTH_IT", 1e9)
    assert settled(predictor, Serving(precision="auto"), TEXTS) is predictor
