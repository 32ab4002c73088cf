"""The predictor with small real models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from served_models import LABELS, png, publish_image_model, publish_text_model

from orchestrator.errors import IntegrityError
from orchestrator.serving.predictor import Predictor
from orchestrator.storage import Storage

TEXTS = ["great coffee", "the tea was stale and " * 10, "", "awful", "unknown words only", "🙂"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Predictor:
    storage = Storage(str(tmp_path_factory.mktemp("texts")))
    return Predictor.from_folder(
        storage.path(publish_text_model(storage, "reviews", 1, tiny_backbone)), max_batch_size=2
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    storage = Storage(str(tmp_path_factory.mktemp("images")))
    return Predictor.from_folder(storage.path(publish_image_model(storage, "shapes", 1)), max_batch_size=2)


def probabilities(predictor: Predictor, inputs: list[str] | list[bytes]) -> np.ndarray:
    return np.array([prediction.probabilities for prediction in predictor.predict(inputs)])


def test_probabilities_are_those_of_the_network_in_the_inputs_order(texts: Predictor) -> None:
    alone = np.concatenate([probabilities(texts, [text]) for text in TEXTS])
    assert probabilities(texts, TEXTS) == pytest.approx(alone, abs=1e-6)
    assert alone.sum(axis=1) == pytest.approx(1.0)
    assert len({row.tobytes() for row in alone}) > 2


def test_an_unreadable_image_spoils_no_other(images: Predictor) -> None:
    results = images.predict([png(1), b"not an image", png(2), b"", png(3)])
    assert [result.probabilities is None for result in results] == [False, True, False, True, False]
    assert results[1].error == "is not an image of a known format"
    assert np.array(results[2].probabilities) == pytest.approx(probabilities(images, [png(2)])[0], abs=1e-6)


def test_no_inputs_and_only_unreadable_ones_are_no_problem(images: Predictor) -> None:
    assert images.predict([]) == []
    assert [result.probabilities for result in images.predict([b"x"])] == [None]


def test_an_answer_is_the_tasks_own(texts: Predictor) -> None:
    prediction = texts.predict(["great"])[0]
    answer = texts.answer(prediction)
    assert list(answer["scores"]) == list(LABELS)
    assert answer["scores"][answer["label"]] == max(prediction.probabilities or [])


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_warming_up_takes_an_input_of_the_models_kind(kind: str, request: pytest.FixtureRequest) -> None:
    predictor: Predictor = request.getfixturevalue(kind)
    predictor.warm_up()
    assert predictor.predict([predictor.sample()])[0].error is None


def test_numbers_that_are_not_finite_are_no_answer(tmp_path: Path, tiny_backbone: Path) -> None:
    storage = Storage(str(tmp_path))
    broken = Predictor.from_folder(storage.path(publish_text_model(storage, "reviews", 1, tiny_backbone)))
    for parameter in broken.model.network.parameters():
        parameter.data.fill_(float("nan"))
    assert broken.predict(["great"])[0].error == "makes the model answer a number that is not finite"


def test_a_flipped_bit_in_the_weights_is_refused(tmp_path: Path, tiny_backbone: Path) -> None:
    storage = Storage(str(tmp_path))
    folder = storage.path(publish_text_model(storage, "reviews", 1, tiny_backbone))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        Predictor.from_folder(folder)


def test_images_of_too_many_pixels_are_not_decoded(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    folder = storage.path(publish_image_model(storage, "shapes", 1))
    predictor = Predictor.from_folder(folder, max_pixels=1200)
    fits, larger = predictor.predict([png(1, (40, 30)), png(1, (40, 31))])
    assert fits.error is None and larger.error == "has 40 x 31 pixels, more than 1200"
