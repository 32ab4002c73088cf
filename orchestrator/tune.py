"""The tune stage: a study of trials, and its winner's model, loaded afresh and scored again.

In: the recipe, a dataset's record. Out: ``StudyRecord``. Joins the search (``tuning``), which knows no training, with the
trials (``trials.py``), which know no study.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from orchestrator.data.dataset import Split
from orchestrator.errors import IntegrityError, RecipeError, ResourceError
from orchestrator.evaluation.metrics import summary
from orchestrator.evaluation.scores import evaluate_predictions
from orchestrator.progress import Event, Report
from orchestrator.recipe import Model, Recipe
from orchestrator.recipe_tuning import MAXIMIZED, Dimension, Tuning
from orchestrator.records import DatasetRecord, ModelRecord, StudyRecord, TrialRecord
from orchestrator.session import Resources, Session
from orchestrator.storage import RECORD, REPORT, Storage, sha256_json, stage_location
from orchestrator.tasks import TASKS
from orchestrator.training.placement import Placement, place_runs
from orchestrator.training.stage import WITHOUT_EFFECT, TrainStage, train_key
from orchestrator.trials import QUALITY, Trials, scores_of, units_of
from orchestrator.tuning import outcome
from orchestrator.tuning.keeper import Keeper
from orchestrator.tuning.population import FIELDS, can_change, generations
from orchestrator.tuning.space import Point, Space, including, recipe_with, value_at
from orchestrator.tuning.study import Study, database_url
from orchestrator.watched import Watched, eligible

_ONLY_HOW_MANY = {"trials", "time_budget_s", "concurrency", "database", "start", "warm_start", "default_first"}
"""Fields of ``tuning`` that a study may go on with another value of."""
_CONFIDENCE, _DEVIATIONS = 0.95, 1.96
_SAME, _ROWS_OF_DIFFERENCE = ("accuracy", "loss"), 3
"""By rounding, a model that is loaded afresh on another processor may answer so many rows differently."""
_INTERVALS = {"loss": "log_loss"}


@dataclass(frozen=True)
class TuneStage:
    recipe: Recipe
    storage: Storage
    connect: Callable[[], Session]
    """Called when Ray is needed, and not before a mistake in the recipe has been found."""
    report: Report
    prepare: Callable[[Model], DatasetRecord]
    """The dataset encoded for another model."""
    answers: Callable[[ModelRecord, DatasetRecord, Placement], np.ndarray]
    """A saved model's probabilities [rows, classes] of the validation rows, computed as its training did, and where."""

    @cached_property
    def tuning(self) -> Tuning:
        assert self.recipe.tuning
        return self.recipe.tuning

    @cached_property
    def plain(self) -> Recipe:
        """The recipe without its search."""
        return recipe_with(self.recipe, {})

    @cached_property
    def space(self) -> Space:
        if self.tuning.space:
            return Space(self.plain, self.tuning.space)
        usual = usual_space(self.plain)
        if self.tuning.scheduler == "pbt":
            usual = {path: dimension for path, dimension in usual.items() if can_change(path)}
        return Space(self.plain, usual)

    @cached_property
    def objectives(self) -> tuple[str, ...]:
        return self.tuning.objectives or (self.recipe.training.best_metric,)

    @property
    def maximized(self) -> tuple[bool, ...]:
        return tuple(objective in MAXIMIZED for objective in self.objectives)

    def study_key(self, dataset: DatasetRecord) -> str:
        """Of everything that makes trials comparable with each other."""
        recipe, apart = self.plain, _ONLY_HOW_MANY
        if (
            self.tuning.scheduler == "pbt"
        ):  # another population is another study: its members were ranked without the new
            apart = apart - {"trials"}
        return sha256_json([
            dataset.key, recipe.model.model_dump(mode="json"), recipe.seed, self.objectives,
            recipe.training.model_dump(mode="json", exclude=WITHOUT_EFFECT | {"workers", "device"}),
            self.tuning.model_dump(mode="json", exclude=apart | {"space", "objectives"}),
            {p.path: p.dimension.model_dump(mode="json") for p in self.space.parameters},
        ])  # fmt: skip

    def key(self, dataset: DatasetRecord) -> str:
        """Of the stage's record: the study, and how far it goes."""
        asked = self.tuning.model_dump(mode="json", include=_ONLY_HOW_MANY - {"concurrency", "database"})
        return sha256_json([self.study_key(dataset), asked])

    def location(self, dataset: DatasetRecord) -> str:
        return stage_location("tune", self.recipe.name, self.study_key(dataset))

    def check(self) -> None:
        """Before anything runs. Raises RecipeError for a space, or points, that do not fit the recipe."""
        if self.tuning.scheduler == "pbt":
            check_population(self.plain, [parameter.path for parameter in self.space.parameters])
        self._first_points()

    # --------------------------------------------------------------------------------------------------------- search

    def tune(self, dataset: DatasetRecord) -> StudyRecord:
        """Run what is left of the study, then make the winner's model sure.

        Raises:
            RecipeError: the space does not fit the recipe.
            ResourceError: a trial needs more than the cluster has.
            TuningFailed: there can be no winner.
            IntegrityError: the winner's model is not what the study recorded.
        """
        points, study = self._first_points(), self._study(dataset)
        self._tell_of(points)
        copied = study.learn_from(self.tuning.warm_start)
        if copied:
            self.report(Event("tune", message=f"{copied} trials of earlier studies are known to the sampler"))
        study.enqueue(points)
        self._search(study, dataset)
        return self._conclude(study, dataset)

    def _study(self, dataset: DatasetRecord) -> Study:
        name = self.location(dataset).rpartition("/")[2]
        database = database_url(self.storage, self.tuning, self.recipe.registry.url)
        study = Study(database, name, self.tuning, self.space, self.objectives, self.recipe.seed)
        had, left = study.counted(), len(study.unfinished())
        told = (
            f"study {name}: {self.tuning.trials} trials of {len(self.space.parameters)} fields, {self.tuning.sampler}"
        )
        told += f"; {had - left} are done" if had else ""
        told += f", {left} go on from where they were" if left else ""
        self.report(Event("tune", message=told))
        return study

    def _first_points(self) -> list[Point]:
        """What is tried before the sampler chooses: the recipe's own values, the points it names, a grid."""
        default = self.default() if self.tuning.default_first else None
        points = [default] if default is not None else []
        for number, point in enumerate(self.tuning.start, start=1):
            self.space.check_point(point, f"tuning.start, point {number}")
            points.append(dict(point))
        return points + (self.space.grid() if self.tuning.sampler == "grid" else [])

    def _tell_of(self, points: list[Point]) -> None:
        if self.tuning.default_first and self.default() is None:
            said = "the recipe's own values lie outside of the space: the winner cannot be compared with them"
            self.report(Event("tune", message=said))
        if self.tuning.sampler == "grid" and len(points) > self.tuning.trials:
            said = f"there are {len(points)} points to try, of which tuning.trials lets {self.tuning.trials} run"
            self.report(Event("tune", message=said))

    def default(self) -> Point | None:
        """The recipe's own values; None if some lie outside of the space."""
        return self.space.default(TASKS[self.recipe.task].learning_rate(self.plain))

    def _search(self, study: Study, dataset: DatasetRecord) -> None:
        from orchestrator.tuning.on_ray import Budget, Room, Watcher, search

        placement, at_once = self._room()
        self.report(Event("tune", message=_told(placement, at_once)))
        needed = {*self.objectives, *self.tuning.constraints}
        trials = Trials(
            self.plain, dataset, self.location(dataset), self.objectives[0], "latency_ms" in needed, placement
        )
        keeper = Keeper(
            study,
            self.storage,
            eligible(self.recipe, (t for t in outcome.records_of(study) if t.state != "running")),
            generations(self.tuning, self.recipe.training),
        )
        shown = Watched(self.recipe, study, trials, keeper, self.storage, self.prepare, self.report, self.default())
        own_workers = placement.workers > 1  # they take the room, the trial's own process only waits for them
        cpus = 0.0 if own_workers else placement.cpus_per_worker
        gpus = float(placement.device == "cuda" and not own_workers)
        deadline = time.monotonic() + self.tuning.time_budget_s if self.tuning.time_budget_s else None
        search(
            study, trials, Room(cpus, gpus, at_once),
            Budget(
                self._how_many(), units_of(self.recipe.training), generations(self.tuning, self.recipe.training), deadline,
                self.recipe.training.max_failures,
            ),
            self.connect(), Watcher(shown.begun, shown.epoch, shown.ended, shown.waiting),
        )  # fmt: skip
        keeper.sweep()

    def _how_many(self) -> int:
        return min(self.tuning.trials, len(self.space.grid())) if self.tuning.sampler == "grid" else self.tuning.trials

    def _room(self) -> tuple[Placement, int]:
        return room_for(self.recipe, self.tuning, self.connect().resources)

    # ------------------------------------------------------------------------------------------------------- conclude

    def _conclude(self, study: Study, dataset: DatasetRecord) -> StudyRecord:
        trials = outcome.records_of(study)
        winner = outcome.choose_winner(eligible(self.recipe, trials), self.objectives, self.maximized, self.tuning)
        recipe = recipe_with(self.recipe, winner.parameters)
        its_dataset = self.prepare(recipe.model) if recipe.model != self.recipe.model else dataset
        model = self._model_of(winner, recipe, its_dataset)
        noise = self._checked_noise(winner, model, its_dataset)
        first, up = self.objectives[0], self.maximized[0]
        measured = outcome.candidates(eligible(self.recipe, trials), self.objectives)
        counts = {state: sum(t.state == state for t in trials) for state in ("complete", "pruned", "failed")}
        location = self.location(dataset)
        record = StudyRecord(
            name=self.recipe.name, key=self.key(dataset), location=location, study=study.name,
            objectives=self.objectives, maximized=self.maximized, trials=len(trials), **counts, winner=winner,
            default=next((t for t in trials if t.is_default), None),
            pareto=outcome.front([t for t in measured if outcome.is_inside(t)], self.objectives, self.maximized),
            noise=noise, within_noise=outcome.within_noise(measured, winner, first, noise or 0.0, maximized=up),
            optimism=outcome.expected_optimism((noise or 0.0) / _DEVIATIONS, len(measured)),
            importances=outcome.importances(eligible(self.recipe, trials), self.space, first, maximized=up),
            epochs=sum(t.epochs for t in trials), seconds=sum(t.seconds for t in trials),
            report=f"{location}/{REPORT}", model=model,
        )  # fmt: skip
        self._write_report(record, trials)
        return record

    def _write_report(self, record: StudyRecord, trials: list[TrialRecord]) -> None:
        from orchestrator.tuning.report import write_report

        unit = "fold" if self.recipe.training.folds else "epoch"
        write_report(self.storage.path(record.report), record, trials, self.tuning, self.space, unit)
        self.storage.push(record.report)

    def _model_of(self, winner: TrialRecord, recipe: Recipe, dataset: DatasetRecord) -> ModelRecord:
        """The trial's; trained to where the trial was, if its process was ended before the model was written, and for
        folds, which are validated without one."""
        from orchestrator.training.on_ray import OnRay

        values = self.storage.read_json(f"{winner.location}/{RECORD}")
        if values is not None and self.storage.exists(ModelRecord.model_validate(values).model_location):
            return ModelRecord.model_validate(values)
        self.report(Event("tune", message=f"training the model of trial {winner.number}"))
        if self.tuning.scheduler == "pbt":
            raise IntegrityError(f"the model of the winner, trial {winner.number}, is gone from {winner.location}",
                                 "restore it, or delete the study to start again")  # fmt: skip
        stop = None if recipe.training.folds else lambda position, scores: position.epoch < winner.epochs
        engine = OnRay(self.connect, self.report, stop, self._room()[0])  # other threads would round otherwise
        stage = TrainStage(recipe, self.storage, engine, self.report, lambda _: np.empty(0))
        model = stage.train(dataset, train_key(recipe, dataset), winner.location)
        self.storage.write_json(f"{winner.location}/{RECORD}", model.model_dump(mode="json"))
        return model

    def _checked_noise(self, winner: TrialRecord, model: ModelRecord, dataset: DatasetRecord) -> float | None:
        """Score the winner's model again; half the width of the interval of its first objective.

        Raises:
            IntegrityError: it is not what was recorded.
        """
        split = Split(self.storage.fetch(dataset.location, verify=False), "validation")
        probabilities = self.answers(model, dataset, self._room()[0])
        again, recorded = summary(split.labels, probabilities), scores_of(model.model_copy(update={"folds": None}))
        self._compare(winner, recorded, again, len(split))
        objective = self.objectives[0]
        if objective not in QUALITY:
            return None
        if model.folds:
            values = [run.validation[objective] for run in model.folds.runs]
            return float(_DEVIATIONS * statistics.stdev(values) / len(values) ** 0.5)
        interval = evaluate_predictions(
            split.labels, probabilities, dataset.labels, samples=self.recipe.evaluation.bootstrap_samples,
            confidence=_CONFIDENCE, seed=self.recipe.seed,
        ).metrics[_INTERVALS.get(objective, objective)]  # fmt: skip
        return (interval.high - interval.low) / 2

    def _compare(self, winner: TrialRecord, recorded: dict[str, float], again: dict[str, float], rows: int) -> None:
        told = {m: f"{m} {again[m]:.6g} instead of {recorded[m]:.6g}" for m in _SAME}
        different = [m for m in _SAME if abs(again[m] - recorded[m]) > _ROWS_OF_DIFFERENCE / rows]
        if different:
            raise IntegrityError(
                f"the model of the winner, trial {winner.number}, loaded afresh has "
                f"{', '.join(told[m] for m in different)} on the validation rows",
                f"its files may have been changed: delete {winner.location} in the storage and run the same command again",
            )
        same = "exactly" if all(again[m] == recorded[m] for m in QUALITY) else "to rounding"
        scores = ", ".join(f"{m} {again[m]:.4f}" for m in QUALITY)
        self.report(Event("tune", message=f"trial {winner.number} loaded afresh: {scores}, {same} as recorded"))


def _told(placement: Placement, at_once: int) -> str:
    workers = f"{placement.workers} workers each" if placement.workers > 1 else "one worker each"
    told = f"{at_once} trials at a time, {workers}, {placement.cpus_per_worker:g} CPUs per worker"
    return told + (" and a GPU" if placement.device == "cuda" else "")


def check_population(recipe: Recipe, paths: Sequence[str]) -> None:
    """Raises RecipeError where a run cannot be handed on in the midst of its training."""
    training = recipe.training
    for path in paths:
        if not can_change(path):
            raise RecipeError(f"tuning.scheduler is pbt, but {path} cannot change in the midst of a run",
                              f"search some of training.{', '.join(FIELDS)}, or take another scheduler")  # fmt: skip
    for name in ("folds", "early_stopping", "privacy"):
        if getattr(training, name) is not None:
            raise RecipeError(f"tuning.scheduler pbt does not go with training.{name}", "leave one of them out")
    if training.ensemble != 1:
        raise RecipeError("tuning.scheduler pbt does not go with training.ensemble", "leave one of them out")


def usual_space(recipe: Recipe) -> dict[str, Dimension]:
    """What the task suggests, stretched to hold the recipe's own values."""
    values = recipe.model_dump(mode="json")
    usual = {path: Dimension.model_validate(d) for path, d in TASKS[recipe.task].search_space.items()}
    return {path: including(dimension, value_at(values, path)) for path, dimension in usual.items()}


def room_for(recipe: Recipe, tuning: Tuning, resources: Resources) -> tuple[Placement, int]:
    """Where each trial goes, and how many go on at a time.

    Raises:
        ResourceError: they cannot all fit at once, or one cannot.
    """
    asked = tuning.trials if tuning.concurrency == "auto" else tuning.concurrency
    placement, at_once = place_runs(recipe.training, resources, asked)
    if tuning.concurrency != "auto" and at_once < tuning.concurrency:
        kind = "GPUs" if placement.device == "cuda" else "CPUs"
        raise ResourceError(
            f"tuning.concurrency is {tuning.concurrency}, which needs {tuning.concurrency * placement.workers} {kind} for "
            f"{placement.workers} worker{'s' * (placement.workers > 1)} per trial, but the cluster has {resources}",
            f"set it to at most {at_once}, or to auto",
        )
    return placement, at_once
