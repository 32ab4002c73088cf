"""The train stage: a dataset's record in, a model's record out; one run, or the runs of folds and ensembles joined.

Knows which runs there are and what is recorded of them; how a run is trained is the engine's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from orchestrator.data.dataset import Split
from orchestrator.errors import RecipeError
from orchestrator.evaluation.metrics import summary
from orchestrator.models.backbones import Network, load_network
from orchestrator.models.checkpoint import CARD, count_parameters, save_ensemble
from orchestrator.models.ensemble import disagreement
from orchestrator.progress import Event, Report
from orchestrator.recipe import Privacy, Recipe, Training
from orchestrator.recipe_file import to_yaml
from orchestrator.records import CrossValidation, DatasetRecord, Ensemble, EpochMetrics, ModelRecord, PrivacySpent
from orchestrator.storage import (
    METRICS,
    MODEL,
    RECIPE,
    RECORD,
    Storage,
    atomic_write,
    folder_bytes,
    sha256_json,
    stage_location,
)
from orchestrator.tasks import TASKS, Task
from orchestrator.training.distillation import require_teacher
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
from orchestrator.training.placement import Placement
from orchestrator.training.precision import resolve_precision
from orchestrator.training.privacy import check_privacy
from orchestrator.training.state import latest_state
from orchestrator.training.worker import TrainJob


def _state_bytes(training: Training) -> int:
    """Per parameter, on disk: two checkpoints of weights, both of AdamW's moments and maybe an average, and two models, in
    fp32."""
    return 4 * (2 * (4 if training.averaging else 3) + 2)


WITHOUT_EFFECT = {"max_failures", "max_rollbacks", "hang_timeout_s", "disk_full_patience_s",
                  "checkpoint_every_steps", "checkpoint_every_s"}  # fmt: skip
"""Fields of ``training`` that do not change the weights it ends with."""


def train_key(recipe: Recipe, dataset: DatasetRecord) -> str:
    """Of the model that this recipe makes of this dataset."""
    settings = recipe.training.model_dump(exclude=WITHOUT_EFFECT, mode="json")
    return sha256_json([dataset.key, recipe.model.model_dump(mode="json"), settings, recipe.seed])


class Engine(Protocol):
    """Where runs are trained: on Ray (``on_ray.OnRay``) or in this process (``here.Here``)."""

    def place(self, training: Training, runs: int) -> tuple[Placement, int]:
        """Where each of several equal runs goes, and how many go on at a time."""

    def fit(self, jobs: Mapping[str, TrainJob], placement: Placement, at_once: int) -> Iterator[str]:
        """Train all; gives the name of each when it is finished."""


@dataclass(frozen=True)
class TrainStage:
    recipe: Recipe
    storage: Storage
    engine: Engine
    report: Report
    predict: Callable[[str], np.ndarray]
    """Location of a model -> its probabilities [rows, classes] of the validation rows."""
    is_trial: bool = False
    start: str | None = None
    teacher: str | None = None
    answers: str | None = None
    """See ``TrainJob``. The stage's key has to tell what is started from and learned from."""

    @property
    def task(self) -> Task:
        return TASKS[self.recipe.task]

    def train(self, dataset: DatasetRecord, key: str, run: str | None = None) -> ModelRecord:
        """Under the stage's ``key``. ``run``: the run's folder, if it is not the one that follows from the key.

        Raises TrainingFailed, ResourceError, BackboneError, DataError.
        """
        run = run or stage_location("train", self.recipe.name, key)
        validated = self.cross_validate(dataset, key, run)
        runs = model_runs(self.recipe, run)
        members = self._fit(runs, dataset, key)
        model = members[0] if runs[0].location == run else self._join(members, validated, dataset, run)
        return model.model_copy(update={"folds": validated})

    def cross_validate(self, dataset: DatasetRecord, key: str, run: str) -> CrossValidation | None:
        """The runs of the folds alone; None if the recipe asks for none."""
        atomic_write(self.storage.path(run) / RECIPE, to_yaml(self.recipe).encode())
        self.storage.push(f"{run}/{RECIPE}")
        rows = fold_sizes(self.recipe, self.storage.fetch(dataset.location), dataset.labels)
        return cross_validation(self._fit(fold_runs(self.recipe, run), dataset, key), rows) if rows else None

    def _fit(self, runs: Sequence[Run], dataset: DatasetRecord, key: str) -> list[ModelRecord]:
        """A record for each run, in order; one that is finished is not done again."""
        found = {run.name: self.storage.read_json(f"{run.location}/{RECORD}") for run in runs}
        records = {name: ModelRecord.model_validate(values) for name, values in found.items() if values}
        missing = {run.name: run for run in runs if run.name not in records}
        if not missing:
            return [records[run.name] for run in runs]
        jobs = self._jobs(missing, dataset)
        placement, at_once = self.engine.place(self.recipe.training, len(runs))
        self.report(Event("train", message=self._told(placement, at_once, len(jobs), len(runs))))
        for name in self.engine.fit(jobs, placement, at_once):
            location = missing[name].location
            records[name] = self._model_record(dataset, key, location, placement.workers, placement.device)
            if len(runs) > 1:
                self.storage.write_json(f"{location}/{RECORD}", records[name].model_dump(mode="json"))
        return [records[run.name] for run in runs]

    def _jobs(self, runs: Mapping[str, Run], dataset: DatasetRecord) -> dict[str, TrainJob]:
        """What cannot be is said here, not by a worker."""
        if self.recipe.training.privacy:
            check_privacy(self.recipe.training.privacy, dataset.splits["train"].rows)
        require_teacher(self.recipe.training.distillation, self.teacher)
        self._check_start()
        state_bytes = _state_bytes(self.recipe.training) * count_parameters(self._network(dataset.labels))
        return {
            name: TrainJob(self.recipe.model_copy(update={"seed": run.seed}), run.location, dataset.location,
                           dataset.labels, state_bytes, run.fold, self.is_trial, self.start, self.teacher,
                           self.answers)
            for name, run in runs.items()
        }  # fmt: skip

    def _check_start(self) -> None:
        """Raises RecipeError: what the started network has seen already would not be counted."""
        training = self.recipe.training
        if self.start and (training.privacy or training.folds):
            name, seen = ("privacy", "trained on") if training.privacy else ("folds", "validated on")
            raise RecipeError(f"training.{name} does not go with a network that has seen the rows it is {seen}",
                              f"set training.{name} to null")  # fmt: skip

    def _network(self, labels: tuple[str, ...]) -> Network:
        if self.start is None:
            return self.task.network(self.recipe.model, labels)
        return load_network(self.storage.fetch(self.start))

    def _told(self, placement: Placement, at_once: int, left: int, runs: int) -> str:
        plural = "s" * (placement.workers > 1)
        workers = f"{self.task.backbone(self.recipe.model)} on {placement.workers} {placement.device} worker{plural}"
        return workers if runs == 1 else f"{left} of {runs} runs to do, {at_once} at a time: {workers} each"

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
