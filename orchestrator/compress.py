"""The compress stage: a sweep over candidates of a trained model, and the best that keeps the limits, measured once more.

In: the recipe, a model's record, its dataset's. Out: ``CompressionRecord``. Joins the search (``tuning``), which knows no
compression, with the candidates (``candidates.py``), which know no study.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from orchestrator.candidates import Candidates, Student, has_student, settings_of
from orchestrator.compression.changes import changes_of
from orchestrator.compression.limits import bounds_of, misses, nobody_keeps
from orchestrator.compression.measuring import QUALITY, scaled
from orchestrator.compression.on_ray import FinalCosts, FinalJob, ask_teacher_on_ray, final_costs_on_ray, survey_on_ray
from orchestrator.compression.presets import FORM, first_points, usual_space
from orchestrator.compression.survey import Survey, SurveyJob
from orchestrator.compression.tokens import that_train
from orchestrator.data.dataset import SLICE, Split
from orchestrator.errors import CompressionFailed, IntegrityError, RecipeError
from orchestrator.evaluation.metrics import summary
from orchestrator.exporting.forms import available
from orchestrator.families import Families
from orchestrator.models.checkpoint import CARD
from orchestrator.progress import Event, Report
from orchestrator.recipe import Augmentation, Recipe
from orchestrator.recipe_compression import Compression
from orchestrator.recipe_file import to_yaml
from orchestrator.recipe_tuning import MAXIMIZED, Tuning
from orchestrator.records import CompressionRecord, DatasetRecord, ModelRecord, TrialRecord
from orchestrator.session import Session
from orchestrator.storage import (
    METRICS,
    MODEL,
    RECIPE,
    REPORT,
    STUDENTS,
    SURVEY,
    TEACHER,
    Storage,
    atomic_write,
    folder_bytes,
    sha256_json,
    stage_location,
)
from orchestrator.tasks import TASKS
from orchestrator.training.placement import Placement, place_runs
from orchestrator.training.stage import WITHOUT_EFFECT
from orchestrator.tuning import outcome
from orchestrator.tuning.keeper import Keeper
from orchestrator.tuning.space import Point, Space, recipe_with
from orchestrator.tuning.study import Study, database_url
from orchestrator.watched_candidates import WatchedCandidates

_ONLY_HOW_MANY = {"trials", "time_budget_s", "concurrency", "finalists"}
"""Fields of ``compression`` that a study may go on with another value of."""
_ROWS_OF_DIFFERENCE = 3
"""By rounding, a model that is loaded afresh on another processor may answer so many rows differently."""
_UNCOMPRESSED = -1


@dataclass(frozen=True)
class CompressStage:
    recipe: Recipe
    """Of the model's training; without a search."""
    storage: Storage
    connect: Callable[[], Session]
    report: Report
    answers: Callable[[ModelRecord, DatasetRecord, Placement], np.ndarray]
    """A saved model's probabilities [rows, classes] of the validation rows."""

    @property
    def settings(self) -> Compression:
        return settings_of(self.recipe)

    @cached_property
    def forms(self) -> dict[str, str]:
        """Form -> nothing, or why it is not to be had here."""
        return available()

    def key(self, parent: ModelRecord, dataset: DatasetRecord) -> str:
        """Of the stage's record: the study, and how far it goes."""
        asked = self.settings.model_dump(mode="json", include=_ONLY_HOW_MANY - {"concurrency"})
        return sha256_json([self.study_key(parent, dataset), asked])

    def study_key(self, parent: ModelRecord, dataset: DatasetRecord) -> str:
        """Of everything that makes candidates comparable with each other."""
        here = None if self.settings.space else sorted(name for name, why in self.forms.items() if not why)
        return sha256_json([
            parent.key, dataset.key, self.recipe.seed, self.recipe.serving.max_batch_size, here,
            self.settings.model_dump(mode="json", exclude=_ONLY_HOW_MANY),
            self.recipe.training.model_dump(mode="json", exclude=WITHOUT_EFFECT | {"workers", "device"}),
        ])  # fmt: skip

    def location(self, parent: ModelRecord, dataset: DatasetRecord) -> str:
        return stage_location("compress", self.recipe.name, self.study_key(parent, dataset))

    def check(self) -> None:
        """Before anything runs. Raises RecipeError for a space that does not fit, or a form that is not to be had here."""
        space = Space(self.recipe, self.settings.space or {}, "compression")
        named = {p.path: p.dimension.values for p in space.parameters}.get("compression.form", (self.settings.form,))
        for form in named:
            if why := self.forms[form]:
                raise RecipeError(f"compression.form {form} is not to be had here", why)

    # --------------------------------------------------------------------------------------------------------- search

    def compress(self, parent: ModelRecord, dataset: DatasetRecord) -> CompressionRecord:
        """Run what is left of the sweep, then measure the best once more and take the best that keeps the limits.

        Raises:
            RecipeError: a method does not apply to this architecture.
            CompressionFailed: every candidate failed, or none keeps the limits.
            IntegrityError: the winner's model is not what the study recorded.
        """
        return _Sweep(self, parent, dataset).run()


class _Sweep:
    """Of one model, under way."""

    def __init__(self, stage: CompressStage, parent: ModelRecord, dataset: DatasetRecord) -> None:
        self.stage, self.parent, self.dataset = stage, parent, dataset
        self.recipe, self.settings, self.storage = stage.recipe, stage.settings, stage.storage
        self.report, self.location = stage.report, stage.location(parent, dataset)
        self.objectives = self.settings.objectives
        self.maximized = tuple(objective in MAXIMIZED for objective in self.objectives)
        self.placement, self.at_once = self._room()
        self.survey = self._survey()
        self.split = Split(self.storage.fetch(dataset.location, verify=False), "validation")
        self.before = self._before()
        self.space = self._space()
        self.families = self._families()

    def run(self) -> CompressionRecord:
        study = self._study()
        study.enqueue(self._first_points() + (self._grid() if self.settings.sampler == "grid" else []))
        self._search(study)
        trials = outcome.records_of(study)
        finalists, winner, costs = self._decide(trials)
        record = self._record(study, trials, finalists, winner, costs)
        self._write_report(record, trials)
        self._clear(trials, record)
        return record

    def _room(self) -> tuple[Placement, int]:
        asked = self.settings.trials if self.settings.concurrency == "auto" else self.settings.concurrency
        return place_runs(self.recipe.training, self.stage.connect().resources, asked)

    def _survey_job(self) -> SurveyJob:
        return SurveyJob(
            self.storage.url, self.parent.model_location, self.dataset.location, self.settings.calibration_rows,
            self.recipe.evaluation.batch_size, self.recipe.serving.max_batch_size, self.settings.threads,
            self._cpus(), self.recipe.seed, self.placement.device,
        )  # fmt: skip

    def _cpus(self) -> int:
        """Of one node, for what runs while nothing else does."""
        there = self.stage.connect().resources
        return max(1, int(min(there.free_cpus, there.cpus_of_largest_node)))

    def _survey(self) -> Survey:
        place = f"{self.location}/{SURVEY}"
        values = self.storage.read_json(place)
        if values is None:
            self.report(Event("compress", message="looking at which parts of the model matter, and what it costs here"))
            values = survey_on_ray(self._survey_job()).to_json()
            self.storage.write_json(place, values)
        return Survey.from_json(values)

    def _before(self) -> dict[str, float]:
        scores = summary(self.split.labels, self.survey.probabilities)
        costs = scaled(self.survey.costs, self.survey.costs, self.survey.costs)
        return {name: scores[name] for name in QUALITY} | {"agreement": 1.0} | costs

    def _space(self) -> Space:
        """Raises RecipeError where a method that is asked for does not apply."""
        methods = that_train(self.survey.methods, self.recipe.training)
        usual = usual_space(methods, self.stage.forms, self.settings, self.recipe.model.max_tokens)
        space = Space(self.recipe, self.settings.space or usual, "compression")
        searched = {p.path.removeprefix("compression.") for p in space.parameters}
        for method, why in methods.items():
            untouched = Compression.model_fields[method].default
            if why and (method in searched or getattr(self.settings, method) != untouched):
                raise RecipeError(f"compression.{method} does not apply to {self.parent.backbone}", why)
            if why:
                self.report(Event("compress", message=f"no {method}: {why}"))
        return space

    def _first_points(self) -> list[Point]:
        dimensions = {p.path: p.dimension for p in self.space.parameters}
        points = first_points(dimensions, self.space.default(0.0), self.settings.trials)
        return [point for point in points if self.space.contains(point)][: max(1, self.settings.trials * 2 // 3)]

    def _grid(self) -> list[Point]:
        """Every student in one form, then in the next: two forms of one student would wait for each other."""
        forms = self.families.forms
        return sorted(self.space.grid(), key=lambda point: forms.index(point[FORM]) if forms else 0)

    def _families(self) -> Families:
        forms = next((p.dimension.values for p in self.space.parameters if p.path == FORM), ())
        return Families(
            self.recipe, forms, self.objectives[0], len(self.split),
            lambda student: self.storage.exists(f"{self.location}/{STUDENTS}/{student}"),
        )  # fmt: skip

    def _study(self) -> Study:
        tuning = self._tuning()
        name = self.location.rpartition("/")[2]
        database = database_url(self.storage, tuning, self.recipe.registry.url)
        study = Study(database, f"compress-{name}", tuning, self.space, self.objectives, self.recipe.seed,
                      family=self.families.name)  # fmt: skip
        had, left = study.counted(), len(study.unfinished())
        told = f"study {study.name}: {self.settings.trials} candidates of {len(self.space.parameters)} fields"
        told += f"; {had - left} are done" if had else ""
        told += f", {left} go on from where they were" if left else ""
        self.report(Event("compress", message=told))
        return study

    def _tuning(self) -> Tuning:
        """As the search knows it: the limits are its constraints."""
        settings = self.settings
        tuning = Tuning(trials=settings.trials, sampler=settings.sampler, startup_trials=settings.startup_trials,
                        scheduler="none")  # fmt: skip
        bounds = bounds_of(settings.limits, self.before)
        return tuning.model_copy(update={"objectives": self.objectives, "constraints": bounds})

    def _search(self, study: Study) -> None:
        from orchestrator.tuning.on_ray import Budget, Room, Watcher, search

        candidates = Candidates(
            self.recipe, self.parent, self.dataset, self.survey, self.location, self.placement, self._answers()
        )
        keeper = Keeper(study, self.storage, (t for t in outcome.records_of(study) if t.state != "running"))
        shown = WatchedCandidates(study, candidates, keeper, self.families, self.settings, self.before, self.report)
        own_workers = self.placement.workers > 1  # they take the room, the candidate's own process only waits for them
        cpus = 0.0 if own_workers else self.placement.cpus_per_worker
        gpus = float(self.placement.device == "cuda" and not own_workers)
        budget_s = self.settings.time_budget_s
        search(
            study, candidates, Room(cpus, gpus, self.at_once),
            Budget(self.settings.trials, 1, deadline=time.monotonic() + budget_s if budget_s else None, max_failures=1),
            self.stage.connect(), Watcher(shown.begun, shown.epoch, shown.ended, shown.waiting),
        )  # fmt: skip
        keeper.sweep()

    def _answers(self) -> str | None:
        """Location of the uncompressed model's on the training rows, if students learn them and a row is always the same."""
        recovery, training, path = self.settings.recovery, self.recipe.training, "compression.recovery."
        searched = {p.path.removeprefix(path) for p in self.space.parameters if p.path.startswith(path)}
        taught = (recovery.epochs and recovery.distillation) or searched & {"epochs", "distillation"}
        altered = recovery.altered and "altered" not in searched and TASKS[self.recipe.task].input_kind == "text"
        if (recovery.hidden and "hidden" not in searched) or altered:
            return None  # students have it beside them anyway
        students = has_student(self.settings) or any(p.path != FORM for p in self.space.parameters)
        if not taught or not students or training.mixup or training.augmentation != Augmentation():
            return None
        location = f"{self.location}/{TEACHER}"
        if not self.storage.exists(location):
            self.report(Event("compress", message="asking the uncompressed model about the training rows"))
            ask_teacher_on_ray(self._survey_job(), location)
        return location

    # --------------------------------------------------------------------------------------------------------- decide

    def _decide(self, trials: Sequence[TrialRecord]) -> tuple[list[TrialRecord], TrialRecord, FinalCosts]:
        """Measure those that kept the limits once more, the most promising first, until one keeps them again."""
        measured = outcome.candidates(trials, self.objectives)
        if not measured:
            raise self._all_failed(trials)
        kept = [t for t in measured if not misses(self.settings.limits, self._known(t), self.before)]
        if not kept:
            raise nobody_keeps(self.settings.limits, {t.number: self._known(t) for t in measured}, self.before)
        ranked = self._ranked(kept)
        tried: list[TrialRecord] = []
        while ranked:
            some, ranked = ranked[: self.settings.finalists], ranked[self.settings.finalists :]
            costs = self._measured_once_more(some)
            again = [t.model_copy(update={"metrics": t.metrics | self._costs(t, costs)}) for t in some]
            tried += again
            inside = [t for t in again if not misses(self.settings.limits, t.metrics, self.before)]
            if inside:
                return again, self._ranked(inside)[0], costs
        raise nobody_keeps(self.settings.limits, {t.number: t.metrics for t in tried}, self.before)

    def _known(self, trial: TrialRecord) -> dict[str, float]:
        """Memory is measured at the end only: until then nobody is outside of it."""
        return {"memory_mb": 0.0} | trial.metrics

    def _ranked(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Those of the front first; by the first objective, the earliest of equals."""
        front = set(outcome.front(trials, self.objectives, self.maximized))
        first, sign = self.objectives[0], -1 if self.maximized[0] else 1
        there = [t for t in trials if self.storage.exists(f"{t.location}/{MODEL}")]
        return sorted(there, key=lambda t: (t.number not in front, sign * t.metrics[first], t.number))

    def _measured_once_more(self, some: Sequence[TrialRecord]) -> FinalCosts:
        told = ", ".join(str(t.number) for t in some)
        self.report(Event("compress", message=f"measuring candidates {told} once more, beside the uncompressed model"))
        models = {_UNCOMPRESSED: self.parent.model_location} | {t.number: f"{t.location}/{MODEL}" for t in some}
        return final_costs_on_ray(FinalJob(self._survey_job(), models))

    def _costs(self, trial: TrialRecord, costs: FinalCosts) -> dict[str, float]:
        return scaled(costs.as_served[trial.number], costs.as_served[_UNCOMPRESSED], self.survey.costs)

    def _all_failed(self, trials: Sequence[TrialRecord]) -> CompressionFailed:
        first = next((t for t in trials if t.error), None)
        if first is None:
            return CompressionFailed("no candidate was measured", "raise compression.time_budget_s")
        failed = sum(t.state == "failed" for t in trials)
        return CompressionFailed(
            f"{first.error} (candidate {first.number}; {failed} of {len(trials)} failed)",
            "see whether another form goes: --set compression.form=onnxruntime-int8 --set compression.trials=1",
        )

    # --------------------------------------------------------------------------------------------------------- record

    def _record(
        self, study: Study, trials: Sequence[TrialRecord], finalists: Sequence[TrialRecord], winner: TrialRecord,
        costs: FinalCosts,
    ) -> CompressionRecord:  # fmt: skip
        model = self._model(winner)
        probabilities = self._checked(winner, model)
        measured = outcome.candidates(trials, self.objectives)
        inside = [t for t in measured if not misses(self.settings.limits, self._known(t), self.before)]
        everywhere = costs.all_threads[_UNCOMPRESSED]
        labels, before = self.split.labels, self.survey.probabilities
        allowed = self.settings.limits.macro_f1_drop
        columns = {name: self.split.column(f"{SLICE}{name}").to_pylist() for name in self.dataset.slices}
        classes, slices = changes_of(labels, before, probabilities, self.dataset.labels, columns, allowed)
        return CompressionRecord(
            name=self.recipe.name, key=self.stage.key(self.parent, self.dataset), location=self.location,
            study=study.name, parent=self.parent.key,
            before=self.before | {"memory_mb": costs.as_served[_UNCOMPRESSED].peak_rss_bytes / 1e6},
            objectives=self.objectives, maximized=self.maximized, trials=len(trials),
            complete=sum(t.state == "complete" for t in trials), failed=sum(t.state == "failed" for t in trials),
            winner=winner, finalists=tuple(finalists),
            all_threads={n: scaled(c, everywhere, everywhere) for n, c in costs.all_threads.items()},
            pareto=outcome.front(inside, self.objectives, self.maximized),
            refused=self._refused(trials, finalists, winner), methods=self.survey.methods, forms=self.stage.forms,
            classes=classes, slices=slices, seconds=sum(t.seconds for t in trials),
            report=f"{self.location}/{REPORT}", model=model,
        )  # fmt: skip

    def _refused(
        self, trials: Sequence[TrialRecord], finalists: Sequence[TrialRecord], winner: TrialRecord
    ) -> dict[int, str]:
        again = {t.number: t for t in finalists}
        return {t.number: self._why(again.get(t.number, t), winner) for t in trials if t.number != winner.number}

    def _why(self, trial: TrialRecord, winner: TrialRecord) -> str:
        if trial.state == "failed":
            return trial.error.splitlines()[0] if trial.error else "failed"
        if trial.state == "running" or self.objectives[0] not in trial.metrics:
            return "not measured"
        if outside := misses(self.settings.limits, self._known(trial), self.before):
            return ", ".join(f"{m.limit} {m.measured:.4g} where {m.asked:.4g} is asked" for m in outside)
        first = self.objectives[0]
        return f"keeps the limits; {first} {trial.metrics[first]:.4g}, the chosen one's {winner.metrics[first]:.4g}"

    def _model(self, winner: TrialRecord) -> ModelRecord:
        """The parent's record, with what is the candidate's own."""
        recipe, location = recipe_with(self.recipe, winner.parameters), f"{winner.location}/{MODEL}"
        for name, content in ((RECIPE, to_yaml(recipe).encode()), (METRICS, self._training_metrics())):
            atomic_write(self.storage.path(self.location) / name, content)
            self.storage.push(f"{self.location}/{name}")
        folder, metric = self.storage.fetch(location), self.parent.best_metric
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        return self.parent.model_copy(update={
            "key": sha256_json([self.parent.key, winner.parameters, self.location]), "location": self.location,
            "model_location": location, "best_value": winner.metrics[metric], "parameters": card["parameters"],
            "size_bytes": folder_bytes(folder), "parent": self.parent.key, "form": settings_of(recipe).form,
            "folds": None, "ensemble": None,
        })  # fmt: skip

    def _training_metrics(self) -> bytes:
        """The parent's curves: what the report of the evaluation draws."""
        run = self.parent.ensemble.members[0].location if self.parent.ensemble else self.parent.location
        path = self.storage.pull(f"{run}/{METRICS}")
        return path.read_bytes() if path.is_file() else b""  # of a registered version, whose run may be gone

    def _checked(self, winner: TrialRecord, model: ModelRecord) -> np.ndarray:
        """The validation rows' probabilities by the winner's model, loaded afresh."""
        probabilities = self.stage.answers(model, self.dataset, self.placement)
        again = summary(self.split.labels, probabilities)
        if abs(again["accuracy"] - winner.metrics["accuracy"]) > _ROWS_OF_DIFFERENCE / len(self.split):
            raise IntegrityError(
                f"the model of candidate {winner.number}, loaded afresh, has accuracy {again['accuracy']:.6g} instead of "
                f"{winner.metrics['accuracy']:.6g} on the validation rows",
                f"its files may have been changed: delete {winner.location} in the storage and run the same command again",
            )
        scores = ", ".join(f"{m} {again[m]:.4f}" for m in QUALITY)
        self.report(Event("compress", message=f"candidate {winner.number} loaded afresh: {scores}"))
        return probabilities

    def _write_report(self, record: CompressionRecord, trials: Sequence[TrialRecord]) -> None:
        from orchestrator.compression.report import write_report

        write_report(self.storage.path(record.report), record, trials, self.settings)
        self.storage.push(record.report)

    def _clear(self, trials: Sequence[TrialRecord], record: CompressionRecord) -> None:
        """Students whose candidates are all beaten; a later candidate that wants one makes it anew."""
        kept = {t.number for t in record.finalists} | set(record.pareto)
        names = {Student.name_of(recipe_with(self.recipe, t.parameters)) for t in trials if t.number in kept}
        folder = self.storage.path(f"{self.location}/{STUDENTS}")
        for student in folder.iterdir() if folder.is_dir() else ():
            if student.name not in names:
                self.storage.remove(f"{self.location}/{STUDENTS}/{student.name}")
