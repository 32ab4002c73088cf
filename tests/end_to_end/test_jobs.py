"""The path as a job of a running cluster: ``ray job submit`` and ``orchestrator submit``, their logs and exit status."""

import json
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from own_cluster import BIN, OwnCluster, own_cluster
from ports import free_port

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def cluster() -> Iterator[OwnCluster]:
    with own_cluster() as cluster:
        cluster.start_head()
        yield cluster


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, reviews_csv: Path, tiny_backbone: Path) -> Path:
    """A user's folder: a recipe, and data and results that git ignores."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "data").mkdir()
    shutil.copy(reviews_csv, folder / "data")
    (folder / ".gitignore").write_text("data/\nruns/\n")
    (folder / "recipe.yaml").write_text(
        "name: jobbed\ntask: text_classification\ndata: {source: data/reviews.csv}\n"
        f"model: {{backbone: {tiny_backbone}, max_tokens: 32}}\n"
        "training: {epochs: 1, batch_size: 16, learning_rate: 2.0e-3, workers: 1}\n"
        f"evaluation: {{bootstrap_samples: 100}}\nserving: {{port: {free_port()}, max_replicas: 1}}\n"
    )
    return folder


def test_ray_job_submit_walks_the_whole_path(cluster: OwnCluster, project: Path, reviews_csv: Path) -> None:
    """The repository is the job's folder; its relative storage moves to where it lasts, and the endpoint stays up."""
    copy = Path(
        shutil.copytree(ROOT, cluster.root / "clone", ignore=shutil.ignore_patterns(".*", "runs", "*.egg-info"))
    )
    shutil.copy(project / "recipe.yaml", copy / "recipe.yaml")
    submitted = cluster.run(
        BIN / "ray", "job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--", "python", "-m",
        "jobs.run", "recipe.yaml", "--set", f"data.source={reviews_csv}", "--json", cwd=copy,
    )  # fmt: skip
    log = submitted.stdout + submitted.stderr
    assert submitted.returncode == 0, log[-4000:]
    assert "[storage] ./runs would vanish with this job's folder" in log
    records = json.loads(next(line for line in log.splitlines() if line.startswith('{"stage": "run"')))
    assert (cluster.root / "orchestrator" / "runs" / records["train"]["model_location"] / "config.json").is_file()

    body = json.dumps({"instances": ["a great fresh cup"]}).encode()
    request = urllib.request.Request(records["serve"]["predict_url"], body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["model_version"] == "1"


def test_serve_deploy_brings_a_config_file_to_the_cluster(cluster: OwnCluster, project: Path) -> None:
    """The one in cluster/, for the model that the job registered, where Serve already listens."""
    config = yaml.safe_load((ROOT / "cluster" / "serve-config.yaml").read_text())
    port = yaml.safe_load((project / "recipe.yaml").read_text())["serving"]["port"]
    gateway, model = config["applications"]
    gateway["args"] = {"host": "127.0.0.1", "port": port}
    model["name"] = "model-jobbed"
    model["args"] |= {"name": "jobbed", "storage": str(cluster.root / "orchestrator" / "runs"), "registry": None}
    model["args"]["serving"] |= {"max_replicas": 1, "keys": False}
    (project / "serve.yaml").write_text(yaml.safe_dump(config))
    deployed = cluster.run(BIN / "serve", "deploy", "serve.yaml", "--address", cluster.dashboard, cwd=project)
    assert deployed.returncode == 0, deployed.stderr[-3000:]

    deadline = time.monotonic() + 120
    while True:
        status = cluster.run(BIN / "serve", "status", "--address", cluster.dashboard, cwd=project).stdout
        applications = yaml.safe_load(status)["applications"] if status.strip() else {}
        if applications.keys() == {"gateway", "model-jobbed"} and all(
            a["status"] == "RUNNING" for a in applications.values()
        ):
            break
        assert time.monotonic() < deadline and "FAILED" not in status, status
        time.sleep(1)
    body = json.dumps({"instances": ["a great fresh cup"]}).encode()
    url = f"http://127.0.0.1:{port}/v1/models/jobbed:predict"
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as answer:
        assert json.load(answer)["model_version"] == "1"


def test_submit_streams_the_log_and_brings_the_record(cluster: OwnCluster, project: Path) -> None:
    """Data that git ignores travels too."""
    storage = cluster.root / "other"
    submitted = cluster.run(
        BIN / "orchestrator", "submit", "prepare", "recipe.yaml", "--address", cluster.dashboard, "--storage", storage,
        "--json", cwd=project,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr[-4000:]
    record = json.loads(submitted.stdout)
    assert (record["stage"], record["labels"]) == ("prepare", ["bad", "good"])
    assert "[prepare]" in submitted.stderr and "ray job logs" in submitted.stderr
    assert (storage / record["location"] / "rows.arrow").is_file()


def test_submit_ends_with_the_jobs_own_status(cluster: OwnCluster, project: Path) -> None:
    """Here 2, the user's mistake; what others become, tests/test_submit.py says."""
    submitted = cluster.run(
        BIN / "orchestrator", "submit", "train", "recipe.yaml", "--address", cluster.dashboard, "--storage",
        cluster.root / "other", "--set", "data.source=data/none.csv", cwd=project,
    )  # fmt: skip
    assert submitted.returncode == 2, submitted.stderr[-4000:]
    assert "there is nothing at data/none.csv" in submitted.stderr
    assert "Traceback" not in submitted.stderr


def test_a_cluster_that_is_not_there_is_said_at_once(cluster: OwnCluster, project: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    submitted = cluster.run(BIN / "orchestrator", "submit", "run", "recipe.yaml", "--address", address, cwd=project)
    assert submitted.returncode == 2
    assert f"no job server answers at '{address}'" in submitted.stderr and "Traceback" not in submitted.stderr


def test_a_demo_recipe_needs_nothing_but_the_clone(cluster: OwnCluster, tmp_path: Path) -> None:
    """Its data are written where the job runs."""
    prepared = cluster.run(sys.executable, "-m", "jobs.prepare", "jobs/recipes/reviews.yaml", "--storage", tmp_path,
                           "--set", "data.max_rows=60", "--json", cwd=ROOT)  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr[-4000:]
    assert json.loads(prepared.stdout.splitlines()[-1])["labels"] == ["great", "other"]
    assert (cluster.root / ".cache" / "orchestrator" / "demo" / "reviews-train.csv").is_file()
