"""Training in this process: for one who has a process to himself already, as a trial of a search has.

In: jobs. Out: when they are given back, their folders hold the trained models. The failure policy is the same as on Ray, less
what only another process can see: this one's end. A training that hangs therefore ends its process.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from orchestrator.models.hardware import give_back_freed_memory, keep_freed_memory
from orchestrator.progress import Report
from orchestrator.recipe import Training
from orchestrator.training.failure import WorkerFailure, failure_of
from orchestrator.training.metrics_log import Scores
from orchestrator.training.placement import Placement
from orchestrator.training.recovery import keep_message, keep_traceback, until_finished
from orchestrator.training.state import Position
from orchestrator.training.watch import line_of
from orchestrator.training.worker import GoOn, Place, TrainJob, train_worker


@dataclass(frozen=True)
class Here:
    """An ``Engine`` (stage.py): one worker, which is this process."""

    placement: Placement
    report: Report
    go_on: GoOn | None = None

    def place(self, training: Training, runs: int) -> tuple[Placement, int]:
        return self.placement, 1

    def fit(self, jobs: Mapping[str, TrainJob], placement: Placement, at_once: int) -> Iterator[str]:
        """One after the other."""
        for name, job in jobs.items():
            try:
                fit_here(job, placement, self.report, self.go_on)
            finally:
                give_back_freed_memory()
            yield name


def fit_here(job: TrainJob, placement: Placement, report: Report, go_on: GoOn | None = None) -> int:
    """Train until the run is finished; returns how many attempts failed. Raises as ``until_finished`` does."""
    keep_freed_memory()
    torch.set_num_threads(max(1, int(placement.cpus_per_worker)))
    place, timeout_s = Place(0, 1, torch.device(placement.device)), job.recipe.training.hang_timeout_s

    def attempt() -> tuple[list[WorkerFailure], int]:
        try:
            with _Watchdog(timeout_s, job) as watchdog:
                train_worker(job, place, report, watchdog.beat, None if go_on is None else watchdog.patient(go_on))
        except Exception as error:  # noqa: BLE001  whatever it is, the policy decides
            keep_traceback(job)
            return [failure_of(0, error)], 1
        return [], 1

    return until_finished(job, attempt, report)


class _Watchdog:
    """Ends this process when its training no longer gets on: whoever started it sees that it is lost, and starts it again."""

    def __init__(self, timeout_s: float, job: TrainJob) -> None:
        self.timeout_s, self.job = timeout_s, job
        self.moved_s: float | None = None
        """None while nobody is to be hurried: loading takes what it takes."""
        self.over, self.watched = threading.Event(), threading.get_ident()

    def beat(self) -> None:
        self.moved_s = time.monotonic()

    def patient(self, go_on: GoOn) -> GoOn:
        """The answer may take long."""

        def ask(position: Position, scores: Scores) -> bool:
            self.moved_s = None
            return go_on(position, scores)

        return ask

    def __enter__(self) -> _Watchdog:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.over.set()

    def _watch(self) -> None:
        while not self.over.wait(self.timeout_s / 10):
            moved_s = self.moved_s
            if moved_s is not None and time.monotonic() - moved_s > self.timeout_s:
                told = f"did not get on for {self.timeout_s:g} s (training.hang_timeout_s), last at {line_of(self.watched)}"
                keep_message(self.job, told)
                os.kill(os.getpid(), signal.SIGKILL)
