"""The path over two Ray nodes. The second one does not see the first one's folders, as on another machine: what they share
is the storage, the data and the installed project."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from own_cluster import BIN, OwnCluster, own_cluster

from orchestrator.storage import METRICS
from orchestrator.training.metrics_log import read_metrics


def can_hide_folders() -> bool:
    trial = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    return sys.platform == "linux" and subprocess.run(trial, capture_output=True).returncode == 0


LONG_STEPS = 600
"""A run that no machine finishes in the second that a node takes to die."""

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(not can_hide_folders(), reason="hiding folders from a node needs root on Linux"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[OwnCluster]:
    with own_cluster() as cluster:
        (cluster.root / "tmp").mkdir()
        cluster.environment["TMPDIR"] = str(cluster.root / "tmp")
        cluster.start_head(cpus=1)
        cluster.start_worker_elsewhere(cpus=1)
        yield cluster


def folder_seen_by(process: subprocess.Popen[str], folder: Path) -> set[str]:
    """Names in a folder as this process finds it."""
    return {path.name for path in Path(f"/proc/{process.pid}/root{folder}").iterdir()}


def wait_until(condition: Any, what: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, reviews_csv: Path, tiny_backbone: Path) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    (folder / "recipe.yaml").write_text(
        f"name: spread\ntask: text_classification\nstorage: {folder}/runs\ndata: {{source: {reviews_csv}}}\n"
        f"model: {{backbone: {tiny_backbone}, max_tokens: 32}}\n"
        "training: {epochs: 6, batch_size: 8, learning_rate: 2.0e-3, workers: 2}\n"
        "evaluation: {bootstrap_samples: 100}\n"
    )
    return folder / "recipe.yaml"


def test_both_nodes_train_and_evaluate_one_model(cluster: OwnCluster, recipe: Path) -> None:
    walked = cluster.run(BIN / "orchestrator", "promote", recipe, "--address", cluster.address, "--json",
                         cwd=recipe.parent)  # fmt: skip
    assert walked.returncode == 0, walked.stderr[-4000:]
    first, second = cluster.nodes
    assert {"token", "ray", "tmp"} <= folder_seen_by(first, cluster.root)
    assert folder_seen_by(second, cluster.root) == {"ray", "tmp"}
    version = json.loads(walked.stdout.splitlines()[-1])
    assert version["aliases"] == ["champion"] and version["metrics"]["accuracy"] > 0.85
    model = json.loads(next((recipe.parent / "runs" / "train").glob("*/record.json")).read_text())
    assert (model["workers"], model["resumed"]) == (2, 0)

    nodes = set(cluster.alive_nodes().values())
    trained = [actor for actor in cluster.state_of("actors") if actor["class_name"] == "RayTrainWorker"]
    assert len(trained) == 2 and {actor["node_id"] for actor in trained} == nodes
    asked = [task for task in cluster.state_of("tasks") if task["func_or_class_name"] == "_predict_share"]
    assert len(asked) == 2 and {task["node_id"] for task in asked} == nodes


@pytest.mark.slow
def test_a_relative_storage_is_refused_where_the_other_node_could_not_see_it(cluster: OwnCluster, recipe: Path) -> None:
    """The rule itself: tests/test_session.py."""
    submitted = cluster.run(BIN / "orchestrator", "submit", "train", recipe, "--storage", "results", "--address",
                            cluster.dashboard, cwd=recipe.parent)  # fmt: skip
    assert submitted.returncode == 2, submitted.stderr[-4000:]
    assert "storage 'results' is relative and would lie on the head node alone" in submitted.stderr


def test_an_elastic_run_goes_on_with_the_workers_that_are_left_when_a_node_dies(
    cluster: OwnCluster, recipe: Path
) -> None:
    """The last test of this file: the second node does not come back."""
    command = [BIN / "orchestrator", "train", recipe, "--address", cluster.address, "--json", "--set", "seed=3",
               "--set", "training.workers={min: 1, max: 4}", "--set", "training.checkpoint_every_steps=10",
               "--set", f"training.epochs={LONG_STEPS // 40}"]  # fmt: skip
    runs = set((recipe.parent / "runs" / "train").iterdir())
    process = subprocess.Popen(list(map(str, command)), env=cluster.environment, cwd=recipe.parent, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def steps() -> list[int]:
        logs = [run / METRICS for run in set((recipe.parent / "runs" / "train").iterdir()) - runs]
        return [line["step"] for log in logs for line in read_metrics(log) if line["kind"] == "train"]

    wait_until(lambda: process.poll() is not None or len(steps()) > 60, "training is under way")
    second = cluster.nodes.pop()
    os.killpg(second.pid, signal.SIGKILL)
    second.wait(60)
    assert len(steps()) < LONG_STEPS / 2, "the fault fired in the midst of training"
    out, said = process.communicate(timeout=240)
    assert process.returncode == 0, said[-4000:]
    assert "on 2 cpu workers" in said and "was lost; going on from the last checkpoint" in said, said[-4000:]
    assert "going on with 1 of 2 workers" in said
    record = json.loads(out.splitlines()[-1])
    assert record["resumed"] == 1 and record["best_value"] > 0.85
    assert steps() == list(range(1, LONG_STEPS + 1)), "no step is missing, none is there twice"
