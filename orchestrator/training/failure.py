"""What to do when workers failed: decided by a pure function, acted on in on_ray.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import OrchestratorError, TrainingFailed


@dataclass(frozen=True)
class WorkerFailure:
    rank: int
    kind: Literal["lost", "connection", "raised"]
    """``lost``: the process is gone. ``connection``: a peer's process is gone. ``raised``: its own code raised."""
    message: str
    error: BaseException | None = None


@dataclass(frozen=True)
class Retry:
    reason: str


@dataclass(frozen=True)
class Stop:
    error: OrchestratorError


def decide(failures: Sequence[WorkerFailure], failed_before: int, max_failures: int) -> Retry | Stop:
    """Lost workers are started again, up to ``max_failures`` times; code that raised would only raise again."""
    for failure in failures:
        if isinstance(failure.error, OrchestratorError):
            return Stop(failure.error)
    raised = next((f for f in failures if f.kind == "raised"), None)
    if raised:
        return Stop(TrainingFailed(f"training raised on worker {raised.rank}: {raised.message}"))
    ranks = ", ".join(str(f.rank) for f in failures if f.kind == "lost") or "unknown"
    if failed_before >= max_failures:
        return Stop(
            TrainingFailed(
                f"worker {ranks} was lost, and {failed_before} restarts (training.max_failures) are used up",
                "check the memory of the machine, then run the same command again: it goes on from the last checkpoint",
            )
        )
    return Retry(f"worker {ranks} was lost; going on from the last checkpoint")
