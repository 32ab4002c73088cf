"""The path with everything in an object store: data, datasets, runs and versions; each stage on a machine of its own."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ports import free_port
from pyarrow import fs

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent.parent
_CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL pattern of a bucket on an S3 server of our own (moto)."""
    for name, value in _CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not answers(f"http://127.0.0.1:{port}/moto-api/"):
            assert server.poll() is None and time.monotonic() < deadline, "moto is not up"
            time.sleep(0.2)
        yield f"s3://bucket/{{}}?endpoint_override=127.0.0.1:{port}&scheme=http&allow_bucket_creation=true"
    finally:
        server.terminate()
        server.wait(10)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10):
            return True
    except OSError:
        return False


def stage(machine: Path, verb: str, recipe: Path) -> dict[str, Any]:
    """A stage on a machine that has never seen what the others wrote: its cache is its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(machine)}
    command = [sys.executable, "-m", "orchestrator.cli", verb, str(recipe), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    record: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return record


def test_everything_lives_in_the_object_store(
    bucket: str, reviews_csv: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    filesystem, path = fs.FileSystem.from_uri(bucket.format("data/reviews.csv"))
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    with filesystem.open_output_stream(path) as stream:
        stream.write(reviews_csv.read_bytes())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: remote\ntask: text_classification\nstorage: '{bucket.format('runs')}'\n"
        f"data: {{source: '{bucket.format('data/reviews.csv')}'}}\n"
        f"model: {{backbone: {tiny_backbone}, max_tokens: 32}}\n"
        "training: {epochs: 2, batch_size: 16, learning_rate: 2.0e-3, workers: 1}\n"
        f"evaluation: {{bootstrap_samples: 100}}\nregistry: {{url: 'sqlite:///{tmp_path}/registry.db'}}\n"
    )
    trained = stage(tmp_path / "one", "train", recipe)
    promoted = stage(tmp_path / "two", "promote", recipe)
    assert promoted["model"] == trained["key"] and promoted["aliases"] == ["champion"]
    assert not list((tmp_path / "two").rglob("checkpoints")), "the second machine did not train"

    stored = filesystem.get_file_info(fs.FileSelector("bucket/runs", recursive=True))
    names = {info.path.removeprefix("bucket/runs/") for info in stored}
    assert {f"{trained['location']}/metrics.jsonl", f"{promoted['location']}/model/model.safetensors"} <= names
    assert any("/tensorboard/events" in name for name in names)
    report = next(name for name in names if name.startswith("evaluate/") and name.endswith("report.html"))
    with filesystem.open_input_stream(f"bucket/runs/{report}") as page:
        assert b"training loss" in page.read(), "the curves came from the other machine's log"
