"""A training run on real Ray workers, and what can be seen of it from outside."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.data.prepare import content_key, prepare
from orchestrator.data.sources import open_source
from orchestrator.progress import Report, ignore
from orchestrator.recipe import Recipe
from orchestrator.recipe_file import parse_recipe
from orchestrator.session import Session
from orchestrator.storage import METRICS, MODEL, Storage, sha256_file
from orchestrator.tasks import TASKS
from orchestrator.training.metrics_log import read_metrics
from orchestrator.training.worker import TrainJob

EPOCHS = 6
STEPS = EPOCHS * 40
CHECKPOINT_STEPS = 15


def recipe_text(csv: Path, backbone: Path, storage: Path, training: str = "workers: 2", epochs: int = EPOCHS) -> str:
    """Epochs of forty steps, checkpoints every fifteen."""
    return (
        f"name: r\ntask: text_classification\nstorage: {storage}\ndata: {{source: {csv}}}\n"
        f"model: {{backbone: {backbone}, max_tokens: 32}}\n"
        f"training: {{epochs: {epochs}, batch_size: 8, learning_rate: 2.0e-3, checkpoint_every_steps: {CHECKPOINT_STEPS}, "
        f"{training}}}\n"
    )


def prepared_job(csv: Path, backbone: Path, storage: Path, training: str = "workers: 2") -> TrainJob:
    recipe = parse_recipe(recipe_text(csv, backbone, storage, training))
    place, source = Storage(recipe.storage), open_source(recipe.data)
    encoder = TASKS[recipe.task].encoder(recipe.model, ())
    dataset = prepare(recipe, encoder, source, place, content_key(recipe, encoder, source, place))
    return TrainJob(recipe, "train/whole", dataset.location, dataset.labels, state_bytes=2_000_000)


def with_training(recipe: Recipe, **training: object) -> Recipe:
    return Recipe.model_validate(recipe.model_dump() | {"training": recipe.training.model_dump() | training})


def train(job: TrainJob, session: Session, report: Report = ignore) -> tuple[str, int]:
    """SHA-256 of the weights, and how many attempts failed on the way."""
    from orchestrator.training.on_ray import fit
    from orchestrator.training.placement import place_workers

    failed = fit(job, place_workers(job.recipe.training, session.resources), session, report)
    return weights_of(job), failed


def weights_of(job: TrainJob) -> str:
    return sha256_file(folder_of(job) / MODEL / "model.safetensors")


def folder_of(job: TrainJob) -> Path:
    return Storage(job.recipe.storage).path(job.run)


class At(threading.Thread):
    """Does something once the run has come to a step."""

    def __init__(self, folder: Path, step: int, act: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.folder, self.step, self.act = folder, step, act
        self.result: Any = None
        self.set_at, self.fired_at_step, self.fired_at = time.time(), 0, 0.0
        self.start()

    def run(self) -> None:
        while last_step(self.folder) < self.step:
            time.sleep(0.01)
        self.fired_at_step, self.fired_at = last_step(self.folder), time.time()
        self.result = self.act()


def signal_worker(number: signal.Signals, *, leads: bool) -> int:
    """Send a signal to the worker that writes the log, or to another one; returns its pid."""
    pid = next(pid for pid in training_processes() if writes_the_log(pid) == leads)
    os.kill(pid, number)
    return pid


def writes_the_log(pid: int) -> bool:
    names = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            names.append(link.readlink().name)
        except OSError:  # closed since
            continue
    return METRICS in names


def lines_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / METRICS) if line["kind"] == kind]


def last_step(folder: Path) -> int:
    return max((line["step"] for line in read_metrics(folder / METRICS)), default=0)


def training_processes() -> list[int]:
    """Pids of the processes that train now and descend from this one: others may train on the same machine."""
    titles = ("ray::RayTrain", "ray::TrainWorker")
    found = [int(process.name) for process in Path("/proc").glob("[0-9]*") if title_of(process).startswith(titles)]
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
