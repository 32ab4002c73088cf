"""The train stage: a dataset's record in, a model's record out; one run, or the runs of folds and ensembles joined.

Knows which runs there are and what is recorded of them; how a run is trained is ``on_ray.fit``'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orchestrator.data.dataset import Split
from orchestrator.evaluation.metrics import summary
from orchestrator.models.checkpoint import CARD, count_parameters, save_ensemble
from orchestrator.models.ensemble import disagreement
from orchestrator.progress import Event, Report
from orchestrator.recipe import Privacy, Recipe, Training
from orchestrator.recipe_file import to_yaml
from orchestrator.records import CrossValidation, DatasetRecord, Ensemble, EpochMetrics, ModelRecord, PrivacySpent
from orchestrator.session import Session
from orchestrator.storage import METRICS, MODEL, RECIPE, RECORD, Storage, atomic_write, folder_bytes, stage_location
from orchestrator.tasks import TASKS, Task
from orchestrator.training.folds import (
    Run,
    cross_validation,
    fold_runs,
    fold_sizes,
    joined,
    model_runs,
    run_metrics,
)
from orchestrator.training.metrics_log import read_metrics
from orchestrator.training.on_ray import fit, fit_all
from orchestrator.training.placement import place_runs
from orchestrator.training.precision import resolve_precision
from orchestrator.training.privacy import check_privacy
from orchestrator.training.state import latest_state
from orchestrator.training.worker import TrainJob


def _state_bytes(training: Training) -> int:
    """Per parameter, on disk: two checkpoints of weights, both of AdamW's moments and maybe an average, and two models, in
    fp32."""
    return 4 * (2 * (4 if training.averaging else 3) + 2)


@dataclass(frozen=True)
class TrainStage:
    recipe: Recipe
    storage: Storage
    connect: Callable[[], Session]
    """Called when Ray is needed, and not before a mistake in the recipe has been found."""
    report: Report
    predict: Callable[[str], np.ndarray]
    """Location of a model -> its probabilities [rows, classes] of the validation rows."""

    @property
    def task(self) -> Task:
        return TASKS[self.recipe.task]

    def train(self, dataset: DatasetRecord, key: str) -> ModelRecord:
        """Under the stage's ``key``. Raises TrainingFailed, ResourceError, BackboneError, DataError."""

        run = stage_location("train", self.recipe.name, key)
        folds, models = fold_runs(self.recipe, run), model_runs(self.recipe, run)
        rows = fold_sizes(self.recipe, self.storage.fetch(dataset.location), dataset.labels)
        atomic_write(self.storage.path(run) / RECIPE, to_yaml(self.recipe).encode())
        self.storage.push(f"{run}/{RECIPE}")
        validated = cross_validation(self._fit(folds, dataset, key), rows) if folds else None
        members = self._fit(models, dataset, key)
        model = members[0] if models[0].location == run else self._join(members, validated, dataset, run)
        return model.model_copy(update={"folds": validated})

    def _fit(self, runs: Sequence[Run], dataset: DatasetRecord, key: str) -> list[ModelRecord]:
        """A record for each run, in order; several go on side by side, and one that is finished is not done again."""

        found = {run.name: self.storage.read_json(f"{run.location}/{RECORD}") for run in runs}
        records = {name: ModelRecord.model_validate(values) for name, values in found.items() if values}
        missing = {run.name: run for run in runs if run.name not in records}
        if not missing:
            return [records[run.name] for run in runs]
        # What cannot be is said now, not by a worker.
        if self.recipe.training.privacy:
            check_privacy(self.recipe.training.privacy, dataset.splits["train"].rows)
        parameters = count_parameters(self.task.network(self.recipe.model, dataset.labels))
        jobs = {
            name: TrainJob(self.recipe.model_copy(update={"seed": run.seed}), run.location, dataset.location,
                           dataset.labels, _state_bytes(self.recipe.training) * parameters, run.fold)
            for name, run in missing.items()
        }  # fmt: skip
        placement, at_once = place_runs(self.recipe.training, self.connect().resources, len(runs))
        plural = "s" * (placement.workers > 1)
        workers = f"{self.task.backbone(self.recipe.model)} on {placement.workers} {placement.device} worker{plural}"
        if len(runs) == 1:
            self.report(Event("train", message=workers))
            fit(jobs[runs[0].name], placement, self.connect(), self.report)
            return [self._model_record(dataset, key, runs[0].location, placement.workers, placement.device)]
        self.report(
            Event("train", message=f"{len(jobs)} of {len(runs)} runs to do, {at_once} at a time: {workers} each")
        )
        for name in fit_all(jobs, placement, at_once, self.connect(), self.report):
            location = missing[name].location
            records[name] = self._model_record(dataset, key, location, placement.workers, placement.device)
            self.storage.write_json(f"{location}/{RECORD}", records[name].model_dump(mode="json"))
        return [records[run.name] for run in runs]

    def _join(
        self, members: list[ModelRecord], validated: CrossValidation | None, dataset: DatasetRecord, run: str
    ) -> ModelRecord:
        """The members as one model, with what they disagree on; members that are folds have no unseen rows for that."""

        if self.recipe.training.ensemble == "folds" and validated is not None:
            ensemble = Ensemble(members=validated.runs)
        else:
            answers = np.stack([self.predict(m.model_location) for m in members])
            split = Split(self.storage.fetch(dataset.location, verify=False), "validation")
            ensemble = Ensemble(
                members=tuple(run_metrics(member, len(split)) for member in members),
                validation=summary(split.labels, answers.mean(axis=0)), disagreement=disagreement(answers),
            )  # fmt: skip
        folders = [self.storage.fetch(member.model_location) for member in members]
        with self.storage.publish(f"{run}/{MODEL}") as folder:
            save_ensemble(folder, folders)
        return joined(members, run, ensemble, folder_bytes(self.storage.path(f"{run}/{MODEL}")))

    def _model_record(self, dataset: DatasetRecord, key: str, run: str, workers: int, device: str) -> ModelRecord:

        position, _ = latest_state(self.storage, run)
        epochs = [line for line in read_metrics(self.storage.pull(f"{run}/{METRICS}")) if line["kind"] == "validation"]
        folder = self.storage.fetch(f"{run}/{MODEL}")
        metric = self.recipe.training.best_metric
        trained_rows = position.step * self.recipe.training.batch_size
        return ModelRecord(
            name=self.recipe.name, key=key, location=run, model_location=f"{run}/{MODEL}", task=self.recipe.task,
            backbone=self.task.backbone(self.recipe.model), dataset=dataset.key,
            epochs=tuple(_epoch_metrics(line) for line in epochs), best_epoch=position.best_epoch, best_metric=metric,
            best_value=-position.best_value if metric == "loss" else position.best_value, steps=position.step,
            workers=workers, device=device,
            precision=resolve_precision(self.recipe.training, torch.device(device)),
            parameters=json.loads((folder / CARD).read_text())["parameters"], size_bytes=folder_bytes(folder),
            seconds=position.seconds, samples_per_s=trained_rows / max(position.seconds, 1e-9),
            resumed=position.resumed, stopped_early=position.stopped_early,
            privacy=_privacy_spent(self.recipe.training.privacy, epochs[-1]),
        )  # fmt: skip


def _privacy_spent(privacy: Privacy | None, last: dict[str, Any]) -> PrivacySpent | None:
    """``last``: the validation line of the last epoch: the choice of the best one has seen them all."""
    if privacy is None:
        return None
    return PrivacySpent(epsilon=last["epsilon"], delta=privacy.delta, noise_multiplier=last["noise_multiplier"])


def _epoch_metrics(line: dict[str, Any]) -> EpochMetrics:
    scores = {name: line[name] for name in ("loss", "accuracy", "macro_f1", "weighted_f1")}
    return EpochMetrics(epoch=line["epoch"], step=line["step"], train_loss=line["train_loss"], validation=scores,
                        learning_rate=line["learning_rate"], samples_per_s=line["samples_per_s"])  # fmt: skip
