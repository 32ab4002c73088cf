"""Versions of different recipes joined by one command: a version like any other, that answers as its members do together."""

from __future__ import annotations

import base64
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.ensemble import EnsembleStage
from orchestrator.errors import UserError
from orchestrator.evaluation.predictions import read_samples
from orchestrator.models.checkpoint import load_model
from orchestrator.pipeline import Pipeline
from orchestrator.present import describe
from orchestrator.progress import Event
from orchestrator.recipe_file import parse_recipe
from orchestrator.serving.predictor import Predictor
from orchestrator.session import Session
from orchestrator.storage import SAMPLES

pytestmark = pytest.mark.ray
TEXTS = ["a great fresh tasty cup", "stale awful burnt coffee", "the box was in the bag and it was lovely tea"]


class Walk:
    """A pipeline on the tests' Ray, and what it said."""

    def __init__(self, text: str, session: Session | None) -> None:
        self.events: list[Event] = []
        self.pipeline = Pipeline(parse_recipe(text), report=self.events.append)
        if session is not None:
            self.pipeline.__dict__["session"] = session

    def answers(self, version: int, inputs: list[Any]) -> np.ndarray:
        record = self.pipeline.registry.get(self.pipeline.recipe.name, version)
        predictor = Predictor(load_model(self.pipeline.registry.open(record) / "model"))
        return np.array([prediction.probabilities for prediction in predictor.predict(inputs)])

    @property
    def said(self) -> list[str]:
        return [event.message for event in self.events if event.message]


class Killed(BaseException):
    pass


def killed(*_: object) -> None:
    raise Killed


def texts_recipe(csv: Path, backbone: Path, root: Path, max_tokens: int, more: str = "") -> str:
    return (
        f"name: r\ntask: text_classification\nstorage: {root}/runs\ndata: {{source: {csv}}}\n"
        f"model: {{backbone: {backbone}, max_tokens: {max_tokens}}}\nevaluation: {{bootstrap_samples: 100}}\n"
        f"training: {{epochs: 3, batch_size: 16, learning_rate: 2.0e-3, precision: fp32, workers: 1}}\n{more}"
    )


@pytest.fixture(scope="module")
def promoted(
    reviews_csv: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: Session
) -> Path:
    """A folder with two versions of different recipes; each test works on a copy."""
    folder = tmp_path_factory.mktemp("promoted")
    for max_tokens in (8, 32):
        Walk(texts_recipe(reviews_csv, tiny_backbone, folder, max_tokens), ray_session).pipeline.walk("promote")
    return folder


@pytest.fixture
def folder(promoted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(promoted, tmp_path / "copy"))


def test_two_versions_become_a_third_that_answers_as_both_together(
    reviews_csv: Path, tiny_backbone: Path, folder: Path, ray_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = texts_recipe(reviews_csv, tiny_backbone, folder, 32)
    for place in ((EnsembleStage, "_record"), (Pipeline, "evaluate"), (Pipeline, "promote")):
        with monkeypatch.context() as broken, pytest.raises(Killed):
            broken.setattr(*place, killed)
            Walk(text, ray_session).pipeline.join_versions("1,2", "mean", "fitted")
    walk = Walk(text, ray_session)
    done = walk.pipeline.join_versions("2, 1", "mean", "fitted")
    assert not any(line.startswith("asking") for line in walk.said), (
        "what was done before the last kill is not done again"
    )

    record, promoted = done["ensemble"], done["promote"]
    version = walk.pipeline.registry.get("r", promoted["version"])
    assert (version.version, version.parents) == (3, (1, 2))
    weights = [member["weight"] for member in record["model"]["mixture"]["members"]]
    together = np.average([walk.answers(number, TEXTS) for number in (1, 2)], axis=0, weights=weights)
    assert walk.answers(3, TEXTS) == pytest.approx(together, abs=1e-5)
    assert np.abs(walk.answers(1, TEXTS) - walk.answers(2, TEXTS)).max() > 1e-3, "the members differ"
    losses = [member["validation"]["loss"] for member in record["model"]["mixture"]["members"]]
    assert record["model"]["mixture"]["validation"]["loss"] <= min(losses) + 1e-5, "so far the weights were fitted"
    opened = walk.pipeline.registry.open(version)
    card = load_model(opened / "model").card
    assert [member["version"] for member in card["ensemble"]["members"]] == [1, 2]
    page = (opened / "report.html").read_text()
    assert "ensemble of versions 1, 2" in page and "<h2>Ensemble</h2>" in page and "<h2>Training</h2>" not in page
    known = read_samples(opened / SAMPLES)
    answered = walk.answers(3, [row["input"] for row in known])
    assert answered == pytest.approx(np.array([list(row["scores"].values()) for row in known]), abs=1e-5)
    printed = describe(done)
    assert f"version 1  weight {weights[0]:.3f}, validation" in printed and "its best member, version" in printed
    assert not any("asking version" in line and "again" in line for line in walk.said), "the data are the same"

    again = Walk(text, None)  # without Ray: nothing is left to do
    assert again.pipeline.join_versions("1,2", "mean", "fitted")["ensemble"] == record
    assert [v.version for v in again.pipeline.registry.versions("r")] == [1, 2, 3]

    with pytest.raises(
        UserError, match=r"version 3 is an ensemble of versions, which cannot be compressed: compress its"
    ):
        Walk(text + "compression: {trials: 1}\n", None).pipeline.compress_version(3)
    with pytest.raises(UserError, match=r"version 3 is an ensemble itself: name its members: 1,2"):
        again.pipeline.join_versions("1,3", "mean", "equal")


def test_an_ensemble_that_is_champion_defends_itself_in_its_own_encoding(
    reviews_csv: Path, tiny_backbone: Path, folder: Path, tmp_path: Path, ray_session: Session
) -> None:
    texts = [texts_recipe(reviews_csv, tiny_backbone, folder, max_tokens) for max_tokens in (8, 32)]
    joining = Walk(texts[0], ray_session).pipeline
    joining.join_versions("1,2", "vote", "0.3,0.7")
    joining.registry.set_alias("r", "champion", 3, "by hand")
    walk = Walk(texts[0].replace("epochs: 3", "epochs: 1"), ray_session)
    challenger = walk.pipeline.walk("promote").model_dump()
    told = challenger.get("reason", "") + challenger.get("decision", "")
    assert " against " in told and "other rows" not in told
    assert not any("the data has changed" in line for line in walk.said)

    fewer = tmp_path / "fewer.csv"
    fewer.write_text("".join(reviews_csv.read_text().splitlines(keepends=True)[:300]))
    later = Walk(texts[1].replace(str(reviews_csv), str(fewer)), ray_session)
    challenger = later.pipeline.walk("promote").model_dump()
    assert "the data has changed: asking version 3 again" in later.said
    assert " against " in challenger.get("reason", "") + challenger.get("decision", "")


@pytest.mark.slow
def test_image_versions_of_different_sizes_are_joined(
    shapes_folder: Path, tmp_path: Path, ray_session: Session
) -> None:
    """How each gets its size: tests/models/test_mixture.py."""
    for size in (32, 64):
        recipe = (
            f"name: shapes\ntask: image_classification\nstorage: {tmp_path}/runs\ndata: {{source: {shapes_folder}}}\n"
            f"model: {{backbone: resnet18, weights: none, image_size: {size}}}\nevaluation: {{bootstrap_samples: 100}}\n"
            "training: {epochs: 1, batch_size: 16, workers: 1, precision: fp32}\n"
        )
        Walk(recipe, ray_session).pipeline.walk("promote")
    walk = Walk(recipe, ray_session)
    walk.pipeline.join_versions("1,2", "mean", "equal")
    image = [(shapes_folder / "vertical" / "000.png").read_bytes()]
    together = np.mean([walk.answers(number, image) for number in (1, 2)], axis=0)
    assert walk.answers(3, image) == pytest.approx(together, abs=1e-4)

    known = read_samples(walk.pipeline.registry.open(walk.pipeline.registry.get("shapes", 3)) / SAMPLES)
    answered = walk.answers(3, [base64.b64decode(row["input"]["b64"]) for row in known])
    assert answered == pytest.approx(np.array([list(row["scores"].values()) for row in known]), abs=1e-4)
