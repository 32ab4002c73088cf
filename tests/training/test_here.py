"""Training in this process: what stops it between epochs, and what ends the process when it hangs."""

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import folder_of, lines_of, prepared_job, weights_of, with_training

from orchestrator.models.checkpoint import load_model
from orchestrator.progress import ignore
from orchestrator.storage import BEST, CHECKPOINTS, MODEL, TRACEBACK, Storage
from orchestrator.training.here import fit_here
from orchestrator.training.metrics_log import Scores
from orchestrator.training.placement import Placement
from orchestrator.training.state import Position, latest_state
from orchestrator.training.worker import TrainJob

ALONE = Placement(1, "cpu", 1.0)


@pytest.fixture(scope="module")
def job(reviews_csv: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    prepared = prepared_job(reviews_csv, tiny_backbone, tmp_path_factory.mktemp("runs"), "workers: 1")
    recipe = with_training(prepared.recipe, epochs=4, checkpoint_every_steps=None)
    return dataclasses.replace(prepared, recipe=recipe, is_trial=True)


def test_a_run_that_is_told_to_stop_has_the_model_of_its_best_epoch(job: TrainJob) -> None:
    asked: list[tuple[int, float]] = []

    def go_on(position: Position, scores: Scores) -> bool:
        assert scores.latest["epoch"] == position.epoch - 1
        asked.append((position.epoch, scores.best["macro_f1"]))
        return position.epoch < 2

    mine = dataclasses.replace(job, run="train/stopped")
    assert fit_here(mine, ALONE, ignore, go_on) == 0
    epochs = lines_of(folder_of(mine), "validation")
    assert [epoch for epoch, _ in asked] == [1, 2] and len(epochs) == 2
    assert asked[-1][1] == max(line["macro_f1"] for line in epochs), "it is shown the best so far"
    position = latest_state(Storage(mine.recipe.storage), mine.run)[0]
    assert position.finished and position.stopped_early
    assert load_model(folder_of(mine) / MODEL).labels == ("bad", "good")


def test_a_trial_writes_less_and_ends_with_the_same_weights(job: TrainJob) -> None:
    trial, plain = (
        dataclasses.replace(job, run=f"train/{name}", is_trial=name == "trial") for name in ("trial", "plain")
    )
    for mine in (trial, plain):
        fit_here(mine, ALONE, ignore)
    assert weights_of(trial) == weights_of(plain)
    sizes = [sum(file.stat().st_size for name in (CHECKPOINTS, BEST) for file in (folder_of(mine) / name).rglob("*.*"))
             for mine in (trial, plain)]  # fmt: skip
    assert sizes[0] < sizes[1] / 10


def test_a_trial_that_is_called_again_after_its_end_does_nothing(job: TrainJob) -> None:
    mine = dataclasses.replace(job, run="train/again")
    fit_here(mine, ALONE, ignore)
    before = (folder_of(mine) / MODEL / "model.safetensors").stat().st_mtime_ns
    fit_here(mine, ALONE, ignore)
    assert (folder_of(mine) / MODEL / "model.safetensors").stat().st_mtime_ns == before
    assert latest_state(Storage(mine.recipe.storage), mine.run)[0].resumed == 0


def test_a_training_that_hangs_ends_its_process_and_says_where(job: TrainJob, tmp_path: Path) -> None:
    mine = dataclasses.replace(job, recipe=with_training(job.recipe, hang_timeout_s=2.0), run="train/hung")
    (tmp_path / "job").write_bytes(pickle.dumps(mine))
    script = f"""
import pickle, time
from orchestrator.progress import ignore
from orchestrator.training import here, worker
from orchestrator.training.placement import Placement

def never(*arguments, **options):
    time.sleep(600)

worker._Worker._validate = never  # after an epoch of real steps
here.fit_here(pickle.load(open({str(tmp_path / "job")!r}, "rb")), Placement(1, "cpu", 1.0), ignore)
"""
    ran = subprocess.run([sys.executable, "-c", script], env=os.environ.copy(), capture_output=True, timeout=120)
    assert ran.returncode == -signal.SIGKILL, ran.stderr[-2000:]
    told = (folder_of(mine) / TRACEBACK).read_text()
    assert told.startswith("did not get on for 2 s (training.hang_timeout_s), last at worker.py:"), told
