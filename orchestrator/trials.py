"""A trial of a search: a training run with other values of some recipe fields, measured on the validation rows.

In: a number and a point. Out: ``Measured``. Runs in a process of the search, where it trains itself; a trial of several
workers has them started by Ray Train. Called again after a kill, it goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from orchestrator.errors import DiskFull, OrchestratorError
from orchestrator.evaluation.on_ray import PredictJob, measure_here, predict_here
from orchestrator.progress import ignore
from orchestrator.recipe import Recipe, Training
from orchestrator.records import CrossValidation, DatasetRecord, ModelRecord
from orchestrator.session import Resources, Session
from orchestrator.storage import (
    DATASET,
    LINEAGE,
    RECORD,
    SCRATCH,
    TENSORBOARD,
    TRIALS,
    Storage,
    part_location,
    sha256_json,
)
from orchestrator.training.folds import cross_validation, fold_runs, fold_sizes
from orchestrator.training.here import Here
from orchestrator.training.metrics_log import Scores, write_hparams
from orchestrator.training.placement import Placement
from orchestrator.training.stage import Engine, TrainStage, train_key
from orchestrator.training.state import Position, inherit
from orchestrator.training.worker import GoOn as GoOnTraining
from orchestrator.training.worker import TrainJob
from orchestrator.tuning.measured import GoOn, Measured
from orchestrator.tuning.space import Point, recipe_with


def units_of(training: Training) -> int:
    """After how many parts a trial can be stopped: its epochs, or its folds."""
    return training.folds or (training.epochs if training.ensemble == 1 else 1)


@dataclass(frozen=True)
class Lineage:
    """Of a trial that is a part of the training of a population's member."""

    parent: str | None
    """The run it goes on from."""
    begin: int
    """Epochs that came before."""
    end: int
    """Epochs after which it hands on."""


@dataclass(frozen=True)
class Trials:
    """A ``tuning.measured.RunTrial``."""

    recipe: Recipe
    """Of the trial with an empty point."""
    dataset: DatasetRecord
    location: str
    """Of the study: its trials lie below."""
    objective: str
    """What the scheduler compares trials by; the first, if there are several."""
    needs_latency: bool
    placement: Placement

    def location_of(self, number: int) -> str:
        return part_location(self.location, TRIALS, number)

    def __call__(self, number: int, point: Point, go_on: GoOn) -> Measured:
        trial = _Trial(self, recipe_with(self.recipe, point), self.location_of(number), go_on)
        try:
            measured = trial.measured()
        except OrchestratorError as error:
            return trial.failed(error)
        trial.write_hparams(point, measured)
        return measured


class _Trial:
    """One of them, under way."""

    def __init__(self, study: Trials, recipe: Recipe, run: str, go_on: GoOn) -> None:
        self.study, self.recipe, self.run, self.go_on = study, recipe, run, go_on
        self.storage, self.started = Storage(recipe.storage), time.monotonic()
        values = self.storage.read_json(f"{run}/{DATASET}")  # encoded for another model than the recipe's
        self.dataset = study.dataset if values is None else DatasetRecord.model_validate(values)
        lineage = self.storage.read_json(f"{run}/{LINEAGE}")
        self.lineage = None if lineage is None else Lineage(**lineage)

    def measured(self) -> Measured:
        key, lasting = self._key(), self.lineage is not None  # others may go on from it
        if self.lineage and self.lineage.parent:
            inherit(self.storage, self.lineage.parent, self.run)
        stage = TrainStage(
            self.recipe, self.storage, self._engine(), ignore, self._validation_answers, is_trial=not lasting
        )
        if self.recipe.training.folds:
            return self._validated(stage, key)
        model = stage.train(self.dataset, key, self.run)
        self.storage.write_json(f"{self.run}/{RECORD}", model.model_dump(mode="json"))
        told = was_told_to_stop(model, self.recipe.training) and model.epochs[-1].epoch + 1 != self._end
        return self._measured([model], scores_of(model), "pruned" if told else "complete")

    def _key(self) -> str:
        """Of the model: in a population it is what the whole line of runs made of it."""
        key = train_key(self.recipe, self.dataset)
        if self.lineage is None:
            return key
        before = self.storage.read_json(f"{self.lineage.parent}/{RECORD}") if self.lineage.parent else None
        return sha256_json([key, self.lineage.end, before["key"] if before else None])

    @property
    def _begin(self) -> int:
        return self.lineage.begin if self.lineage else 0

    @property
    def _end(self) -> int | None:
        return self.lineage.end if self.lineage else None

    def write_hparams(self, point: Point, measured: Measured) -> None:
        write_hparams(self.storage.path(self.run), point, measured.metrics)
        self.storage.push(f"{self.run}/{TENSORBOARD}")

    def failed(self, error: OrchestratorError) -> Measured:
        kind = "no_room" if isinstance(error, DiskFull) else error.kind or "raised"
        return Measured("failed", location=self.run, error=str(error), kind=kind, seconds=self._seconds())

    def _validated(self, stage: TrainStage, key: str) -> Measured:
        """By its folds alone: the model is trained if it wins."""
        try:
            folds = stage.cross_validate(self.dataset, key, self.run)
        except _ToldToStop as stop:
            return stop.measured
        assert folds is not None
        return self._fold_measured(folds)

    def _fold_measured(self, folds: CrossValidation) -> Measured:
        found = [self.storage.read_json(f"{run.location}/{RECORD}") for run in folds.runs]
        return self._measured([ModelRecord.model_validate(values) for values in found], folds.mean)

    def _measured(
        self,
        models: Sequence[ModelRecord],
        scores: Mapping[str, float],
        state: Literal["complete", "pruned"] = "complete",
    ) -> Measured:
        """``seconds`` and epochs of all models, the other costs of one."""
        first, seconds = models[0], sum(model.seconds for model in models)
        metrics = {name: scores[name] for name in QUALITY}
        metrics |= {"seconds": seconds, "parameters": float(first.parameters), "size_mb": first.size_bytes / 1e6}
        if self.study.needs_latency:
            metrics["latency_ms"] = measure_here(self._predict_job(first.model_location), self._threads).latency_ms_p50
        return Measured(state, metrics, self.run, sum(len(m.epochs) for m in models) - self._begin, self._seconds())

    def _seconds(self) -> float:
        return time.monotonic() - self.started

    # ------------------------------------------------------------------------------------------------- where it trains

    def _engine(self) -> Engine:
        placement = self.study.placement
        ask = self._ask_after_epoch if units_of(self.recipe.training) > 1 and not self.recipe.training.folds else None
        engine: Engine = Here(placement, ignore, ask) if placement.workers == 1 else self._workers(ask)
        return _FoldByFold(engine, self._ask_after_fold) if self.recipe.training.folds else engine

    def _workers(self, ask: GoOnTraining | None) -> Engine:
        """Several processes, started from within this one, which is on Ray already. Their scratch is no temporary folder:
        nobody would clear it after a kill."""
        from orchestrator.training.on_ray import OnRay

        scratch = self.storage.path(f"{self.run}/{SCRATCH}")
        session = Session(os.environ.get("RAY_ADDRESS", ""), Resources(0, 0, 0, 0, 0), scratch, is_private=False)
        return OnRay(lambda: session, ignore, ask, self.study.placement)

    def _ask_after_epoch(self, position: Position, scores: Scores) -> bool:
        metrics = {name: scores.best[name] for name in QUALITY} | {"seconds": position.seconds}
        if self.study.objective not in metrics or position.epoch == self._begin:
            return True
        measured = Measured("complete", metrics, self.run, position.epoch - self._begin, self._seconds())
        latest = metrics | scores.latest if self.lineage else metrics  # of the weights that an heir would get
        goes_on = self.go_on(position.epoch - 1, latest[self.study.objective], measured)
        return goes_on and position.epoch != self._end

    def _ask_after_fold(self) -> None:
        """Raises _ToldToStop."""
        runs = fold_runs(self.recipe, self.run)
        found = [self.storage.read_json(f"{run.location}/{RECORD}") for run in runs]
        records = [ModelRecord.model_validate(values) for values in found if values]
        if len(records) == len(runs):
            return
        sizes = fold_sizes(self.recipe, self.storage.fetch(self.dataset.location, verify=False), self.dataset.labels)
        measured = self._fold_measured(cross_validation(records, sizes[: len(records)]))
        if self.study.objective in measured.metrics and not self.go_on(
            len(records) - 1, measured.metrics[self.study.objective], measured
        ):
            raise _ToldToStop(measured)

    def _validation_answers(self, model: str) -> np.ndarray:
        return predict_here(self._predict_job(model), self._threads)

    def _predict_job(self, model: str) -> PredictJob:
        size, device = self.recipe.evaluation.batch_size, self.study.placement.device
        return PredictJob(self.recipe.storage, model, self.dataset.location, "validation", size, device)

    @property
    def _threads(self) -> int:
        return int(self.study.placement.cpus_per_worker)


QUALITY = ("macro_f1", "weighted_f1", "accuracy", "loss")


def scores_of(model: ModelRecord) -> dict[str, float]:
    """A model's validation metrics: those of its best epoch, of its members together, or the mean over its folds."""
    best = next(epoch for epoch in model.epochs if epoch.epoch == model.best_epoch).validation
    together = model.ensemble.validation if model.ensemble else None
    scores = model.folds.mean if model.folds else together or best
    return {name: scores[name] for name in QUALITY}


def was_told_to_stop(model: ModelRecord, training: Training) -> bool:
    """By the scheduler, and not by the recipe's own early stopping."""
    if not model.stopped_early:
        return False
    patience, last = training.early_stopping, model.epochs[-1].epoch
    return patience is None or last - model.best_epoch < patience.patience_epochs


class _ToldToStop(Exception):
    def __init__(self, measured: Measured) -> None:
        super().__init__(measured)
        self.measured = measured


@dataclass(frozen=True)
class _FoldByFold:
    """An engine that is asked after each run."""

    engine: Engine
    ask: Callable[[], None]

    def place(self, training: Training, runs: int) -> tuple[Placement, int]:
        return self.engine.place(training, runs)

    def fit(self, jobs: Mapping[str, TrainJob], placement: Placement, at_once: int) -> Iterator[str]:
        for name in self.engine.fit(jobs, placement, at_once):
            yield name
            self.ask()  # the run's record has been written by now
