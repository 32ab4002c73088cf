"""What happens while a study runs: said, shown in a table, and acted on.

In: trials as they begin, go on and end. Out: events; a dataset encoded for a trial's own model, and models that cannot win any
more collected. Knows no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace

from orchestrator.progress import Event, Report, format_seconds
from orchestrator.recipe import Model, Recipe
from orchestrator.recipe_tuning import MAXIMIZED
from orchestrator.records import DatasetRecord, TrialRecord
from orchestrator.storage import DATASET, LINEAGE, Storage
from orchestrator.trials import Lineage, Trials, units_of
from orchestrator.tuning.keeper import Keeper
from orchestrator.tuning.measured import Measured
from orchestrator.tuning.outcome import all_failed, is_inside, records_of
from orchestrator.tuning.population import generations
from orchestrator.tuning.space import Point, recipe_with
from orchestrator.tuning.study import DEFAULT, LOCATION, Asked, Study

_GIVE_UP_AFTER = 5


def eligible(recipe: Recipe, trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Those that may win: a trial that was stopped has no whole mean when folds are what is compared."""
    return [trial for trial in trials if trial.state != "pruned" or not recipe.training.folds]


@dataclass(frozen=True)
class _Running:
    point: Point
    began_s: float
    parts: int = 0
    """Epochs, or folds, that are done."""
    value: float | None = None


class Watched:
    """Its methods are a ``tuning.on_ray.Watcher``'s."""

    def __init__(
        self, recipe: Recipe, study: Study, trials: Trials, keeper: Keeper, storage: Storage,
        prepare: Callable[[Model], DatasetRecord], report: Report, default: Point | None,
    ) -> None:  # fmt: skip
        self.recipe, self.study, self.trials, self.keeper, self.storage = recipe, study, trials, keeper, storage
        self.prepare, self.report, self.default = prepare, report, default
        self.objective, self.part = study.objectives[0], "fold" if recipe.training.folds else "epoch"
        self.running: dict[int, _Running] = {}
        self.ended_before = sum(trial.state != "running" for trial in records_of(study))
        self.ended_now, self.failed = 0, list[TrialRecord]()

    def begun(self, asked: Asked) -> None:
        number, point = asked.number, asked.point
        self.study.note(number, **{LOCATION: self.trials.location_of(number)})
        if point == self.default and asked.parent is None:
            self.study.note(number, **{DEFAULT: True})
        if self.study.tuning.scheduler == "pbt":
            lineage = self._lineage(asked)
            self.storage.write_json(f"{self.trials.location_of(number)}/{LINEAGE}", asdict(lineage))
        if any(path.startswith("model.") for path in point):
            dataset = self.prepare(recipe_with(self.recipe, point).model)
            self.storage.write_json(f"{self.trials.location_of(number)}/{DATASET}", dataset.model_dump(mode="json"))
        self.running[number] = _Running(point, time.monotonic())
        self._progress()

    def _lineage(self, asked: Asked) -> Lineage:
        part = self.study.tuning.min_epochs
        parent = None if asked.parent is None else self.trials.location_of(asked.parent)
        return Lineage(parent, asked.generation * part, (asked.generation + 1) * part)

    def epoch(self, asked: Asked, parts: int, measured: Measured) -> None:
        now = self.running[asked.number]
        self.running[asked.number] = replace(now, parts=parts, value=measured.metrics.get(self.objective))
        self._progress()

    def ended(self, asked: Asked, measured: Measured) -> None:
        """Raises TuningFailed when one trial after the other fails: the recipe is to blame, not their values."""
        self.running.pop(asked.number, None)
        trial = TrialRecord(
            number=asked.number, state=measured.state, parameters=asked.point, metrics=measured.metrics,
            violations=tuple(self.study.violations(measured).values()), epochs=measured.epochs, seconds=measured.seconds,
            location=measured.location or self.trials.location_of(asked.number), error=measured.error,
            kind=measured.kind, is_default=asked.point == self.default and asked.parent is None, parent=asked.parent,
        )  # fmt: skip
        for candidate in eligible(self.recipe, [trial]):
            self.keeper.decide(candidate)
        self.ended_now += 1
        self.failed += [trial] if trial.state == "failed" else []
        self.report(Event("tune", message=self._told(trial, asked.parent)))
        self._progress()
        if not self.keeper.kept and len(self.failed) == self.ended_now >= _GIVE_UP_AFTER:
            raise all_failed(self.failed)

    def waiting(self) -> None:
        said = "no trial can begin: something else is using the cluster; see who: ray status, ray list actors"
        self.report(Event("tune", message=said))

    def _told(self, trial: TrialRecord, parent: int | None) -> str:
        name = f"trial {trial.number}" + (" (the recipe's own values)" if trial.is_default else "")
        name += "" if parent is None else f", from trial {parent}"
        if trial.state == "failed":
            return f"{name} failed: {trial.error}; {_values(trial.parameters)}"
        scores = ", ".join(f"{o} {trial.metrics[o]:.4g}" for o in self.study.objectives if o in trial.metrics)
        outside = "" if is_inside(trial) else ", outside of the constraints"
        stopped = ", stopped early" if trial.state == "pruned" else ""
        best = ", the best so far" if self.study.is_single and trial in self.keeper.kept else ""
        after = f", {trial.epochs} epoch{'s' * (trial.epochs != 1)} in {format_seconds(trial.seconds)}"
        return f"{name}: {scores}{outside}{stopped}{best}{after}; {_values(trial.parameters)}"

    def _progress(self) -> None:
        best = [trial.metrics[self.objective] for trial in self.keeper.kept]
        figures: dict[str, float | int | str] = {}
        if self.running:
            running = (f"{n} ({self.part} {now.parts + 1})" for n, now in sorted(self.running.items()))
            figures["running"] = ", ".join(running)
        if best:
            figures[f"best {self.objective}"] = max(best) if self.objective in MAXIMIZED else min(best)
        total = self.study.tuning.trials * generations(self.study.tuning, self.recipe.training)
        done = self.ended_before + self.ended_now
        self.report(Event("tune", done=done, total=max(done, total), figures=figures, table=self._table()))

    def _table(self) -> tuple[tuple[str, ...], ...]:
        """The best so far, and what runs now."""
        parts = units_of(self.recipe.training)
        rows = [("trial", f"{self.part}s", self.objective, "for", "left", "values")]
        for trial in self.keeper.kept[:3]:
            value = f"{trial.metrics[self.objective]:.4g}"
            rows.append(
                (f"{trial.number} best", "", value, format_seconds(trial.seconds), "", _values(trial.parameters))
            )
        for number, now in sorted(self.running.items()):
            took = time.monotonic() - now.began_s
            left = format_seconds(took / now.parts * (parts - now.parts)) if now.parts else ""
            value = "" if now.value is None else f"{now.value:.4g}"
            rows.append((str(number), f"{now.parts}/{parts}", value, format_seconds(took), left, _values(now.point)))
        return tuple(rows)


def _values(point: Point) -> str:
    return ", ".join(f"{path.removeprefix('training.')} {_short(value)}" for path, value in point.items())


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
