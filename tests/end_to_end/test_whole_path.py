"""The commands a user types, on data the project has never seen, to a live endpoint and back."""

import base64
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent.parent


def orchestrator(*arguments: object, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)


def record_of(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr[-3000:]
    record: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return record


def ask(url: str, instances: list[Any]) -> dict[str, Any]:
    body = json.dumps({"instances": instances}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def test_a_table_of_texts_becomes_an_answering_endpoint(reviews_csv: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: unseen\ntask: text_classification\nstorage: {tmp_path}/runs\n"
        f"data: {{source: {reviews_csv}}}\nmodel: {{backbone: {tiny_backbone}, max_tokens: 32}}\n"
        "training: {epochs: 3, batch_size: 8, learning_rate: 2.0e-3, workers: 2}\n"
        f"evaluation: {{slices: [shop], bootstrap_samples: 100}}\nserving: {{port: {free_port()}, precision: fp32}}\n"
    )
    try:
        records = record_of(orchestrator("run", recipe, "--json"))
        assert records["train"]["workers"] == 2
        assert records["evaluate"]["metrics"]["accuracy"]["value"] > 0.85
        assert set(records["evaluate"]["slices"]["shop"]) == {f"shop {i}" for i in range(4)}
        assert records["promote"]["aliases"] == ["champion"]

        answer = ask(records["serve"]["predict_url"], ["a great fresh tasty cup", "stale awful burnt coffee"])
        assert [p["label"] for p in answer["predictions"]] == ["good", "bad"]
        assert_same_as_offline(tmp_path, records, answer)

        again = orchestrator("promote", recipe, "--json")  # without Ray: nothing is left to do
        assert record_of(again)["version"] == records["promote"]["version"]
        assert again.stderr.count("unchanged") == 3
    finally:
        stopped = orchestrator("serve", recipe, "--stop", "--json")
    assert record_of(stopped)["stopped"] is True
    with pytest.raises(urllib.error.URLError):
        ask(records["serve"]["predict_url"], ["anything"])


def assert_same_as_offline(tmp_path: Path, records: dict[str, Any], answer: dict[str, Any]) -> None:
    """The endpoint gives what the saved model gives to anybody who opens its folder."""
    from orchestrator.models.checkpoint import load_model
    from orchestrator.serving.predictor import Predictor

    version = tmp_path / "runs" / records["promote"]["location"] / "model"
    assert load_model(tmp_path / "runs" / records["train"]["model_location"]).labels == ("bad", "good")
    offline = Predictor(load_model(version, verify=False)).predict(
        ["a great fresh tasty cup", "stale awful burnt coffee"]
    )
    for ours, theirs in zip(offline, answer["predictions"], strict=True):
        told = list(theirs["scores"].values())
        assert told == pytest.approx(list(ours.probabilities), abs=1e-6)


def test_a_folder_of_images_becomes_an_answering_endpoint(shapes_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: shapes\ntask: image_classification\nstorage: {tmp_path}/runs\ndata: {{source: {shapes_folder}}}\n"
        "model: {backbone: resnet18, weights: none, image_size: 64}\n"
        "training: {epochs: 3, batch_size: 16, workers: 1, augmentation: {horizontal_flip: 0.5}}\n"
        f"evaluation: {{bootstrap_samples: 100}}\nserving: {{port: {free_port()}, precision: fp32}}\n"
    )
    try:
        records = record_of(orchestrator("run", recipe, "--json"))
        assert records["prepare"]["cleaning"]["unreadable"] == 1
        assert records["evaluate"]["metrics"]["accuracy"]["value"] > 0.8
        image = base64.b64encode((shapes_folder / "vertical" / "000.png").read_bytes()).decode()
        answer = ask(records["serve"]["predict_url"], [{"b64": image}])
        assert set(answer["predictions"][0]["scores"]) == {"horizontal", "vertical"}
    finally:
        orchestrator("serve", recipe, "--stop")
