"""What a stopped run goes on from: weights, optimiser, position in the data, the best epoch so far, its history.

In: a ``TrainState``. Out: a published folder, verified when it is read. Random states are not in it: every random number
is drawn from the seed (or a private run's secret, which is in it) and the position, so that a resumed run draws what the
unbroken one would have.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from orchestrator.errors import IntegrityError
from orchestrator.models.checkpoint import system_errors
from orchestrator.storage import (
    BEST,
    CHECKPOINTS,
    METRICS,
    MODEL,
    REMEDIES,
    Storage,
    atomic_write,
    best_location,
    checkpoint_location,
)
from orchestrator.training.failure import Remedies

_TENSORS, _POSITION = "tensors.pt", "position.json"


@dataclass(frozen=True)
class Position:
    """Where training stands. ``batch`` is the next batch of ``epoch``; both 0-based."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_epoch: int = -1
    best_value: float = 0.0
    loss_sum: float = 0.0
    """Sum of the step losses of this epoch so far."""
    seconds: float = 0.0
    """Time spent in training steps, over all attempts."""
    resumed: int = 0
    finished: bool = False
    stopped_early: bool = False

    def next_epoch(self) -> Position:
        return replace(self, epoch=self.epoch + 1, batch=0, loss_sum=0.0)


def save_state(storage: Storage, run: str, position: Position, tensors: dict[str, Any], keep: int = 2) -> None:
    """Publish a checkpoint, then drop all but the newest ``keep``, and the models none of those names. Raises DiskFull."""
    with storage.publish(checkpoint_location(run, position.step)) as folder:
        with system_errors(), (folder / _TENSORS).open("wb") as file:
            torch.save(tensors, file)
        (folder / _POSITION).write_text(json.dumps(asdict(position)), encoding="utf-8")
    for old in storage.children(f"{run}/{CHECKPOINTS}")[:-keep]:
        storage.remove(f"{run}/{CHECKPOINTS}/{old}")
    _collect_models(storage, run)


def drop_newest(storage: Storage, run: str) -> None:
    """Have the run go on from the checkpoint before its newest one; without another, from the start."""
    for name in storage.children(f"{run}/{CHECKPOINTS}")[-1:]:
        storage.remove(f"{run}/{CHECKPOINTS}/{name}")


def _collect_models(storage: Storage, run: str) -> None:
    """Drop the models that no checkpoint names any more."""
    kept = [_read_position(storage, run, name) for name in storage.children(f"{run}/{CHECKPOINTS}")]
    needed = best_location(run, min((position.best_epoch for position in kept), default=-1))
    for old in storage.children(f"{run}/{BEST}"):
        if f"{run}/{BEST}/{old}" < needed:
            storage.remove(f"{run}/{BEST}/{old}")


def publish_model(storage: Storage, run: str, best_epoch: int) -> None:
    """Make the best epoch's model the run's. Does nothing when that was done before."""
    best = best_location(run, best_epoch)
    if storage.exists(f"{run}/{MODEL}") and not storage.exists(best):
        return
    with storage.publish(f"{run}/{MODEL}") as folder:
        shutil.copytree(storage.fetch(best), folder, dirs_exist_ok=True)
    storage.remove(best)


def inherit(storage: Storage, parent: str, run: str) -> None:
    """Have a new run go on from where another one ended, as if that had been its own past: log, best model, checkpoint.

    Does nothing when that was done before. Raises IntegrityError, DiskFull.
    """
    if storage.children(f"{run}/{CHECKPOINTS}"):
        return
    position, folder = latest_state(storage, parent)
    if folder is None:
        raise IntegrityError(
            f"the checkpoints of {parent} are gone", "restore them, or delete the study to start again"
        )
    with storage.publish(best_location(run, position.best_epoch)) as best:
        shutil.copytree(storage.fetch(f"{parent}/{MODEL}"), best, dirs_exist_ok=True)
    atomic_write(storage.path(f"{run}/{METRICS}"), storage.pull(f"{parent}/{METRICS}").read_bytes())
    storage.push(f"{run}/{METRICS}")
    save_state(storage, run, replace(position, finished=False, stopped_early=False), load_tensors(folder))


def read_remedies(storage: Storage, run: str) -> Remedies:
    return Remedies(**(storage.read_json(f"{run}/{REMEDIES}") or {}))


def write_remedies(storage: Storage, run: str, remedies: Remedies) -> None:
    storage.write_json(f"{run}/{REMEDIES}", asdict(remedies))


def latest_state(storage: Storage, run: str) -> tuple[Position, Path | None]:
    """The newest checkpoint that verifies; a start from nothing if there never was one.

    Raises:
        IntegrityError: there are checkpoints and none is whole. Starting again in silence would hide the loss.
    """
    broken: list[str] = []
    for name in reversed(storage.children(f"{run}/{CHECKPOINTS}")):
        location = f"{run}/{CHECKPOINTS}/{name}"
        if not storage.exists(location):
            continue
        try:
            folder = storage.fetch(location)
            return _read_position(storage, run, name), folder
        except IntegrityError as error:
            broken.append(error.message)
    if broken:
        raise IntegrityError(
            f"no checkpoint of {run} is whole ({broken[0]})",
            f"restore one, or delete the folder {run} in the storage to train from the start",
        )
    return Position(), None


def _read_position(storage: Storage, run: str, name: str) -> Position:
    values = storage.read_json(f"{run}/{CHECKPOINTS}/{name}/{_POSITION}")
    return Position(**(values or {}))


def load_tensors(folder: Path) -> dict[str, Any]:
    """What ``save_state`` was given, in the processor's memory."""
    state: dict[str, Any] = torch.load(folder / _TENSORS, map_location="cpu", weights_only=True)
    return state
