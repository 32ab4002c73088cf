"""Training on Ray: places the workers, shows their progress, starts them again when some are lost.

In: a ``TrainJob`` and the session. Out: when ``fit`` returns, the run's folder holds the trained model. Ray Train makes
the process group of several workers; one worker is a plain Ray task, which starts twice as fast. Checkpoints are ours
(``state.py``), so each attempt is a fresh Ray run that goes on from our own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import ResourceError, TrainingFailed
from orchestrator.models.hardware import keep_freed_memory
from orchestrator.progress import Event, Report, Together
from orchestrator.recipe import Training
from orchestrator.session import Session
from orchestrator.training.failure import WorkerFailure, failure_of, first_line
from orchestrator.training.mailbox import Mailbox
from orchestrator.training.placement import Placement, place_runs
from orchestrator.training.recovery import keep_traceback, until_finished
from orchestrator.training.state import Position
from orchestrator.training.watch import Heart, Watch
from orchestrator.training.worker import GoOn, Place, TrainJob, train_worker

_POLL_S = 0.5
_PATIENCE_S, _REMIND_EVERY_S = 1800.0, 30.0
_SETTLE_S = 20.0
"""How long an elastic run waits for lost workers' places before it goes on with fewer: a node that died still counts as
there for a while, and a process that died gives its place back only after a moment."""
_BEATS_PER_TIMEOUT = 10


@dataclass(frozen=True)
class OnRay:
    """An ``Engine`` (stage.py): the workers are processes of the cluster."""

    connect: Callable[[], Session]
    """Called when Ray is needed, and not before a mistake in the recipe has been found."""
    report: Report
    go_on: GoOn | None = None
    placement: Placement | None = None
    """Of each run, one at a time; None: as there is room for."""

    def place(self, training: Training, runs: int) -> tuple[Placement, int]:
        if self.placement:
            return self.placement, 1
        return place_runs(training, self.connect().resources, runs)

    def fit(self, jobs: Mapping[str, TrainJob], placement: Placement, at_once: int) -> Iterator[str]:
        """Side by side, ``at_once`` at a time."""
        if len(jobs) > 1:
            yield from fit_all(jobs, placement, at_once, self.connect(), self.report)
            return
        for name, job in jobs.items():
            fit(job, placement, self.connect(), self.report, self.go_on)
            yield name


def fit(job: TrainJob, placement: Placement, session: Session, report: Report, go_on: GoOn | None = None) -> int:
    """Train until the run is finished; returns how many attempts failed on the way. Raises as ``until_finished`` does."""

    def attempt() -> tuple[list[WorkerFailure], int]:
        there = wait_for_room(placement, report)
        return _attempt(job, there, session, report, go_on), there.workers

    return until_finished(job, attempt, report)


def fit_all(
    jobs: Mapping[str, TrainJob], placement: Placement, at_once: int, session: Session, report: Report
) -> Iterator[str]:
    """Train several runs side by side, ``at_once`` at a time; gives the name of each when it is finished.

    Each has a thread: Ray Train takes a signal handler on the main thread only, so Ctrl-C interrupts the wait for them
    here, and leaving Ray ends them. When a run fails, no other is started; those under way go on to their end, then
    its error is raised.
    """
    together, ended = Together(jobs, report), queue.SimpleQueue[tuple[str, BaseException | None]]()
    waiting, running, failed = list(jobs), 0, list[BaseException]()

    def train(name: str) -> None:
        try:
            fit(jobs[name], placement, session, together.report_of(name))
            ended.put((name, None))
        except BaseException as error:  # noqa: BLE001  raised again by the thread that waits
            ended.put((name, error))

    try:
        with _quiet_loggers():
            while running or (waiting and not failed):
                while waiting and running < at_once and not failed:
                    running += 1
                    threading.Thread(target=train, args=(waiting.pop(0),), daemon=True).start()
                name, error = ended.get()
                running -= 1
                if error is None:
                    yield name
                    continue
                failed.append(error)
                if running:
                    report(Event("train", message=f"{name} failed ({error}); the runs under way go on to their end"))
    finally:
        together.close()
    if failed:
        raise failed[0]


def wait_for_room(placement: Placement, report: Report, patience_s: float = _PATIENCE_S) -> Placement:
    """Until what the workers need is free, saying so: Ray Train would wait in silence, then fail without a reason. An
    elastic run soon goes on with fewer workers.

    Raises:
        ResourceError: it was not free within ``patience_s``.
    """
    started, said_at = time.monotonic(), float("-inf")
    while lacking := _lacking(placement):
        waited_s = time.monotonic() - started
        told = ", ".join(f"{n:g} {name}s" for name, n in lacking.items())
        if waited_s > _SETTLE_S and placement.fewest is not None and (fewer := _fewer(placement)):
            report(Event("train", message=f"going on with {fewer.workers} of {placement.workers} workers"))
            return fewer
        if waited_s > patience_s:
            raise ResourceError(
                f"the workers need {told}, which something else has held for {waited_s:.0f} s",
                "see who: ray status, ray list actors; or set training.workers lower",
            )
        if waited_s > _POLL_S and time.monotonic() - said_at > _REMIND_EVERY_S:
            said_at = time.monotonic()
            report(Event("train", message=f"waiting for {told}, which something else is using"))
        time.sleep(_POLL_S)
    return placement


def _lacking(placement: Placement) -> dict[str, float]:
    """What the workers need, of that which is not free in this amount."""
    needed = {"CPU": placement.workers * placement.cpus_per_worker}
    needed |= {"GPU": float(placement.workers)} if placement.device == "cuda" else {}
    free = ray.available_resources()
    return {name: n for name, n in needed.items() if free.get(name, 0.0) < n}


def _fewer(placement: Placement) -> Placement | None:
    """The largest placement that fits now; None: not even the fewest do."""
    smaller = (replace(placement, workers=n) for n in range(placement.workers - 1, (placement.fewest or 1) - 1, -1))
    return next((candidate for candidate in smaller if not _lacking(candidate)), None)


def _attempt(
    job: TrainJob, placement: Placement, session: Session, report: Report, go_on: GoOn | None
) -> list[WorkerFailure]:
    """One run of all workers, from the last checkpoint to the end or to the first failure."""
    watch = Watch(job.recipe.training.hang_timeout_s)
    with _quiet_loggers(), _mailbox() as mailbox:
        run = _run_alone if placement.workers == 1 else partial(_run_together, session=session)
        task = _Work(job, mailbox, max(1, int(placement.cpus_per_worker)), asks=go_on is not None)
        failures, hung = _follow(partial(run, task, placement), mailbox, watch, report, go_on)
    return [*hung.values(), *(failure for failure in failures if failure.rank not in hung)]


@dataclass(frozen=True)
class _Work:
    """What every worker is told."""

    job: TrainJob
    mailbox: Any
    threads: int
    asks: bool
    """Between two epochs, whether to go on."""


def _run_alone(work: _Work, placement: Placement) -> list[WorkerFailure]:
    """One worker needs no process group: none of Ray Train's processes is started, and none takes time from it."""
    gpus = int(placement.device == "cuda")
    task = ray.remote(num_cpus=placement.cpus_per_worker, num_gpus=gpus, max_retries=0, max_calls=1)(_on_only_worker)
    try:
        ray.get(task.options(name="TrainWorker").remote(work))
    except (RayTaskError, WorkerCrashedError, OutOfMemoryError) as error:
        return [_classify(0, error)]
    return []


def _run_together(work: _Work, placement: Placement, session: Session) -> list[WorkerFailure]:
    from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

    try:
        _trainer(work, placement, session).fit()
    except WorkerGroupError as error:
        return [_classify(rank, failure) for rank, failure in sorted(error.worker_failures.items())]
    except TrainingFailedError as error:
        raise TrainingFailed(
            f"Ray could not run the workers ({first_line(_root(error))})", "run: orchestrator doctor"
        ) from error
    return []


def _trainer(work: _Work, placement: Placement, session: Session) -> Any:
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = {"CPU": placement.cpus_per_worker} | ({"GPU": 1} if placement.device == "cuda" else {})
    return TorchTrainer(
        _on_worker,
        train_loop_config={"work": work},
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


def _follow(
    run: Callable[[], list[WorkerFailure]], mailbox: Any, watch: Watch, report: Report, go_on: GoOn | None
) -> tuple[list[WorkerFailure], dict[int, WorkerFailure]]:
    """Wait for the workers' end, showing what they say; a worker that hangs is ended. Returns what ``run`` did, and hangs.

    It waits in a thread: in the main thread Ray Train would answer Ctrl-C with exit status 0.
    """
    done, hung = Future[list[WorkerFailure]](), dict[int, WorkerFailure]()

    def wait() -> None:
        try:
            done.set_result(run())
        except BaseException as error:  # noqa: BLE001  raised again by the thread that waits
            done.set_exception(error)

    threading.Thread(target=wait, name="workers", daemon=True).start()
    while not wait_for([done], timeout=_POLL_S).done:
        events, beats, question = ray.get(mailbox.drain.remote())
        for event in events:
            report(event)
        if question is not None and go_on is not None:
            mailbox.answer.remote(go_on(*question))
        watch.note(beats, time.monotonic())
        for hang in watch.hung(time.monotonic()):
            if hang.rank not in hung:
                hung[hang.rank] = WorkerFailure(hang.rank, "hung", hang.message)
                _end_process(hang.process)
    for event in ray.get(mailbox.drain.remote())[0]:
        report(event)
    return done.result(), hung


def _end_process(process: str) -> None:
    """``process``: node id and pid. SIGKILL from a task on its node: Ray asks a process to end itself, and this one does
    not listen."""
    node, _, pid = process.partition(" ")
    here = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    with contextlib.suppress(RayTaskError):  # it is gone already
        ray.get(ray.remote(num_cpus=0, scheduling_strategy=here)(_kill).remote(int(pid)))


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


class _Reported(Exception):
    """Carries a worker's failure, classified where it happened, to the driver."""

    def __init__(self, failure: WorkerFailure) -> None:
        super().__init__(failure)
        self.failure = failure


def _on_worker(config: dict[str, Any]) -> None:
    """Among several, by Ray Train."""
    from ray.train import get_context
    from ray.train.torch import get_device

    context = get_context()
    _train(config["work"], Place(context.get_world_rank(), context.get_world_size(), get_device()))


def _on_only_worker(work: _Work) -> None:
    _train(work, Place(0, 1, torch.device("cuda" if ray.get_gpu_ids() else "cpu")))


def _train(work: _Work, place: Place) -> None:
    keep_freed_memory()
    torch.set_num_threads(work.threads)
    job, mailbox = work.job, work.mailbox
    process = f"{ray.get_runtime_context().get_node_id()} {os.getpid()}"
    every_s = job.recipe.training.hang_timeout_s / _BEATS_PER_TIMEOUT
    with Heart(place.rank, process, mailbox.beat.remote, every_s) as beat:
        go_on = partial(_ask, mailbox, beat) if work.asks else None
        try:
            train_worker(job, place, lambda event: mailbox.put.remote(event) and None, beat, go_on)
        except Exception as error:  # noqa: BLE001  whatever it is, the driver decides
            keep_traceback(job)
            raise _Reported(failure_of(place.rank, error)) from None
    if place.rank == 0:
        ray.get(mailbox.flush.remote())


def _ask(mailbox: Any, beat: Callable[[], None], position: Position, scores: dict[str, float]) -> bool:
    """The driver, who looks for questions as it looks for events."""
    ray.get(mailbox.ask.remote((position, scores)))
    while (verdict := ray.get(mailbox.answered.remote())) is None:
        beat()
        time.sleep(_POLL_S / 5)
    return bool(verdict)


def _classify(rank: int, failure: BaseException) -> WorkerFailure:
    cause = _root(failure)
    if isinstance(cause, _Reported):
        return cause.failure
    if isinstance(cause, (RayActorError, WorkerCrashedError, OutOfMemoryError)) or _named(cause, _SILENT):
        return WorkerFailure(rank, _kind_of_loss(cause), first_line(cause))
    return failure_of(rank, cause)


_SILENT, _FAILED_CHECK = "WorkerHealthCheckTimeoutError", "WorkerHealthCheckFailedError"
"""Of Ray Train, which is slow to import and not needed by a single worker."""


def _named(error: BaseException, name: str) -> bool:
    return type(error).__name__ == name


def _kind_of_loss(error: BaseException) -> Literal["lost", "out_of_memory"]:
    """Ray ends a process itself when its node is about to run out of memory."""
    return "out_of_memory" if "low on memory" in str(error) else "lost"


def _root(error: BaseException) -> BaseException:
    """The exception a worker raised, out of the wrappers that carried it here."""
    while True:
        if isinstance(error, RayTaskError):
            inner = error.cause
        elif _named(error, _FAILED_CHECK):
            inner = error.health_check_failure  # type: ignore[attr-defined]
        else:
            inner = error.__cause__
        if not isinstance(inner, BaseException):
            return error
        error = inner


@contextlib.contextmanager
def _mailbox() -> Iterator[Any]:
    here = NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )  # not on one that may die
    actor = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=here)(Mailbox).remote()
    try:
        yield actor
    finally:
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
