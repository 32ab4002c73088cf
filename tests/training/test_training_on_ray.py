"""Training on real Ray workers: errors say what is wrong."""

import dataclasses

import pytest
from running import train, with_training

from orchestrator.errors import IntegrityError, ResourceError, TrainingFailed
from orchestrator.progress import Event
from orchestrator.session import Session
from orchestrator.storage import Storage
from orchestrator.training.worker import TrainJob

pytestmark = pytest.mark.ray


def test_what_a_worker_says_is_wrong_is_the_error(ray_job: TrainJob, ray_session: Session) -> None:
    """The bit is one that only the hash finds."""
    job = dataclasses.replace(ray_job, recipe=with_training(ray_job.recipe, workers=1), run="train/flipped")
    rows = Storage(ray_job.recipe.storage).path(f"{ray_job.dataset}/rows.arrow")
    content = rows.read_bytes()
    at = content.index(b"coffee")  # in the raw text of some row
    rows.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    try:
        with pytest.raises(
            IntegrityError, match=r"rows.arrow is not the file that was written .*: restore it"
        ) as caught:
            train(job, ray_session)
    finally:
        rows.write_bytes(content)
    assert "Traceback" not in str(caught.value) and "ray" not in str(caught.value).replace(str(rows), "")


def test_an_error_that_nobody_foresaw_is_one_line_with_its_kind(ray_job: TrainJob, ray_session: Session) -> None:
    """A folder where the log should be: the worker cannot write."""
    job = dataclasses.replace(ray_job, recipe=with_training(ray_job.recipe, workers=1), run="train/foreign")
    Storage(ray_job.recipe.storage).path("train/foreign/metrics.jsonl").mkdir(parents=True)
    with pytest.raises(
        TrainingFailed, match=r"raised on worker 0: \S+\.py:\d+ in \w+ \(.*\): IsADirectoryError"
    ) as caught:
        train(job, ray_session)
    kept = Storage(ray_job.recipe.storage).path("train/foreign/traceback.txt").read_text()
    assert kept.startswith("Traceback") and "IsADirectoryError" in kept, "all of it is kept for whoever needs it"
    assert "Traceback" not in str(caught.value) and len(str(caught.value).splitlines()) == 1


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
    with pytest.raises(ResourceError, match=r"CPUs, which something else has held for \d+ s"):
        wait_for_room(needed, events.append, patience_s=3.0)
    assert [event.message for event in events] == ["waiting for 2 CPUs, which something else is using"]
    ray.kill(holder)
    assert wait_for_room(needed, events.append, patience_s=60.0) == needed
