"""What to do when workers failed: decided by a pure function, acted on in on_ray.py.

In: what each worker failed with, and what earlier failures have changed already. Out: ``Retry`` with what is different next
time, or ``Stop`` with the error the user sees.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import orchestrator
from orchestrator.errors import DiskFull, OrchestratorError, TrainingFailed
from orchestrator.recipe import Training

_CONNECTION_WORDS = ("gloo", "nccl", "connection", "process group", "store")
_MEMORY_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "low on memory")

Kind = Literal["lost", "hung", "out_of_memory", "diverged", "no_room", "connection", "raised"]


class Diverged(TrainingFailed):
    """The loss or a gradient is no number any more. The weights have not been touched by it."""


@dataclass(frozen=True)
class WorkerFailure:
    """``lost``: the process is gone. ``hung``: it stood still and was ended. ``connection``: a peer's process is gone.
    ``no_room``: the disk is full. ``raised``: its own code raised."""

    rank: int
    kind: Kind
    message: str
    error: OrchestratorError | None = None
    """What the user should see, if it is one of ours."""


@dataclass(frozen=True)
class Remedies:
    """What earlier failures of this run have changed; kept beside its checkpoints."""

    accumulate_factor: int = 1
    """Times ``training.accumulate_steps``."""
    rate_factor: float = 1.0
    """Times the learning rate."""
    rollbacks: int = 0
    rolled_back_to: int = -1
    """The step of the checkpoint that the last rollback went to."""


@dataclass(frozen=True)
class Retry:
    reason: str
    remedies: Remedies
    is_restart: bool = False
    """It counts against ``training.max_failures``."""
    disk_full: OrchestratorError | None = None
    """Only when the disk has room again; else this is the error."""
    drop_newest: bool = False
    """Go on from the checkpoint before the newest one."""


@dataclass(frozen=True)
class Stop:
    error: OrchestratorError
    kind: Kind


def decide(
    failures: Sequence[WorkerFailure], restarts: int, remedies: Remedies, training: Training, workers: int, newest: int
) -> Retry | Stop:
    """What went wrong first counts; that a peer's connection broke is only what follows from it.

    ``restarts``: how often workers were started again before; ``newest``: the step of the newest checkpoint. Code that
    raised would only raise again: it is not tried.
    """
    by_kind = {failure.kind: failure for failure in reversed(failures)}
    if bug := by_kind.get("raised"):
        return Stop(bug.error or TrainingFailed(f"training raised on worker {bug.rank}: {bug.message}"), "raised")
    if failure := by_kind.get("out_of_memory"):
        return _smaller_parts(failure, remedies, training, workers)
    if failure := by_kind.get("diverged"):
        return _slower(failure, remedies, training, newest)
    if failure := by_kind.get("no_room"):
        return Retry(f"{failure.message}; going on when there is room", remedies, disk_full=failure.error)
    return _again(failures, restarts, remedies, training)


def _smaller_parts(failure: WorkerFailure, remedies: Remedies, training: Training, workers: int) -> Retry | Stop:
    parts = training.accumulate_steps * remedies.accumulate_factor
    rows = -(-training.batch_size // (workers * parts))
    if rows <= 1:
        return Stop(
            TrainingFailed(
                f"worker {failure.rank} ran out of memory with a single row at a time ({failure.message})",
                "choose a smaller model.backbone or model.max_tokens (model.image_size), or a machine with more memory",
            ),
            "out_of_memory",
        )
    doubled = replace(remedies, accumulate_factor=2 * remedies.accumulate_factor)
    return Retry(
        f"worker {failure.rank} ran out of memory with {rows} rows at a time; going on from the last checkpoint with "
        f"{-(-rows // 2)} rows at a time, the same batch in {2 * parts} parts",
        doubled,
    )


def _slower(failure: WorkerFailure, remedies: Remedies, training: Training, newest: int) -> Retry | Stop:
    """A checkpoint from which the run diverged twice was written when its weights were on their way out already."""
    if remedies.rollbacks >= training.max_rollbacks:
        tried = f", after {remedies.rollbacks} tries with ever lower learning rates" if remedies.rollbacks else ""
        return Stop(
            TrainingFailed(
                f"{failure.message}{tried} (training.max_rollbacks)",
                "lower training.learning_rate, set training.precision: fp32, or look for broken inputs",
            ),
            "diverged",
        )
    again = newest <= remedies.rolled_back_to
    slower = replace(
        remedies, rate_factor=remedies.rate_factor / 2, rollbacks=remedies.rollbacks + 1, rolled_back_to=newest
    )
    where_to = "the checkpoint before the last" if again else "the last checkpoint"
    return Retry(f"{failure.message}; going back to {where_to} with half the learning rate", slower, drop_newest=again)


def _again(failures: Sequence[WorkerFailure], restarts: int, remedies: Remedies, training: Training) -> Retry | Stop:
    told = [f"worker {f.rank} {f.message}" for f in failures if f.kind == "hung"]
    lost = ", ".join(str(f.rank) for f in failures if f.kind == "lost")
    told += [f"worker {lost or 'unknown'} was lost"] if lost or not told else []
    what = "; ".join(told)
    if restarts >= training.max_failures:
        return Stop(
            TrainingFailed(
                f"{what}, and {restarts} restarts (training.max_failures) are used up",
                "check the machine and its memory, then run the same command again: it goes on from the last checkpoint",
            ),
            "lost",
        )
    return Retry(f"{what}; going on from the last checkpoint", remedies, is_restart=True)


def failure_of(rank: int, error: BaseException) -> WorkerFailure:
    """What a worker's exception means, seen where it was raised: its traceback still tells the line."""
    if isinstance(error, Diverged):
        return WorkerFailure(rank, "diverged", error.message, error)
    if isinstance(error, DiskFull):
        return WorkerFailure(rank, "no_room", error.message, error)
    if isinstance(error, OrchestratorError):
        return WorkerFailure(rank, "raised", str(error), error)
    words = str(error).lower()
    message = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _has(words, error, _MEMORY_WORDS):
        return WorkerFailure(rank, "out_of_memory", message)
    if _has(words, error, _CONNECTION_WORDS):
        return WorkerFailure(rank, "connection", message)
    return WorkerFailure(rank, "raised", f"{where(error)}: {message}")


def _has(words: str, error: BaseException, telling: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(word in words for word in telling)


def where(error: BaseException) -> str:
    """The line that is to blame: the innermost one outside of installed packages, ours counting as one; else of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(orchestrator.__file__).parent)
    installed = tuple({sys.prefix, sys.base_prefix, str(Path(torch.__file__).parent.parent)})
    users = [f for f in frames if not f.filename.startswith((ours, "<", *installed))]
    candidates = users or [f for f in frames if f.filename.startswith(ours)] or list(frames)
    if not candidates:
        return "an unknown line"
    frame = candidates[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name} ({frame.line})"


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
