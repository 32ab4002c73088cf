"""A Serve config file names a model as the registry knows it."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from orchestrator.errors import IntegrityError, ModelNotFound
from orchestrator.recipe_serving import Serving
from orchestrator.records import EvaluationRecord, VersionRecord
from orchestrator.registry.store import Registry
from orchestrator.serving.scaling import Latency
from orchestrator.serving.served import ModelArguments, from_values, to_values
from orchestrator.storage import EVALUATION, MODEL, Storage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A storage with two versions of reviews, the first of them champion."""
    evaluation = EvaluationRecord(
        name="reviews", key="e", location="", model="m", dataset="d", rows=1, metrics={}, per_class={}, confusion=(),
        latency_ms_p50=8.0, latency_ms_p95=9.0, throughput_per_s=500.0, size_bytes=1, report="", predictions="",
        seconds=1.0,
    )  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "evaluation.json").write_text(evaluation.model_dump_json())
    registry = Registry(Storage(str(tmp_path / "runs")))
    for model in "ab":
        (tmp_path / "model" / "weights").write_text(model)
        draft = VersionRecord(name="reviews", version=0, location="", model=model, dataset="d", evaluation="e",
                              metrics={}, code_version="1", created_at="now", manifest_sha256="")  # fmt: skip
        registry.register(draft, {MODEL: tmp_path / "model", EVALUATION: tmp_path / "evaluation.json"})
    registry.set_alias("reviews", "champion", 1, "first")
    return tmp_path / "runs"


def test_an_alias_or_a_number_becomes_a_version_with_its_measured_latency(root: Path) -> None:
    champion = ModelArguments(name="reviews", storage=str(root)).resolve()
    assert (champion.app, champion.version) == ("model-reviews", 1)
    assert champion.latency == Latency(single_ms=8.0, per_row_ms=2.0)
    assert (root / champion.location / "weights").read_text() == "a"
    assert ModelArguments(name="reviews", storage=str(root), version=2).resolve().version == 2


def test_what_is_not_there_or_not_whole_is_refused(root: Path) -> None:
    with pytest.raises(ModelNotFound, match="challenger"):
        ModelArguments(name="reviews", storage=str(root), alias="challenger").resolve()
    (weights,) = root.glob("registry/models/reviews/1-*/model/weights")
    weights.write_text("c")
    with pytest.raises(IntegrityError, match="weights is not the file"):
        ModelArguments(name="reviews", storage=str(root)).resolve()


def test_a_misspelt_argument_is_refused(root: Path) -> None:
    with pytest.raises(ValidationError, match="max_replica"):
        ModelArguments.model_validate({"name": "reviews", "storage": str(root), "serving": {"max_replica": 2}})


def test_what_is_served_survives_a_config_file(root: Path) -> None:
    settings = {"shared": True, "shelf": {"bytes": 5_000_000}, "tls": {"certificate": "/c", "key": "/k"}}
    served = ModelArguments.model_validate({"name": "reviews", "storage": str(root), "serving": settings}).resolve()
    assert from_values(json.loads(json.dumps(to_values(served)))) == served
    assert served.key == "reviews@1"


@pytest.mark.parametrize(
    "shelf", [{"bytes": 999_999}, {"min_replicas": 0}, {"min_replicas": 3, "max_replicas": 2}, {"byte": 5}]
)
def test_a_shelf_that_cannot_be_is_refused(shelf: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="shelf"):
        Serving.model_validate({"shelf": shelf})
