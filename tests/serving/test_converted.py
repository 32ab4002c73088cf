"""A model that torch was trained with, computed by OpenVINO while it is served."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from served_models import publish_image_model, publish_text_model

from orchestrator.errors import CompressionFailed
from orchestrator.exporting.forms import Form
from orchestrator.models.hardware import has_bf16
from orchestrator.models.runtimes import OpenVinoNetwork, is_installed
from orchestrator.recipe_serving import Serving
from orchestrator.serving import converted as conversion
from orchestrator.serving import runtime
from orchestrator.serving.contract import ExplainRequest
from orchestrator.serving.converted import converted
from orchestrator.serving.loaded import LoadedModel
from orchestrator.serving.predictor import Predictor
from orchestrator.serving.runtime import settled
from orchestrator.serving.scaling import Latency
from orchestrator.serving.served import Served
from orchestrator.storage import Storage, version_location

pytestmark = pytest.mark.skipif(not is_installed("openvino"), reason="takes the extra openvino")
TEXTS = ["rich and smooth", "stale", "a longer text about coffee that we bought last year " * 5]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Storage:
    storage = Storage(str(tmp_path_factory.mktemp("converted")))
    publish_text_model(storage, "reviews", 1, tiny_backbone)
    publish_image_model(storage, "shapes", 1)
    return storage


@pytest.fixture
def folder(storage: Storage) -> Path:
    return storage.path(version_location("reviews", 1))


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(module_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of all tests here which do not break it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(module_cache))
    return module_cache


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "orchestrator" / "converted"


@pytest.fixture
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a network that is large enough, and always faster so."""
    monkeypatch.setattr(runtime, "_SLOW_S", 0.0)
    monkeypatch.setattr(runtime, "_fastest", lambda predictors, inputs: predictors[-1])


def probabilities(predictor: Predictor, inputs: Sequence[str | bytes]) -> np.ndarray:
    return np.array([prediction.probabilities for prediction in predictor.predict(inputs)])


def never(*_: Any) -> None:
    raise AssertionError("it is converted again")


def test_it_answers_alike_and_is_converted_once(folder: Path, cache: Path, worth_it: None, monkeypatch: Any) -> None:
    saved = Predictor.from_folder(folder)
    chosen = settled(saved, Serving(precision="fp32"), TEXTS, folder)
    assert isinstance(chosen.model.network, OpenVinoNetwork)
    assert chosen.model.precision == "fp32"
    np.testing.assert_allclose(probabilities(chosen, TEXTS), probabilities(saved, TEXTS), atol=1e-4)
    monkeypatch.setattr(Form, "write", never)
    again = settled(saved, Serving(precision="fp32"), TEXTS, folder)
    assert isinstance(again.model.network, OpenVinoNetwork)


def test_images_go_as_well(storage: Storage, cache: Path, worth_it: None) -> None:
    place = storage.path(version_location("shapes", 1))
    saved = Predictor.from_folder(place)
    chosen = settled(saved, Serving(precision="fp32"), [], place)
    assert isinstance(chosen.model.network, OpenVinoNetwork)
    np.testing.assert_allclose(
        probabilities(chosen, [saved.sample()]), probabilities(saved, [saved.sample()]), atol=1e-4
    )


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="this processor has no bf16")
def test_it_computes_in_bf16_where_the_processor_does(folder: Path, cache: Path, worth_it: None) -> None:
    chosen = settled(Predictor.from_folder(folder), Serving(), TEXTS, folder)
    assert isinstance(chosen.model.network, OpenVinoNetwork)
    assert chosen.model.precision == "bf16"


def test_a_network_that_cannot_be_converted_is_tried_once(
    folder: Path, own_cache: Path, worth_it: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*_: Any) -> None:
        raise CompressionFailed("it has a part that nobody knows", "choose another form")

    saved = Predictor.from_folder(folder)
    monkeypatch.setattr(Form, "write", refuses)
    with caplog.at_level("WARNING"):
        assert settled(saved, Serving(precision="fp32"), TEXTS, folder) is saved
    assert "torch computes this model: it has a part that nobody knows" in caplog.text
    monkeypatch.setattr(Form, "write", never)
    assert settled(saved, Serving(precision="fp32"), TEXTS, folder) is saved


def test_a_full_disk_is_no_reason_not_to_answer(
    folder: Path, own_cache: Path, worth_it: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    saved = Predictor.from_folder(folder)
    with monkeypatch.context() as broken:
        broken.setattr(Form, "write", full)
        assert settled(saved, Serving(precision="fp32"), TEXTS, folder) is saved
    assert not list(own_cache.iterdir()), "it is tried again another time"


def test_what_was_kept_and_is_broken_is_made_anew(folder: Path, own_cache: Path, worth_it: None) -> None:
    saved = Predictor.from_folder(folder)
    settled(saved, Serving(precision="fp32"), TEXTS, folder)
    (kept,) = own_cache.iterdir()
    (kept / "model.xml").write_text("<net", encoding="utf-8")
    assert settled(saved, Serving(precision="fp32"), TEXTS, folder) is saved
    assert not kept.exists()
    assert isinstance(settled(saved, Serving(precision="fp32"), TEXTS, folder).model.network, OpenVinoNetwork)


def test_what_answers_otherwise_is_not_used(
    folder: Path, cache: Path, worth_it: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turned(*asked: Any) -> Any:
        other = converted(*asked)
        assert other is not None
        inner = other.network.forward
        other.network.forward = lambda **inputs: -inner(**inputs)  # type: ignore[method-assign]
        return other

    monkeypatch.setattr(runtime, "converted", turned)
    saved = Predictor.from_folder(folder)
    assert settled(saved, Serving(precision="fp32"), TEXTS, folder) is saved


def test_it_is_not_converted_where_nothing_is_gained(
    folder: Path, cache: Path, worth_it: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Predictor.from_folder(folder)
    monkeypatch.setattr(Form, "write", never)
    assert settled(saved, Serving(precision="fp32", runtime="torch"), TEXTS, folder) is saved
    assert settled(saved, Serving(precision="fp32"), TEXTS) is saved, "on the shelf"
    assert converted(replace(saved.model, device=torch.device("cuda")), folder, "fp32", TEXTS) is None
    with monkeypatch.context() as large:
        large.setattr(conversion, "_LARGEST_PARAMETERS", 10)
        assert converted(saved.model, folder, "fp32", TEXTS) is None
    monkeypatch.setattr(runtime, "_SLOW_S", 60.0)
    assert settled(saved, Serving(precision="fp32"), TEXTS, folder) is saved, "it is fast enough"


def test_torch_still_explains_it(storage: Storage, cache: Path, worth_it: None) -> None:
    location = version_location("reviews", 1)
    model = LoadedModel(Served("reviews", 1, storage.url, location, Serving(precision="fp32"), Latency(5.0, 5.0)))
    assert isinstance(model.predictor.model.network, OpenVinoNetwork)
    explained = asyncio.run(model.explain(TEXTS[0], ExplainRequest(instance=TEXTS[0])))
    assert explained.refused is None
    assert explained.explanation["method"] == "integrated_gradients"
