"""Training on real Ray workers: the same weights every time, and errors that say what is wrong."""

import dataclasses
import json

import pytest
from running import STEPS, train

from orchestrator.errors import IntegrityError, ResourceError, TrainingFailed
from orchestrator.progress import Event
from orchestrator.recipe import Training
from orchestrator.session import Resources, Session
from orchestrator.storage import Storage
from orchestrator.training.state import latest_state
from orchestrator.training.worker import TrainJob

pytestmark = pytest.mark.ray


def test_the_same_recipe_on_two_workers_gives_the_same_weights_and_learns(
    ray_job: TrainJob, whole: str, ray_session: Session
) -> None:
    again = dataclasses.replace(ray_job, run="train/again")
    assert train(again, ray_session) == (whole, 0)
    position, _ = latest_state(Storage(ray_job.recipe.storage), again.run)
    assert (position.finished, position.step) == (True, STEPS)
    assert position.best_value > 0.85, "the words give the label away in 97 of 100 rows"


def test_what_a_worker_says_is_wrong_is_the_error(ray_job: TrainJob, ray_session: Session) -> None:
    """The bit is one that only the hash finds: worker 1 reads the same file, and would else be the first to complain."""
    rows = Storage(ray_job.recipe.storage).path(f"{ray_job.dataset}/rows.arrow")
    content = rows.read_bytes()
    at = content.index(b"coffee")  # in the raw text of some row
    rows.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    try:
        with pytest.raises(
            IntegrityError, match=r"rows.arrow is not the file that was written .*: restore it"
        ) as caught:
            train(dataclasses.replace(ray_job, run="train/flipped"), ray_session)
    finally:
        rows.write_bytes(content)
    assert "Traceback" not in str(caught.value) and "ray" not in str(caught.value).replace(str(rows), "")


def test_an_error_that_nobody_foresaw_is_one_line_with_its_kind(ray_job: TrainJob, ray_session: Session) -> None:
    """A folder where the log should be: the worker cannot write."""
    Storage(ray_job.recipe.storage).path("train/foreign/metrics.jsonl").mkdir(parents=True)
    with pytest.raises(
        TrainingFailed, match=r"raised on worker 0: \S+\.py:\d+ in \w+ \(.*\): IsADirectoryError"
    ) as caught:
        train(dataclasses.replace(ray_job, run="train/foreign"), ray_session)
    kept = Storage(ray_job.recipe.storage).path("train/foreign/traceback.txt").read_text()
    assert kept.startswith("Traceback") and "IsADirectoryError" in kept, "all of it is kept for whoever needs it"
    assert "Traceback" not in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("workers", [3, 64])
def test_more_workers_than_the_cluster_has_are_refused_at_once(workers: int) -> None:
    from orchestrator.training.placement import place_workers

    with pytest.raises(ResourceError, match=rf"workers is {workers}, but the cluster has 2 CPUs \(1 node, 2 CPUs"):
        place_workers(Training(workers=workers), Resources(1, 2.0, 0.0, 2.0, 2.0))


def test_what_others_hold_is_waited_for_with_a_word_and_not_for_ever(ray_session: Session) -> None:
    import ray

    from orchestrator.training.on_ray import wait_for_room
    from orchestrator.training.placement import Placement

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
