"""Short runs of one worker or two, to compare what a setting does to the weights they end with."""

import itertools
import multiprocessing
import os
import secrets
import sys
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from orchestrator.data.prepare import content_key, prepare
from orchestrator.data.sources import open_source
from orchestrator.progress import Event
from orchestrator.recipe import Recipe
from orchestrator.storage import MODEL, Storage, sha256_file
from orchestrator.tasks import TASKS
from orchestrator.training.state import latest_state
from orchestrator.training.worker import Place, TrainJob, train_worker

ALONE = Place(0, 1, torch.device("cpu"))
TRAINING = {"epochs": 2, "batch_size": 24, "accumulate_steps": 2, "precision": "fp32", "checkpoint_every_steps": 3,
            "learning_rate": 1e-3, "schedule": "constant", "warmup_fraction": 0.0, "best_metric": "loss"}  # fmt: skip
WITHOUT_BATCH_NORM = ("*bn*", "*downsample.1*")
"""Of a resnet: frozen, they use running statistics, and rows do not depend on each other."""


def text_job(csv: Path, backbone: Path, storage: Path) -> TrainJob:
    model = {"backbone": str(backbone), "max_tokens": 32}
    return prepared("text_classification", {"source": str(csv), "max_rows": 150}, model, storage)


def image_job(folder: Path, storage: Path, backbone: str) -> TrainJob:
    model = {"backbone": backbone, "weights": "none", "image_size": 32}
    return prepared("image_classification", {"source": str(folder), "max_rows": 70}, model, storage)


def prepared(task: str, data: dict[str, object], model: dict[str, object], storage: Path) -> TrainJob:
    recipe = Recipe.model_validate(
        {"name": "r", "task": task, "storage": str(storage), "data": data, "model": model, "training": TRAINING}
    )
    place, source = Storage(recipe.storage), open_source(recipe.data)
    encoder = TASKS[task].encoder(recipe.model, ())
    dataset = prepare(recipe, encoder, source, place, content_key(recipe, encoder, source, place))
    return TrainJob(recipe, "train/r", dataset.location, dataset.labels)


def changed(job: TrainJob, run: str, training: dict[str, object], model: dict[str, object] | None = None) -> TrainJob:
    values = job.recipe.model_dump()
    values["training"] |= training
    values["model"] |= model or {}
    return replace(job, recipe=Recipe.model_validate(values), run=f"train/{run}")


def trained(job: TrainJob, stops: tuple[int, ...] = ()) -> tuple[str, str]:
    """SHA-256 of the weights and of the last checkpoint; the run is broken off after each of these steps, and goes on."""
    for step in stops:
        with pytest.raises(Stopped):
            train_worker(job, ALONE, stop_at(step))
    train_worker(job, ALONE, lambda event: None)
    storage = Storage(job.recipe.storage)
    checkpoint = latest_state(storage, job.run)[1]
    assert checkpoint is not None
    return sha256_file(weights_file(job)), sha256_file(checkpoint / "tensors.pt")


def weights(job: TrainJob) -> dict[str, torch.Tensor]:
    return load_file(weights_file(job))


def weights_file(job: TrainJob) -> Path:
    return Storage(job.recipe.storage).path(f"{job.run}/{MODEL}/model.safetensors")


ENDED_EARLY = 9


def trained_by_two(job: TrainJob, meeting: Path, stop_at: int | None = None, secret: int | None = None) -> None:
    """The same with two processes that average their gradients. ``meeting``: a file that is not there yet; ``stop_at``:
    how many parts of steps each does before it ends, once there is a checkpoint; ``secret``: of a private run."""
    context = multiprocessing.get_context("forkserver")  # a fork of this process may share a broken lock of its threads
    context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server that forks does not hear of this one's path
        forkserver.ensure_running()
    workers = [context.Process(target=_work, args=(job, rank, meeting, stop_at, secret)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [ENDED_EARLY if stop_at else 0] * 2


def _work(job: TrainJob, rank: int, meeting: Path, stop_at: int | None, secret: int | None) -> None:
    torch.set_num_threads(1)
    if secret is not None:
        secrets.randbits = lambda bits: secret
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    parts = itertools.count(1)

    def beat() -> None:
        if next(parts) == stop_at:
            _wait_for_a_checkpoint(job)
            os._exit(ENDED_EARLY)

    train_worker(job, Place(rank, 2, torch.device("cpu")), lambda event: None, beat)
    distributed.destroy_process_group()


def _wait_for_a_checkpoint(job: TrainJob) -> None:
    """It is written beside the training, which is faster where the machine is busy."""
    deadline = time.monotonic() + 30
    while latest_state(Storage(job.recipe.storage), job.run)[0].step == 0 and time.monotonic() < deadline:
        time.sleep(0.05)


class Stopped(Exception):
    pass


def stop_at(step: int):
    """Raises where a stop would hit: between two steps."""

    def emit(event: Event) -> None:
        if event.done >= step:
            raise Stopped

    return emit
