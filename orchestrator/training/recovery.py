"""Trying until a run is finished: what each failure changes, and when to give up.

In: a job and a function that makes one attempt. Out: the number of failed attempts. Where the attempt is made, in this
process or on Ray, is not known here.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import OrchestratorError
from orchestrator.progress import Event, Report
from orchestrator.storage import TRACEBACK, Storage, atomic_write
from orchestrator.training.failure import Retry, WorkerFailure, decide
from orchestrator.training.state import drop_newest, latest_state, read_remedies, write_remedies
from orchestrator.training.worker import TrainJob

_POLL_S = 0.5
Attempt = Callable[[], tuple[list[WorkerFailure], int]]
"""Trains from the last checkpoint on; gives what failed (nothing: the run is finished) and the number of workers."""


def until_finished(job: TrainJob, attempt: Attempt, report: Report) -> int:
    """Attempt until the run is finished; returns how many attempts failed on the way.

    Raises:
        TrainingFailed: the loop raised, or failed in a way, or so often, that ``failure.decide`` gives up.
        DiskFull: there was no room for longer than ``training.disk_full_patience_s``.
    """
    training, storage = job.recipe.training, Storage(job.recipe.storage)
    failed = restarts = 0
    while True:
        failures, workers = attempt()
        if not failures:
            return failed
        remedies = read_remedies(storage, job.run)
        newest = latest_state(storage, job.run)[0].step
        decision = decide(failures, restarts, remedies, training, workers, newest)
        if not isinstance(decision, Retry):
            decision.error.kind = decision.kind
            raise decision.error
        report(Event("train", message=decision.reason))
        if decision.remedies != remedies:
            write_remedies(storage, job.run, decision.remedies)
        if decision.drop_newest:
            drop_newest(storage, job.run)
        if decision.disk_full:
            _wait_for_disk(storage.path(job.run), job.state_bytes, training.disk_full_patience_s, decision.disk_full)
        failed, restarts = failed + 1, restarts + decision.is_restart


def _wait_for_disk(folder: Path, needed_bytes: int, patience_s: float, error: OrchestratorError) -> None:
    """Until the disk has room again. Raises ``error`` when that does not happen within ``patience_s``."""
    deadline = time.monotonic() + patience_s
    while shutil.disk_usage(folder).free < needed_bytes:
        if time.monotonic() > deadline:
            raise error
        time.sleep(_POLL_S)


def keep_traceback(job: TrainJob) -> None:
    """Of the exception that is being handled, in the run's folder, for whoever has to find the cause."""
    keep_message(job, traceback.format_exc())


def keep_message(job: TrainJob, text: str) -> None:
    storage, location = Storage(job.recipe.storage), f"{job.run}/{TRACEBACK}"
    with contextlib.suppress(Exception):  # the disk may be what failed
        atomic_write(storage.path(location), text.encode())
        storage.push(location)
