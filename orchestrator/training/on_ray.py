"""Training on Ray: places the workers, shows their progress, starts them again when some are lost.

In: a ``TrainJob`` and the session. Out: when ``fit`` returns, the run's folder holds the trained model. Ray Train makes
the process group; checkpoints are ours (``state.py``), so each attempt is a fresh Ray run that goes on from our own.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
import ray.train
import ray.train.torch
from ray.exceptions import RayActorError, RayTaskError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from orchestrator.errors import OrchestratorError, ResourceError, TrainingFailed
from orchestrator.progress import Event, Report
from orchestrator.recipe import Training
from orchestrator.session import Resources, Session
from orchestrator.training.failure import Retry, WorkerFailure, decide
from orchestrator.training.worker import Place, TrainJob, train_worker

_POLL_S = 0.3
_CONNECTION_WORDS = ("gloo", "nccl", "connection", "process group", "store")
_MAX_AUTO_CPU_WORKERS = 4
_PATIENCE_S, _REMIND_EVERY_S = 1800.0, 30.0


@dataclass(frozen=True)
class Placement:
    """How many workers, on what."""

    workers: int
    device: Literal["cpu", "cuda"]
    cpus_per_worker: float


def place_workers(training: Training, resources: Resources) -> Placement:
    """Workers and devices for what the cluster has.

    Raises:
        ResourceError: more workers, or other devices, than the cluster has: said now instead of waiting for ever.
    """
    device: Literal["cpu", "cuda"] = "cuda" if resources.gpus and training.device != "cpu" else "cpu"
    if training.device == "cuda" and not resources.gpus:
        raise ResourceError(f"training.device is cuda, but the cluster has no GPU ({resources})", "set it to auto")
    slots = int(resources.gpus if device == "cuda" else resources.cpus)
    free = max(1, slots if device == "cuda" else int(resources.free_cpus))
    kind = "GPUs" if device == "cuda" else "CPUs"
    if training.workers != "auto" and training.workers > slots:
        raise ResourceError(
            f"training.workers is {training.workers}, but the cluster has {slots} {kind} ({resources})",
            f"set training.workers to at most {slots}, or to auto",
        )
    workers = _automatic(free, device, training.batch_size) if training.workers == "auto" else training.workers
    cpus = max(1.0, resources.free_cpus // workers) if resources.nodes == 1 else 1.0
    return Placement(workers, device, min(cpus, resources.cpus_of_largest_node))


def _automatic(slots: int, device: str, batch_size: int) -> int:
    """As many as there are, but never more than rows in a batch, and on CPUs not more than pays off."""
    limit = slots if device == "cuda" else min(slots, _MAX_AUTO_CPU_WORKERS)
    return max(1, min(limit, batch_size))


def fit(job: TrainJob, placement: Placement, session: Session, report: Report) -> int:
    """Train until the run is finished; returns how many attempts failed on the way.

    Raises:
        TrainingFailed: the loop raised, or workers were lost more often than ``training.max_failures``.
    """
    with _mailbox(report) as mailbox:
        for attempt in range(job.recipe.training.max_failures + 1):
            wait_for_room(placement, report)
            failures = _attempt(replace(job, attempt=attempt), placement, session, mailbox)
            if not failures:
                return attempt
            decision = decide(failures, attempt, job.recipe.training.max_failures)
            if not isinstance(decision, Retry):
                raise decision.error
            report(Event("train", message=decision.reason))
    raise AssertionError("decide() stops at max_failures")


def wait_for_room(placement: Placement, report: Report, patience_s: float = _PATIENCE_S) -> None:
    """Until what the workers need is free, saying so: Ray Train would wait in silence, then fail without a reason.

    Raises:
        ResourceError: it was not free within ``patience_s``.
    """
    needed = {"CPU": placement.workers * placement.cpus_per_worker}
    needed |= {"GPU": float(placement.workers)} if placement.device == "cuda" else {}
    started, said_at = time.monotonic(), float("-inf")
    while lacking := {name: n for name, n in needed.items() if ray.available_resources().get(name, 0.0) < n}:
        waited_s = time.monotonic() - started
        told = ", ".join(f"{n:g} {name}s" for name, n in lacking.items())
        if waited_s > patience_s:
            raise ResourceError(
                f"the workers need {told}, which something else has held for {waited_s:.0f} s",
                "see who: ray status, ray list actors; or set training.workers lower",
            )
        if waited_s > _POLL_S and time.monotonic() - said_at > _REMIND_EVERY_S:
            said_at = time.monotonic()
            report(Event("train", message=f"waiting for {told}, which something else is using"))
        time.sleep(_POLL_S)


def _attempt(job: TrainJob, placement: Placement, session: Session, mailbox: Any) -> list[WorkerFailure]:
    resources = {"CPU": placement.cpus_per_worker} | ({"GPU": 1} if placement.device == "cuda" else {})
    trainer = ray.train.torch.TorchTrainer(
        _on_worker,
        train_loop_config={"job": job, "mailbox": mailbox, "threads": int(placement.cpus_per_worker)},
        scaling_config=ScalingConfig(
            num_workers=placement.workers, use_gpu=placement.device == "cuda", resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"attempt-{uuid.uuid4().hex[:8]}",
            storage_path=str(session.scratch / "train"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=3),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        with _quiet_loggers():
            trainer.fit()
    except WorkerGroupError as error:
        return [_classify(rank, failure) for rank, failure in sorted(error.worker_failures.items())]
    except TrainingFailedError as error:
        raise TrainingFailed(
            f"Ray could not run the workers ({_first_line(_root(error))})", "run: orchestrator doctor"
        ) from error
    return []


def _on_worker(config: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(max(1, config["threads"]))
    context = ray.train.get_context()
    mailbox = config["mailbox"]
    place = Place(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    train_worker(config["job"], place, lambda event: mailbox.put.remote(event) and None)
    if place.rank == 0:
        ray.get(mailbox.flush.remote())


def _classify(rank: int, failure: BaseException) -> WorkerFailure:
    cause = _root(failure)
    if isinstance(cause, (RayActorError, WorkerHealthCheckTimeoutError)):
        return WorkerFailure(rank, "lost", _first_line(cause))
    if isinstance(cause, OrchestratorError):
        return WorkerFailure(rank, "raised", str(cause), cause)
    text = f"{type(cause).__name__}: {_first_line(cause)}"
    lost_peer = isinstance(cause, RuntimeError) and any(word in str(cause).lower() for word in _CONNECTION_WORDS)
    return WorkerFailure(rank, "connection" if lost_peer else "raised", text)


def _root(error: BaseException) -> BaseException:
    """The exception a worker raised, out of the wrappers that carried it here."""
    while True:
        if isinstance(error, RayTaskError):
            inner = error.cause
        elif isinstance(error, WorkerHealthCheckFailedError):
            inner = error.health_check_failure
        else:
            inner = error.__cause__
        if not isinstance(inner, BaseException):
            return error
        error = inner


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class _Mailbox:
    """Carries events from worker 0 to the driver without a barrier among the workers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def put(self, event: Event) -> None:
        self.events.append(event)

    def drain(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def flush(self) -> None:
        """Returns after every ``put`` that was sent before it."""


@contextlib.contextmanager
def _mailbox(report: Report) -> Iterator[Any]:
    """A mailbox whose events reach ``report`` while the block runs, the last ones before it ends."""
    actor = ray.remote(num_cpus=0, max_restarts=0)(_Mailbox).remote()
    stop = threading.Event()

    def relay() -> None:
        for event in ray.get(actor.drain.remote()):
            report(event)

    def loop() -> None:
        while not stop.wait(_POLL_S):
            with contextlib.suppress(RayActorError):
                relay()

    thread = threading.Thread(target=loop, name="progress", daemon=True)
    thread.start()
    try:
        yield actor
    finally:
        stop.set()
        thread.join(timeout=5)
        with contextlib.suppress(RayActorError):
            relay()
        ray.kill(actor)


@contextlib.contextmanager
def _quiet_loggers() -> Iterator[None]:
    """Ray Train logs its controller's states; the display already says what matters."""
    logger = logging.getLogger("ray.train")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
