"""The story: prepare -> train -> evaluate -> promote -> serve, one function per stage, record in, record out.

The only file that knows the order and introduces rooms to each other. A stage's key hashes everything it reads; a stage
whose record is already there under its key does nothing. Ray is started when the first stage needs it, and only then.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import orchestrator
from orchestrator.data.encoder import Encoder
from orchestrator.data.prepare import content_key
from orchestrator.data.prepare import prepare as prepare_dataset
from orchestrator.data.sources import Source, open_source
from orchestrator.errors import DataError, ModelNotFound, ServingFailed
from orchestrator.evaluation.scores import Scores
from orchestrator.progress import Event, Report, format_seconds, ignore
from orchestrator.recipe import Model, Recipe, to_yaml
from orchestrator.records import (
    DatasetRecord,
    EndpointRecord,
    EpochMetrics,
    EvaluationRecord,
    Hold,
    ModelRecord,
    Record,
    VersionRecord,
)
from orchestrator.registry.promotion import Promote, Scored, decide
from orchestrator.registry.store import Registry
from orchestrator.session import Session, connect, refuse_vanishing_storage
from orchestrator.storage import (
    MODEL,
    PREDICTIONS,
    RECIPE,
    RECORD,
    REPORT,
    Storage,
    atomic_write,
    folder_bytes,
    sha256_json,
    stage_location,
)
from orchestrator.tasks import TASKS

CHAMPION, CHALLENGER = "champion", "challenger"
R = TypeVar("R", bound=Record)


class Pipeline:
    """One recipe's walk along the path. A context manager: leaving it leaves Ray."""

    def __init__(self, recipe: Recipe, *, address: str | None = None, report: Report = ignore) -> None:
        """``address``: a running Ray cluster; None: RAY_ADDRESS, or a private instance on this machine."""
        refuse_vanishing_storage(recipe.storage)
        self.recipe, self.address, self.report = recipe, address, report
        self.storage = Storage(recipe.storage)
        # Workers run elsewhere: what they are told must not depend on this process's folder.
        self.recipe = recipe.model_copy(update={"storage": self.storage.url})
        self.task = TASKS[recipe.task]
        self.exits = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.exits.close()

    @cached_property
    def session(self) -> Session:
        """Ray, from the first use on."""
        return self.exits.enter_context(connect(self.address))

    @cached_property
    def registry(self) -> Registry:
        return Registry(self.storage, self.recipe.registry.url)

    @cached_property
    def source(self) -> Source:
        return open_source(self.recipe)

    def walk(self, verb: str) -> Record | dict[str, Any]:
        """Every stage up to ``verb``; returns its record, or all records for ``run``."""
        records: dict[str, Any] = {"stage": "run", "name": self.recipe.name}
        dataset = records["prepare"] = self.prepare()
        if verb == "prepare":
            return dataset
        model = records["train"] = self.train(dataset)
        if verb == "train":
            return model
        evaluation = records["evaluate"] = self.evaluate(model, dataset)
        if verb == "evaluate":
            return evaluation
        decision = records["promote"] = self.promote(model, dataset, evaluation)
        if verb == "promote":
            return decision
        records["serve"] = self.serve(self.version_to_serve())
        return {name: r.model_dump(mode="json") if isinstance(r, Record) else r for name, r in records.items()}

    # ------------------------------------------------------------------------------------------------------- prepare

    def prepare(self, model: Model | None = None) -> DatasetRecord:
        """Read, clean, split and encode. ``model``: encode for another model than the recipe's."""
        recipe = self.recipe if model is None else self.recipe.model_copy(update={"model": model})
        encoder = self._encoder(recipe)
        key = content_key(recipe, encoder, self.source.fingerprint(self.storage))
        return self._once(
            "prepare", key, DatasetRecord,
            lambda: prepare_dataset(recipe, encoder, self.source, self.storage, key, self.report),
        )  # fmt: skip

    def _encoder(self, recipe: Recipe) -> Encoder:
        return self.task.encoder(recipe.model, self.source)

    # --------------------------------------------------------------------------------------------------------- train

    def train(self, dataset: DatasetRecord) -> ModelRecord:
        """Fine-tune on Ray Train, going on from the last checkpoint if an earlier run was cut short."""
        settings = self.recipe.training.model_dump(exclude={"max_failures", "checkpoint_every_steps"}, mode="json")
        key = sha256_json([dataset.key, self.recipe.model.model_dump(mode="json"), settings, self.recipe.seed])
        return self._once("train", key, ModelRecord, lambda: self._train(dataset, key))

    def _train(self, dataset: DatasetRecord, key: str) -> ModelRecord:
        from orchestrator.training.on_ray import fit, place_workers
        from orchestrator.training.worker import TrainJob

        # Said now, in this process, before any worker waits for it.
        self.task.check_backbone(self.recipe.model)
        placement = place_workers(self.recipe.training, self.session.resources)
        run = stage_location("train", self.recipe.name, key)
        atomic_write(self.storage.path(run) / RECIPE, to_yaml(self.recipe).encode())
        job = TrainJob(self.recipe, run, dataset.location, dataset.labels)
        self.report(Event("train", message=f"{self.task.backbone(self.recipe.model)} on {placement.workers} "
                                           f"{placement.device} workers"))  # fmt: skip
        fit(job, placement, self.session, self.report)
        return self._model_record(dataset, key, run, placement.workers, placement.device)

    def _model_record(self, dataset: DatasetRecord, key: str, run: str, workers: int, device: str) -> ModelRecord:
        import torch

        from orchestrator.models.checkpoint import CARD
        from orchestrator.training.metrics_log import read_metrics
        from orchestrator.training.precision import resolve_precision
        from orchestrator.training.state import latest_state

        position, _ = latest_state(self.storage, run)
        epochs = [line for line in read_metrics(self.storage.path(run)) if line["kind"] == "validation"]
        folder = self.storage.fetch(f"{run}/{MODEL}")
        metric = self.recipe.training.best_metric
        trained_rows = position.step * self.recipe.training.batch_size
        return ModelRecord(
            name=self.recipe.name, key=key, location=run, model_location=f"{run}/{MODEL}", task=self.recipe.task,
            backbone=self.task.backbone(self.recipe.model), dataset=dataset.key,
            epochs=tuple(_epoch_metrics(line) for line in epochs), best_epoch=position.best_epoch, best_metric=metric,
            best_value=-position.best_value if metric == "loss" else position.best_value, steps=position.step,
            workers=workers, device=device,
            precision=resolve_precision(self.recipe.training.precision, torch.device(device)),
            parameters=_read_json(folder / CARD)["parameters"], size_bytes=folder_bytes(folder),
            seconds=position.seconds, samples_per_s=trained_rows / max(position.seconds, 1e-9),
            resumed=position.resumed, stopped_early=position.stopped_early,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ evaluate

    def evaluate(self, model: ModelRecord, dataset: DatasetRecord) -> EvaluationRecord:
        """Score the test rows, measure what an answer costs, write the report."""
        settings = self.recipe.evaluation.model_dump(mode="json")
        key = sha256_json([model.key, dataset.key, settings, self.recipe.seed])
        return self._once("evaluate", key, EvaluationRecord, lambda: self._evaluate(model, dataset, key))

    def _evaluate(self, model: ModelRecord, dataset: DatasetRecord, key: str) -> EvaluationRecord:
        from orchestrator.evaluation.on_ray import measure_cost
        from orchestrator.evaluation.report import write_report
        from orchestrator.evaluation.scores import evaluate_predictions, slice_scores

        started = time.monotonic()
        job, workers, cpus = self._predict_job(model.model_location, dataset)
        probabilities = self._predict(model.model_location, dataset)
        cost = measure_cost(job, cpus)
        table = self._test_rows(dataset)
        labels = table["label"].to_numpy()
        settings = self.recipe.evaluation
        self.report(Event("evaluate", message=f"{settings.bootstrap_samples} bootstrap samples of {len(labels)} rows"))
        scores = evaluate_predictions(labels, probabilities, dataset.labels, samples=settings.bootstrap_samples,
                                      confidence=settings.confidence, seed=self.recipe.seed)  # fmt: skip
        location = stage_location("evaluate", self.recipe.name, key)
        record = EvaluationRecord(
            name=self.recipe.name, key=key, location=location, model=model.key, dataset=dataset.key, rows=len(labels),
            metrics=scores.metrics, per_class=scores.per_class, confusion=scores.confusion,
            slices={c: slice_scores(labels, probabilities, table[f"slice:{c}"].to_pylist()) for c in dataset.slices},
            latency_ms_p50=cost.latency_ms_p50, latency_ms_p95=cost.latency_ms_p95,
            throughput_per_s=cost.throughput_per_s, size_bytes=model.size_bytes, report=f"{location}/{REPORT}",
            predictions=f"{location}/{PREDICTIONS}", seconds=time.monotonic() - started,
        )  # fmt: skip
        with self.storage.publish(location) as folder:
            _write_predictions(folder / PREDICTIONS, table, probabilities, dataset.labels)
            write_report(folder / REPORT, self._report_content(record, model, dataset, table, probabilities, scores))
            atomic_write(folder / RECIPE, to_yaml(self.recipe).encode())
            atomic_write(folder / RECORD, record.model_dump_json(indent=2).encode())
        return record
