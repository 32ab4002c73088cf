"""Running a study's trials with Ray Tune: which trial next is the study's to say, who stops early the scheduler's.

In: a ``Study`` and the function that runs a trial. Out: nothing; every trial is in the study when this ends. Tune's own state
is of no account: what counts is written to the study's database at the moment it is known.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from orchestrator.errors import DiskFull
from orchestrator.session import Session
from orchestrator.tuning.measured import Measured, RunTrial
from orchestrator.tuning.schedulers import EPOCH, VALUE, make_scheduler, remember
from orchestrator.tuning.study import Asked, Study

_MEASURED = "measured"
_POLL_S, _PATIENCE_S = 0.5, 30.0
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run's own metrics are what people look at
    "TUNE_GLOBAL_CHECKPOINT_S": "100000000",  # Tune's state is not needed: the study is
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has none
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class Room:
    """What a trial takes of the cluster, and how many go on at a time."""

    cpus: float
    gpus: float
    concurrency: int


@dataclass
class Watcher:
    """What the one who called wants to know; called in a thread of its own."""

    begun: Callable[[Asked], None] = lambda asked: None
    epoch: Callable[[Asked, int, Measured], None] = lambda asked, epoch, measured: None
    ended: Callable[[Asked, Measured], None] = lambda asked, measured: None
    waiting: Callable[[], None] = lambda: None
    """No trial could begin for a while: something else has the room."""


@dataclass(frozen=True)
class Budget:
    trials: int
    epochs: int
    """Of a trial that is not stopped."""
    generations: int = 1
    """Of a population: the parts of each member's training."""
    deadline: float | None = None
    """By time.monotonic()."""
    max_failures: int = 0
    """How often a trial whose process was lost is started again."""

    def is_over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


def search(
    study: Study, run_trial: RunTrial, room: Room, budget: Budget, session: Session, watcher: Watcher | None = None
) -> None:
    """Run trials until there are ``budget.trials`` in the study, or the time is over. Trials that an earlier search left
    undone come first, and go on from where they were.

    Raises whatever the study, the scheduler or ``watcher`` raised first.
    """
    maximize = study.inner.direction.name == "MAXIMIZE" if study.is_single else True
    scheduler = make_scheduler(study.tuning, maximize, budget.epochs)
    remember(scheduler, {t.number: t.intermediate_values for t in study.trials() if t.intermediate_values})
    searcher = _Searcher(study, budget, watcher or Watcher())
    with _quiet(), _environment():
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(_Trial, run_trial=run_trial), _request(room)),
            tune_config=tune.TuneConfig(
                search_alg=searcher, scheduler=scheduler, num_samples=-1, reuse_actors=True,
                max_concurrent_trials=room.concurrency, trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="study", storage_path=str(session.scratch / "tune"), verbose=0, stop=lambda _, __: budget.is_over(),
                failure_config=tune.FailureConfig(max_failures=0), callbacks=[_Tidings(searcher)],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )  # fmt: skip
        _leave_at_once_when_interrupted(tuner.fit, searcher.look_for_room)
    if searcher.broken:
        raise searcher.broken


def _leave_at_once_when_interrupted(run: Callable[[], object], meanwhile: Callable[[], None]) -> None:
    """Interrupted itself, Tune would end its trials as if the scheduler had stopped them. Its thread ends with the process,
    and the trials end with Ray, in the midst of what they do."""
    done = Future[None]()

    def wait() -> None:
        try:
            run()
            done.set_result(None)
        except BaseException as error:  # noqa: BLE001  raised again by the thread that waits
            done.set_exception(error)

    threading.Thread(target=wait, name="search", daemon=True).start()
    while not wait_for([done], timeout=_POLL_S).done:
        meanwhile()  # signals are seen between two waits
    done.result()


def _request(room: Room) -> tune.PlacementGroupFactory:
    """Tune wants something to be asked for: a byte, where the trial's own workers take all the rest."""
    return tune.PlacementGroupFactory([{"CPU": room.cpus, "GPU": room.gpus} if room.cpus else {"memory": 1}])


class _Searcher(Searcher):
    """Between Tune, which knows trials by its own ids, and the study."""

    def __init__(self, study: Study, budget: Budget, watcher: Watcher) -> None:
        super().__init__(metric=VALUE, mode="max")
        self.study, self.budget, self.watcher = study, budget, watcher
        self.waiting = study.unfinished()
        self.running: dict[str, Asked] = {}
        self.losses: dict[int, int] = {}
        self.broken: BaseException | None = None
        self.started = set[str]()
        self.stuck_since = time.monotonic()

    def look_for_room(self) -> None:
        """Say so now and then when every trial that could go on waits for room."""
        running = list(self.running)  # Tune's thread goes on meanwhile
        if not running or not self.started.isdisjoint(running):
            self.stuck_since = time.monotonic()
        elif time.monotonic() - self.stuck_since > _PATIENCE_S:
            self.stuck_since = time.monotonic()
            self.watcher.waiting()

    def __reduce__(self) -> tuple[type[str], tuple[()]]:
        """Tune writes its configuration down, to restore it from there: what counts is in the study."""
        return str, ()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        asked: Asked | None = None
        with self._first_error():
            asked = self._next()
            if asked is not None:
                self.running[trial_id] = asked
                self.watcher.begun(asked)
        if asked is not None and self.broken is None:
            return {"number": asked.number, "point": asked.point}
        return None if self.running and self.broken is None else Searcher.FINISHED

    def _next(self) -> Asked | None:
        if self.broken or self.budget.is_over():
            return None
        if self.waiting:
            return self.waiting.pop(0)
        return self.study.following(self.budget.trials, self.budget.generations)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        with self._first_error():
            if _MEASURED in result and not result.get("done"):
                self._note_epoch(self.running[trial_id], result)

    def _note_epoch(self, asked: Asked, result: dict[str, Any]) -> None:
        if self.study.is_single:
            self.study.report(asked.number, result[EPOCH] - 1, result[VALUE])
        self.watcher.epoch(asked, result[EPOCH], result[_MEASURED])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if error:
            return  # _Tidings says why
        asked = self.running.pop(trial_id, None)
        if asked is None or not result or _MEASURED not in result:
            return  # it was stopped before its first epoch was over: the next search goes on with it
        with self._first_error():
            if VALUE in result:  # an epoch's result, which was not shown to on_trial_result: the scheduler said stop
                self._note_epoch(asked, result)
                self._end(asked, replace(result[_MEASURED], state="pruned"))
            else:
                self._end(asked, result[_MEASURED])

    def lost(self, trial_id: str, error: str) -> None:
        """The trial's process is gone, or could not begin."""
        asked = self.running.pop(trial_id)
        self.losses[asked.number] = self.losses.get(asked.number, 0) + 1
        with self._first_error():
            if self.losses[asked.number] <= self.budget.max_failures:
                self.waiting.append(asked)
            else:
                self._end(asked, Measured("failed", error=error, kind="lost"))

    def _end(self, asked: Asked, measured: Measured) -> None:
        if measured.kind == "no_room":  # the trial is not to blame: it goes on when there is room again
            raise DiskFull(measured.error)
        self.study.tell(asked.number, measured)
        self.watcher.ended(asked, measured)

    @contextlib.contextmanager
    def _first_error(self) -> Iterator[None]:
        """Tune would wrap what is raised here, or go on: the first error is kept, and no other trial is begun."""
        try:
            if self.broken is None:
                yield
            else:
                with contextlib.suppress(Exception):
                    yield
        except Exception as error:  # noqa: BLE001  raised again by search
            self.broken = error


class _Tidings(tune.Callback):
    """A searcher is not told why a trial's process failed, nor when it began."""

    def __init__(self, searcher: _Searcher) -> None:
        self.searcher = searcher

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.searcher.started.add(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        with contextlib.suppress(OSError, TypeError):
            lines = Path(trial.error_file).read_text().strip().splitlines()
            self.searcher.lost(trial.trial_id, lines[-1])
            return
        self.searcher.lost(trial.trial_id, "its process was lost")


@dataclass
class _Said:
    """From the trial's thread to Tune's: an epoch is over (the thread waits for an answer), or all is."""

    result: dict[str, Any]
    is_over: bool = False


@dataclass
class _Conversation:
    said: queue.SimpleQueue[_Said] = field(default_factory=queue.SimpleQueue)
    answers: queue.SimpleQueue[bool] = field(default_factory=queue.SimpleQueue)


class _Trial(tune.Trainable):
    """A process that runs one trial after another. The training has a thread of its own, which stands still after each epoch
    until the scheduler has said whether it goes on."""

    talk: _Conversation
    stands = False

    def setup(self, config: dict[str, Any], run_trial: RunTrial) -> None:
        self.run_trial = run_trial
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._end()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        if self.stands:
            self.talk.answers.put(True)
        said = self.talk.said.get()
        self.stands = not said.is_over
        return said.result

    def cleanup(self) -> None:
        self._end()

    def _begin(self, config: dict[str, Any]) -> None:
        self.talk, self.stands = _Conversation(), False
        self.thread = threading.Thread(
            target=self._run, args=(self.talk, config["number"], config["point"]), daemon=True
        )
        self.thread.start()

    def _run(self, talk: _Conversation, number: int, point: dict[str, Any]) -> None:
        def go_on(epoch: int, value: float, measured: Measured) -> bool:
            talk.said.put(_Said({EPOCH: epoch + 1, VALUE: value, _MEASURED: measured}))
            return talk.answers.get()

        try:
            measured = self.run_trial(number, point, go_on)
        except BaseException as error:  # noqa: BLE001  a trial's failure is a result
            measured = Measured("failed", error=f"{type(error).__name__}: {error}", kind="raised")
        talk.said.put(_Said({_MEASURED: measured, "done": True}, is_over=True))

    def _end(self) -> None:
        """The one before has let go of its memory when the next begins."""
        if self.stands:
            self.talk.answers.put(False)
        self.thread.join()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """For good when the block is interrupted: Tune's thread then goes on until the process ends."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    interrupted = True
    try:
        yield
        interrupted = False
    except Exception:
        interrupted = False
        raise
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(logging.CRITICAL if interrupted else level)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
