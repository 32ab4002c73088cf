"""The evaluate stage: a model's answers to the test rows, what they are worth and what one costs, and the report.

In: a model's record, its dataset's. Out: ``EvaluationRecord``. Joins predicting on Ray with metrics and pages, which know no
Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from orchestrator.data.dataset import SLICE, Split
from orchestrator.evaluation.on_ray import Cost, PredictJob, measure_cost, predict_inputs, predict_split
from orchestrator.evaluation.predictions import picture_of, write_predictions, write_samples
from orchestrator.evaluation.scores import evaluate_predictions, slice_scores
from orchestrator.progress import Event, Report
from orchestrator.recipe import Recipe
from orchestrator.recipe_file import to_yaml
from orchestrator.records import DatasetRecord, EvaluationRecord, ModelRecord
from orchestrator.session import Session
from orchestrator.storage import (
    METRICS,
    PREDICTIONS,
    RECIPE,
    RECORD,
    REPORT,
    SAMPLES,
    Storage,
    sha256_json,
    stage_location,
)
from orchestrator.training.metrics_log import read_metrics
from orchestrator.training.placement import Placement, place_workers


@dataclass(frozen=True)
class EvaluateStage:
    recipe: Recipe
    storage: Storage
    connect: Callable[[], Session]
    report: Report

    def key(self, model: ModelRecord, dataset: DatasetRecord) -> str:
        settings = self.recipe.evaluation.model_dump(mode="json")
        return sha256_json([model.key, dataset.key, settings, self.recipe.seed])

    def evaluate(self, model: ModelRecord, dataset: DatasetRecord) -> EvaluationRecord:
        started, key = time.monotonic(), self.key(model, dataset)
        self.report(Event("evaluate", message=f"{dataset.splits['test'].rows} test rows"))
        probabilities = self.predict(model.model_location, dataset, "test", "evaluate")
        cost = self._cost(model.model_location, dataset)
        split = Split(self.storage.fetch(dataset.location, verify=False), "test")
        labels, settings = split.labels, self.recipe.evaluation
        scores = evaluate_predictions(labels, probabilities, dataset.labels, samples=settings.bootstrap_samples,
                                      confidence=settings.confidence, seed=self.recipe.seed)  # fmt: skip
        location = stage_location("evaluate", self.recipe.name, key)
        record = EvaluationRecord(
            name=self.recipe.name, key=key, location=location, model=model.key, dataset=dataset.key, rows=len(labels),
            metrics=scores.metrics, per_class=scores.per_class, confusion=scores.confusion,
            slices={c: slice_scores(labels, probabilities, split.column(f"{SLICE}{c}").to_pylist()) for c in dataset.slices},
            latency_ms_p50=cost.latency_ms_p50, latency_ms_p95=cost.latency_ms_p95,
            throughput_per_s=cost.throughput_per_s, size_bytes=model.size_bytes, report=f"{location}/{REPORT}",
            predictions=f"{location}/{PREDICTIONS}", seconds=time.monotonic() - started,
        )  # fmt: skip
        with self.storage.publish(location) as folder:
            write_predictions(folder / PREDICTIONS, split, probabilities, dataset.labels)
            write_samples(folder / SAMPLES, split, probabilities, dataset.labels, dataset.image_size,
                          self._ask(model.model_location, dataset, split))  # fmt: skip
            self._write_report(folder / REPORT, record, model, dataset, probabilities)
            (folder / RECIPE).write_text(to_yaml(self.recipe), encoding="utf-8")
            (folder / RECORD).write_text(record.model_dump_json(indent=2), encoding="utf-8")
        return record

    def predict(self, model: str, dataset: DatasetRecord, split: str, stage: str) -> np.ndarray:
        """A saved model's probabilities [rows, classes] for a split. ``stage``: the one it is done for."""
        job, placement = self._job(model, dataset, split)
        return predict_split(
            job, dataset.splits[split].rows, placement.workers, placement.cpus_per_worker,
            lambda event: self.report(replace(event, stage=stage)),
        )  # fmt: skip

    def validated(self, model: ModelRecord, dataset: DatasetRecord, placement: Placement) -> np.ndarray:
        """Probabilities of the validation rows, with the number format, shares and threads of the model's training, for the
        same rounding; a compressed one has its own."""
        is_bf16 = model.precision == "bf16" and model.form is None
        job = replace(self._job(model.model_location, dataset, "validation")[0], bf16=is_bf16)
        rows = dataset.splits["validation"].rows
        return predict_split(job, rows, placement.workers, placement.cpus_per_worker, self.report)

    def _cost(self, model: str, dataset: DatasetRecord) -> Cost:
        job, placement = self._job(model, dataset, "test")
        return measure_cost(job, placement.cpus_per_worker)

    def _ask(self, model: str, dataset: DatasetRecord, split: Split) -> Callable[[list[bytes]], np.ndarray] | None:
        """What asks an ensemble about pictures, some of whose members see the image itself in another size; None: none does."""
        if dataset.image_size is None or split.inputs(np.arange(1)).num_columns == 1:
            return None
        job, placement = self._job(model, dataset, "test")
        return lambda pictures: predict_inputs(job, pictures, placement.cpus_per_worker)

    def _job(self, model: str, dataset: DatasetRecord, split: str) -> tuple[PredictJob, Placement]:
        placement = place_workers(self.recipe.training, self.connect().resources)
        size = self.recipe.evaluation.batch_size
        return PredictJob(self.storage.url, model, dataset.location, split, size, placement.device), placement

    def _write_report(
        self,
        path: Path,
        record: EvaluationRecord,
        model: ModelRecord,
        dataset: DatasetRecord,
        probabilities: np.ndarray,
    ) -> None:
        from orchestrator.evaluation.report import TestRows, write_report  # its plots take half a second to import

        split = Split(self.storage.fetch(dataset.location, verify=False), "test")
        size = dataset.image_size
        picture = None if size is None else lambda row: picture_of(split, row, size)
        rows = TestRows(split.labels, probabilities, split.column("raw").to_pylist(), picture)
        run = model.ensemble.members[0].location if model.ensemble else model.location
        metrics = read_metrics(self.storage.pull(f"{run}/{METRICS}"))
        steps = [(m["step"], m["loss"]) for m in metrics if m["kind"] == "train"]
        write_report(path, record, model, dataset, rows, steps, self.recipe.evaluation.mistakes)
