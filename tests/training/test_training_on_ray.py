"""Training on real Ray workers: the same weights every time, also when a worker is killed on the way."""

import dataclasses
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.prepare import content_key, prepare
from orchestrator.data.sources import open_source
from orchestrator.errors import IntegrityError, ResourceError, TrainingFailed
from orchestrator.progress import Event
from orchestrator.recipe import Training, parse_recipe
from orchestrator.session import Resources, Session
from orchestrator.storage import METRICS, MODEL, Storage, sha256_file
from orchestrator.tasks import TASKS
from orchestrator.training.metrics_log import read_metrics
from orchestrator.training.state import latest_state
from orchestrator.training.worker import TrainJob

pytestmark = pytest.mark.ray
EPOCHS = 8
STEPS = EPOCHS * 40


@pytest.fixture(scope="module")
def job(reviews_csv: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """Epochs of forty steps on two workers, checkpoints every fifteen steps."""
    recipe = parse_recipe(
        f"name: r\ntask: text_classification\nstorage: {tmp_path_factory.mktemp('runs')}\n"
        f"data: {{source: {reviews_csv}}}\nmodel: {{backbone: {tiny_backbone}, max_tokens: 32}}\n"
        f"training: {{epochs: {EPOCHS}, batch_size: 8, learning_rate: 2.0e-3, checkpoint_every_steps: 15, workers: 2}}\n"
    )
    storage, source = Storage(recipe.storage), open_source(recipe.data)
    encoder = TASKS[recipe.task].encoder(recipe.model, ())
    dataset = prepare(recipe, encoder, source, storage, content_key(recipe, encoder, source, storage))
    return TrainJob(recipe, "train/whole", dataset.location, dataset.labels)


def train(job: TrainJob, session: Session, report: object = lambda event: None) -> tuple[str, int]:
    """SHA-256 of the weights, and how many attempts failed on the way."""
    from orchestrator.training.on_ray import fit, place_workers

    failed = fit(job, place_workers(job.recipe.training, session.resources), session, report)  # type: ignore[arg-type]
    return sha256_file(Storage(job.recipe.storage).path(f"{job.run}/{MODEL}/model.safetensors")), failed


@pytest.fixture(scope="module")
def whole(job: TrainJob, ray_session: Session) -> str:
    """The weights of the run that nobody touched."""
    return train(job, ray_session)[0]


def test_the_same_recipe_on_two_workers_gives_the_same_weights_and_learns(
    job: TrainJob, whole: str, ray_session: Session
) -> None:
    again = dataclasses.replace(job, run="train/again")
    assert train(again, ray_session) == (whole, 0)
    position, _ = latest_state(Storage(job.recipe.storage), again.run)
    assert (position.finished, position.step) == (True, STEPS)
    assert position.best_value > 0.85, "the words give the label away in 97 of 100 rows"


def test_a_worker_killed_at_any_step_is_started_again_and_ends_with_the_same_weights(
    job: TrainJob, whole: str, ray_session: Session
) -> None:
    mine = dataclasses.replace(job, run="train/killed")
    folder, at_step = Storage(job.recipe.storage).path(mine.run), random.SystemRandom().randint(15, STEPS - 60)
    killed: list[tuple[int, int]] = []

    def kill() -> None:
        while last_step(folder) < at_step:
            time.sleep(0.01)
        pid = random.choice(training_processes())
        os.kill(pid, signal.SIGKILL)
        killed.append((pid, last_step(folder)))

    events: list[Event] = []
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    weights, failed = train(mine, ray_session, events.append)
    killer.join(1)
    ((pid, step),) = killed
    assert at_step <= step < STEPS and not Path(f"/proc/{pid}").exists(), "the fault fired, in the midst of training"
    assert failed == 1
    assert weights == whole, f"killed at step {step}"
    assert any("was lost" in event.message for event in events), "the user is told"
    assert [line["step"] for line in lines_of(folder, "train")] == list(range(1, STEPS + 1)), "no gap, no step twice"
    assert [line["epoch"] for line in lines_of(folder, "validation")] == list(range(EPOCHS))
    assert latest_state(Storage(job.recipe.storage), mine.run)[0].resumed == 1


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / METRICS) if line["kind"] == kind]


def last_step(folder: Path) -> int:
    return max((line["step"] for line in read_metrics(folder / METRICS)), default=0)


def training_processes() -> list[int]:
    """Pids of the processes that train now and descend from this one: others may train on the same machine."""
    found = [
        int(process.name) for process in Path("/proc").glob("[0-9]*") if title_of(process).startswith("ray::RayTrain")
    ]
    return [pid for pid in found if os.getpid() in ancestors(pid)]


def title_of(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def ancestors(pid: int) -> list[int]:
    chain = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        chain.append(pid)
    return chain


def test_what_a_worker_says_is_wrong_is_the_error(job: TrainJob, ray_session: Session) -> None:
    model = Storage(job.recipe.storage).path(f"{job.dataset}/rows.arrow")
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(
            IntegrityError, match=r"rows.arrow is not the file that was written .*: restore it"
        ) as caught:
            train(dataclasses.replace(job, run="train/flipped"), ray_session)
    finally:
        model.write_bytes(content)
    assert "Traceback" not in str(caught.value) and "ray" not in str(caught.value).replace(str(model), "")


def test_an_error_that_nobody_foresaw_is_one_line_with_its_kind(job: TrainJob, ray_session: Session) -> None:
    """A folder where the log should be: the worker cannot write."""
    Storage(job.recipe.storage).path("train/foreign/metrics.jsonl").mkdir(parents=True)
    with pytest.raises(TrainingFailed, match="training raised on worker 0: IsADirectoryError") as caught:
        train(dataclasses.replace(job, run="train/foreign"), ray_session)
    assert "Traceback" not in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("workers", [3, 64])
def test_more_workers_than_the_cluster_has_are_refused_at_once(workers: int) -> None:
    from orchestrator.training.on_ray import place_workers

    with pytest.raises(ResourceError, match=rf"workers is {workers}, but the cluster has 2 CPUs \(1 node, 2 CPUs"):
        place_workers(Training(workers=workers), Resources(1, 2.0, 0.0, 2.0, 2.0))


def test_what_others_hold_is_waited_for_with_a_word_and_not_for_ever(ray_session: Session) -> None:
    import ray

    from orchestrator.training.on_ray import Placement, wait_for_room

    @ray.remote(num_cpus=1)
    class Holder:
        def hold(self) -> None:
            pass

    holder = Holder.remote()
    ray.get(holder.hold.remote())
    events: list[Event] = []
    needed = Placement(workers=int(ray_session.resources.cpus), device="cpu", cpus_per_worker=1.0)
    with pytest.raises(ResourceError, match="CPUs, which something else has held for 1 s"):
        wait_for_room(needed, events.append, patience_s=1.0)
    assert [event.message for event in events] == ["waiting for 2 CPUs, which something else is using"]
    ray.kill(holder)
    wait_for_room(needed, events.append, patience_s=10.0)
    assert json.dumps([event.message for event in events]).count("waiting") == 1
