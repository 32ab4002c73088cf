"""What goes wrong while Ray trains, and how the run goes on as if it had not."""

import dataclasses
import math
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import (
    CHECKPOINT_STEPS,
    EPOCHS,
    STEPS,
    At,
    folder_of,
    lines_of,
    prepared_job,
    signal_worker,
    train,
    with_training,
)

from orchestrator.progress import Event
from orchestrator.session import Session
from orchestrator.storage import Storage
from orchestrator.training.state import latest_state, read_remedies
from orchestrator.training.worker import TrainJob

pytestmark = pytest.mark.ray


def some_step() -> int:
    """Past the first checkpoint, which is written behind the steps that follow it."""
    return random.SystemRandom().randint(2 * CHECKPOINT_STEPS, STEPS - 100)


def assert_no_step_is_missing_or_twice(folder: Path) -> None:
    assert [line["step"] for line in lines_of(folder, "train")] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in lines_of(folder, "validation")] == list(range(EPOCHS))


def assert_soon_going_on(folder: Path, fault: At, found_after_s: float = 0.0) -> None:
    """Within 30 s of the fault being found, or twice what a start takes where the machine is slower than that. Not more
    is done again than one interval, or two if a checkpoint was just being written."""
    lines = lines_of(folder, "train")
    after = [line for line in lines if line["time"] > fault.fired_at + 1]
    start_s = lines[0]["time"] - fault.set_at
    assert after[0]["time"] - fault.fired_at < found_after_s + max(30.0, 2 * start_s)
    assert fault.fired_at_step - 2 * CHECKPOINT_STEPS <= after[0]["step"] <= fault.fired_at_step + 50


def test_two_workers_learn(ray_job: TrainJob, whole: str) -> None:
    position, _ = latest_state(Storage(ray_job.recipe.storage), ray_job.run)
    assert (position.finished, position.step) == (True, STEPS)
    assert position.best_value > 0.85, "the words give the label away in 97 of 100 rows"


@pytest.mark.parametrize(
    "leads", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["the one that writes", "another"]
)
def test_a_worker_killed_at_any_step_is_started_again_and_ends_with_the_same_weights(
    ray_job: TrainJob, whole: str, ray_session: Session, leads: bool
) -> None:
    mine = dataclasses.replace(ray_job, run=f"train/killed-{leads}")
    events: list[Event] = []
    fault = At(folder_of(mine), some_step(), lambda: signal_worker(signal.SIGKILL, leads=leads))
    weights, failed = train(mine, ray_session, events.append)
    assert fault.result and not Path(f"/proc/{fault.result}").exists(), "the fault fired"
    assert (weights, failed) == (whole, 1), f"killed at step {fault.fired_at_step}"
    assert any("was lost" in event.message for event in events), "the user is told"
    assert_no_step_is_missing_or_twice(folder_of(mine))
    assert_soon_going_on(folder_of(mine), fault)
    assert latest_state(Storage(ray_job.recipe.storage), mine.run)[0].resumed == 1


def test_a_worker_that_stands_still_is_named_and_replaced(ray_job: TrainJob, ray_session: Session) -> None:
    recipe = with_training(ray_job.recipe, workers=1, hang_timeout_s=4.0)
    mine = dataclasses.replace(ray_job, recipe=recipe, run="train/hung")
    events: list[Event] = []
    fault = At(folder_of(mine), some_step(), lambda: signal_worker(signal.SIGSTOP, leads=True))
    _, failed = train(mine, ray_session, events.append)
    assert fault.result and not Path(f"/proc/{fault.result}").exists(), "it was stopped, and then ended"
    (told,) = [event.message for event in events if "going on" in event.message]
    assert told.startswith("worker 0 gave no sign of life for 4 s (training.hang_timeout_s), last at "), told
    assert failed == 1
    assert_soon_going_on(folder_of(mine), fault, found_after_s=4.0)
    assert_no_step_is_missing_or_twice(folder_of(mine))


def test_a_loss_that_overflows_goes_back_and_on_with_a_lower_learning_rate(
    ray_job: TrainJob, ray_session: Session
) -> None:
    """Decay times rate is above two, so each step makes the weights larger; with half the rate it is below. Whether the
    last checkpoint's weights are too large already is the processor's roundings to say."""
    recipe = with_training(
        ray_job.recipe, workers=1, learning_rate=3.9, weight_decay=1.0, max_grad_norm=None, max_failures=0
    )
    mine = dataclasses.replace(ray_job, recipe=recipe, run="train/overflow")
    events: list[Event] = []
    _, failed = train(mine, ray_session, events.append)
    told = [e.message for e in events if e.message.endswith("with half the learning rate")]
    assert 1 <= failed == len(told) <= 3 and re.match(r"the loss is \S+ and the norm of the gradients nan at", told[0])
    remedies = read_remedies(Storage(recipe.storage), mine.run)
    assert (remedies.rate_factor, remedies.rollbacks) == (0.5**failed, failed)
    assert_no_step_is_missing_or_twice(folder_of(mine))
    assert all(math.isfinite(line["loss"]) for line in lines_of(folder_of(mine), "train"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 12 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_is_said_in_one_line_and_the_run_goes_on_when_there_is_room(
    reviews_csv: Path, tiny_backbone: Path, small_disk: Path, ray_session: Session
) -> None:
    job = prepared_job(reviews_csv, tiny_backbone, small_disk, "workers: 1")
    ballast, events, full = small_disk / "ballast", list[Event](), list[int]()

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 14))
            except OSError as error:
                full.append(error.errno)

    def report(event: Event) -> None:
        events.append(event)
        if "no room to write" in event.message:
            time.sleep(3)
            assert latest_state(Storage(job.recipe.storage), job.run)[1] is not None, "the last checkpoint is intact"
            ballast.unlink()

    At(folder_of(job), some_step(), fill)
    _, failed = train(job, ray_session, report)
    assert full == [28], "the disk was full"
    (told,) = [event.message for event in events if "no room" in event.message]
    assert "what was written before is intact; going on when there is room" in told and "\n" not in told
    assert failed == 1
    assert_no_step_is_missing_or_twice(folder_of(job))
