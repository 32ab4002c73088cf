"""Training in this process: for one who has a process to himself already, as a trial of a search has.

In: jobs. Out: when they are given back, their folders hold the trained models. The failure policy is the same as on Ray, less
what only another process can see: this one's end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from orchestrator.models.hardware import keep_freed_memory
from orchestrator.progress import Report
from orchestrator.recipe import Training
from orchestrator.training.failure import WorkerFailure, failure_of
from orchestrator.training.placement import Placement
from orchestrator.training.recovery import keep_traceback, until_finished
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
            fit_here(job, placement, self.report, self.go_on)
            yield name


def fit_here(job: TrainJob, placement: Placement, report: Report, go_on: GoOn | None = None) -> int:
    """Train until the run is finished; returns how many attempts failed. Raises as ``until_finished`` does."""
    keep_freed_memory()
    torch.set_num_threads(max(1, int(placement.cpus_per_worker)))
    place = Place(0, 1, torch.device(placement.device))

    def attempt() -> tuple[list[WorkerFailure], int]:
        try:
            train_worker(job, place, report, go_on=go_on)
        except Exception as error:  # noqa: BLE001  whatever it is, the policy decides
            keep_traceback(job)
            return [failure_of(0, error)], 1
        return [], 1

    return until_finished(job, attempt, report)
