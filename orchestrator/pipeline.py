"""The story: prepare -> train -> evaluate -> promote -> serve, one function per stage, record in, record out.

The only file that knows the order and introduces rooms to each other. A stage's key hashes everything it reads; a stage
whose record is already there under its key does nothing. Ray is started when the first stage needs it, and only then.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

import orchestrator
from orchestrator.data.dataset import SLICE, Split
from orchestrator.data.encoder import Encoder
from orchestrator.data.prepare import content_key
from orchestrator.data.prepare import prepare as prepare_dataset
from orchestrator.data.schema import infer_schema
from orchestrator.data.sources import Source, open_source
from orchestrator.errors import ModelNotFound, RecipeError, ServingFailed
from orchestrator.evaluation.predictions import picture_of, read_predictions, write_predictions
from orchestrator.evaluation.scores import evaluate_predictions, slice_scores
from orchestrator.progress import Event, Report, format_seconds, ignore
from orchestrator.recipe import Model, Recipe
from orchestrator.recipe_file import parse_recipe, to_yaml
from orchestrator.records import (
    DatasetRecord,
    EndpointRecord,
    EvaluationRecord,
    Hold,
    ModelRecord,
    Record,
    StudyRecord,
    VersionRecord,
)
from orchestrator.registry.promotion import Answers, Promote, decide
from orchestrator.registry.store import CHALLENGER, CHAMPION, Registry
from orchestrator.session import Session, connect, lasting_storage, refuse_unshared_storage
from orchestrator.storage import (
    EVALUATION,
    METRICS,
    MODEL,
    PREDICTIONS,
    RECIPE,
    RECORD,
    REPORT,
    Storage,
    sha256_json,
    stage_location,
)
from orchestrator.tasks import TASKS

if TYPE_CHECKING:
    from orchestrator.evaluation.on_ray import Cost, PredictJob
    from orchestrator.training.placement import Placement
    from orchestrator.tune import TuneStage

_SAMPLE_IMAGES = 64
R = TypeVar("R", bound=Record)


class Pipeline:
    """One recipe's walk along the path. A context manager: leaving it leaves Ray."""

    def __init__(self, recipe: Recipe, *, address: str | None = None, report: Report = ignore) -> None:
        """``address``: a running Ray cluster; None: RAY_ADDRESS, or a private instance on this machine."""
        self.address, self.report, self.wanted_storage = address, report, recipe.storage
        root = lasting_storage(recipe.storage)
        if root != recipe.storage:
            report(Event("storage", message=f"{recipe.storage} would vanish with this job's folder: {root} is used"))
        self.storage = Storage(root)
        # Workers run elsewhere: what they are told must not depend on this process's folder.
        self.recipe = recipe.model_copy(update={"storage": self.storage.url})
        self.task = TASKS[recipe.task]
        self.exits = contextlib.ExitStack()

    def close_session(self) -> None:
        """Leave Ray; the next stage that needs it connects anew."""
        self.exits.close()
        self.__dict__.pop("session", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close_session()

    @cached_property
    def session(self) -> Session:
        """Ray, from the first use on."""
        session = self.exits.enter_context(connect(self.address))
        refuse_unshared_storage(self.wanted_storage, lasting_storage(self.wanted_storage), session.resources.nodes)
        return session

    @cached_property
    def registry(self) -> Registry:
        return Registry(self.storage, self.recipe.registry.url)

    @cached_property
    def source(self) -> Source:
        return open_source(self.recipe.data)

    def walk(self, verb: str) -> Record | dict[str, Any]:
        """Every stage up to ``verb``; returns its record, or all records for ``run``."""
        records: dict[str, Any] = {"stage": "run", "name": self.recipe.name}
        if self.recipe.tuning and verb != "prepare":
            self.tune_stage().check()
        dataset = records["prepare"] = self.prepare()
        if verb == "prepare":
            return dataset
        if self.recipe.tuning:
            study = records["tune"] = self.tune(dataset)
            if verb == "tune":
                return study
            dataset, model = self.dataset_of(study, dataset), study.model
        elif verb == "tune":
            raise RecipeError("the recipe has no tuning section", "add one: tuning: {trials: 24}")
        else:
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
        encoder = self.encoder_for(recipe)
        key = content_key(recipe, encoder, self.source, self.storage)
        return self._once(
            "prepare", key, DatasetRecord,
            lambda: prepare_dataset(recipe, encoder, self.source, self.storage, key, self.report),
        )  # fmt: skip

    def encoder_for(self, recipe: Recipe) -> Encoder:
        """What turns the recipe's inputs into its network's; an automatic image size is settled by looking at some."""
        if self.task.input_kind == "text":
            return self.task.encoder(recipe.model, ())
        schema = infer_schema(self.source.sample, recipe.data.columns, "image")
        names = self.source.sample[schema.input_column].drop_null().to_pylist()
        step = max(1, len(names) // _SAMPLE_IMAGES)
        first_file = self.source.files[0].name
        contents = [self.source.read_image(name, first_file) for name in names[::step]]
        return self.task.encoder(recipe.model, [content for content in contents if isinstance(content, bytes)])

    # --------------------------------------------------------------------------------------------------------- train

    def train(self, dataset: DatasetRecord) -> ModelRecord:
        """Fine-tune on Ray Train, going on from the last checkpoint if an earlier run was cut short."""
        from orchestrator.training.stage import train_key

        key = train_key(self.recipe, dataset)
        return self._once("train", key, ModelRecord, lambda: self._train(dataset, key))

    def _train(self, dataset: DatasetRecord, key: str) -> ModelRecord:
        from orchestrator.training.on_ray import OnRay
        from orchestrator.training.stage import TrainStage

        engine = OnRay(lambda: self.session, self.report)
        predict = partial(self._predict, dataset=dataset, split="validation", stage="train")
        return TrainStage(self.recipe, self.storage, engine, self.report, predict).train(dataset, key)

    # ---------------------------------------------------------------------------------------------------------- tune

    def tune(self, dataset: DatasetRecord) -> StudyRecord:
        """Search for better values of recipe fields, going on with the study if an earlier run was cut short."""
        stage = self.tune_stage()
        return self._once("tune", stage.key(dataset), StudyRecord, lambda: stage.tune(dataset), stage.location(dataset))

    def tune_stage(self) -> TuneStage:
        from orchestrator.tune import TuneStage

        return TuneStage(self.recipe, self.storage, lambda: self.session, self.report, self.prepare, self._validated)

    def dataset_of(self, study: StudyRecord, dataset: DatasetRecord) -> DatasetRecord:
        """As the winner reads it: for another backbone it is encoded anew."""
        from orchestrator.tuning.space import recipe_with

        model = recipe_with(self.recipe, study.winner.parameters).model
        return dataset if model == self.recipe.model else self.prepare(model)

    def _validated(self, model: ModelRecord, dataset: DatasetRecord, placement: Placement) -> np.ndarray:
        """With the number format, shares and threads of its training, for the same rounding."""
        from orchestrator.evaluation.on_ray import predict_split

        job = replace(self._predict_job(model.model_location, dataset, "validation")[0], bf16=model.precision == "bf16")
        rows = dataset.splits["validation"].rows
        return predict_split(job, rows, placement.workers, placement.cpus_per_worker, self.report)

    # ------------------------------------------------------------------------------------------------------ evaluate

    def evaluate(self, model: ModelRecord, dataset: DatasetRecord) -> EvaluationRecord:
        """Score the test rows, measure what an answer costs, write the report."""
        settings = self.recipe.evaluation.model_dump(mode="json")
        key = sha256_json([model.key, dataset.key, settings, self.recipe.seed])
        return self._once("evaluate", key, EvaluationRecord, lambda: self._evaluate(model, dataset, key))

    def _evaluate(self, model: ModelRecord, dataset: DatasetRecord, key: str) -> EvaluationRecord:
        started = time.monotonic()
        self.report(Event("evaluate", message=f"{dataset.splits['test'].rows} test rows"))
        probabilities = self._predict(model.model_location, dataset, "test", "evaluate")
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
            self._write_report(folder / REPORT, record, model, dataset, probabilities)
            (folder / RECIPE).write_text(to_yaml(self.recipe), encoding="utf-8")
            (folder / RECORD).write_text(record.model_dump_json(indent=2), encoding="utf-8")
        return record

    def _predict(self, model: str, dataset: DatasetRecord, split: str, stage: str) -> np.ndarray:
        """A saved model's probabilities [rows, classes] for a split. ``stage``: the one it is done for."""
        from orchestrator.evaluation.on_ray import predict_split

        job, placement = self._predict_job(model, dataset, split)
        return predict_split(
            job, dataset.splits[split].rows, placement.workers, placement.cpus_per_worker,
            lambda event: self.report(replace(event, stage=stage)),
        )  # fmt: skip

    def _cost(self, model: str, dataset: DatasetRecord) -> Cost:
        from orchestrator.evaluation.on_ray import measure_cost

        job, placement = self._predict_job(model, dataset, "test")
        return measure_cost(job, placement.cpus_per_worker)

    def _predict_job(self, model: str, dataset: DatasetRecord, split: str) -> tuple[PredictJob, Placement]:
        from orchestrator.evaluation.on_ray import PredictJob
        from orchestrator.training.placement import place_workers

        placement = place_workers(self.recipe.training, self.session.resources)
        size = self.recipe.evaluation.batch_size
        return PredictJob(self.recipe.storage, model, dataset.location, split, size, placement.device), placement

    def _write_report(
        self,
        path: Path,
        record: EvaluationRecord,
        model: ModelRecord,
        dataset: DatasetRecord,
        probabilities: np.ndarray,
    ) -> None:
        from orchestrator.evaluation.report import TestRows, write_report
        from orchestrator.training.metrics_log import read_metrics

        split = Split(self.storage.fetch(dataset.location, verify=False), "test")
        size = dataset.image_size
        picture = None if size is None else lambda row: picture_of(split, row, size)
        rows = TestRows(split.labels, probabilities, split.column("raw").to_pylist(), picture)
        run = model.ensemble.members[0].location if model.ensemble else model.location
        metrics = read_metrics(self.storage.pull(f"{run}/{METRICS}"))
        steps = [(m["step"], m["loss"]) for m in metrics if m["kind"] == "train"]
        write_report(path, record, model, dataset, rows, steps, self.recipe.evaluation.mistakes)

    # ------------------------------------------------------------------------------------------------------- promote

    def promote(self, model: ModelRecord, dataset: DatasetRecord, evaluation: EvaluationRecord) -> VersionRecord | Hold:
        """Register the model; make it champion if it is better than the present one on the same test rows."""
        version = self._register(model, dataset, evaluation)
        if CHAMPION in version.aliases:
            return version.model_copy(update={"decision": version.decision or "already champion"})
        champion = self._champion()
        rival = None if champion is None else self._answers_of_champion(champion, dataset)
        verdict = decide(self._answers(evaluation), rival, self.recipe.promotion, self.recipe.seed)
        expected = None if champion is None else champion.version
        if isinstance(verdict, Promote):
            self.registry.set_alias(version.name, CHAMPION, version.version, verdict.reason, expected=expected)
            return self.registry.get(version.name, version.version).model_copy(update={"decision": verdict.reason})
        self.registry.set_alias(version.name, CHALLENGER, version.version, verdict.reason)
        return Hold(name=version.name, version=version.version, champion=expected, reason=verdict.reason)

    def _register(self, model: ModelRecord, dataset: DatasetRecord, evaluation: EvaluationRecord) -> VersionRecord:
        draft = VersionRecord(
            name=self.recipe.name, version=0, location="", model=model.key, dataset=dataset.key,
            evaluation=evaluation.key, metrics={n: i.value for n, i in evaluation.metrics.items()},
            code_version=code_version(), created_at=datetime.now(UTC).isoformat(), manifest_sha256="",
        )  # fmt: skip
        results = self.storage.fetch(evaluation.location)
        files = {MODEL: self.storage.fetch(model.model_location), RECIPE: self.storage.pull(f"{model.location}/{RECIPE}"),
                 EVALUATION: results / RECORD, REPORT: results / REPORT}  # fmt: skip
        return self.registry.register(draft, files)

    def _champion(self) -> VersionRecord | None:
        try:
            return self.registry.get(self.recipe.name, CHAMPION)
        except ModelNotFound:
            return None

    def _answers(self, evaluation: EvaluationRecord) -> Answers:
        return Answers(*read_predictions(self.storage.fetch(evaluation.location) / PREDICTIONS))

    def _answers_of_champion(self, champion: VersionRecord, dataset: DatasetRecord) -> Answers:
        """The champion's answers on today's test rows: those it gave already, or given now if the data has changed."""
        folder = self.registry.open(champion)
        earlier = EvaluationRecord.model_validate_json((folder / EVALUATION).read_text(encoding="utf-8"))
        if earlier.dataset == dataset.key:
            return self._answers(earlier)
        self.report(Event("promote", message=f"the data has changed: asking version {champion.version} again"))
        recipe = parse_recipe((folder / RECIPE).read_text(encoding="utf-8"))
        encoded_for_it = self.prepare(recipe.model)
        probabilities = self._predict(f"{champion.location}/{MODEL}", encoded_for_it, "test", "promote")
        split = Split(self.storage.fetch(encoded_for_it.location, verify=False), "test")
        return Answers(split.column("row").to_numpy(), split.labels, probabilities.argmax(axis=1))

    # --------------------------------------------------------------------------------------------------------- serve

    def version_to_serve(self, version: int | None = None) -> VersionRecord:
        """The given version, or the champion. Raises ServingFailed when there is none."""
        if version is not None:
            return self.registry.get(self.recipe.name, version)
        champion = self._champion()
        if champion is None:
            raise ServingFailed(f"{self.recipe.name} has no champion", "see why: orchestrator promote, then serve")
        return champion

    def serve(self, version: VersionRecord) -> EndpointRecord:
        """Put a version behind the endpoint: on the cluster, or in a background process of this machine."""
        from orchestrator.serving.host import find_host, start_host

        if self.address or os.environ.get("RAY_ADDRESS"):
            return self._deploy(version, self.session, pid=None)
        self.close_session()  # the endpoint's own Ray needs the cores
        started = time.monotonic()
        host = find_host(self.storage, self.recipe.serving.port)
        if host is None:
            self.report(Event("serve", message=f"starting the endpoint on port {self.recipe.serving.port}"))
            host = start_host(self.recipe, self.storage, version.version)
            return self._endpoint(version, host.url, host.address, host.pid, time.monotonic() - started)
        self.report(Event("serve", message=f"updating the endpoint at {host.url}"))
        with connect(host.address, token_path=host.token_path) as session:
            return self._deploy(version, session, pid=host.pid)

    def serve_in_foreground(self, version: int | None) -> dict[str, Any]:
        """Serve from this process until it gets SIGTERM or SIGINT, then let requests finish and stop."""
        from orchestrator.serving.host import Host, announce, wait_for_signal, withdraw
        from orchestrator.serving.on_ray import check_port, shutdown

        port = self.recipe.serving.port
        check_port(self.recipe.serving.host, port)  # before Ray is started for nothing
        session = self.session
        endpoint = self._deploy(self.version_to_serve(version), session, pid=os.getpid())
        announce(self.storage, port, Host(os.getpid(), session.address, session.token_path, endpoint.url))
        self.report(Event("serve", message=f"{endpoint.url} is up; Ctrl-C stops it"))
        try:
            wait_for_signal()
        finally:
            withdraw(self.storage, port)
            shutdown()
        return {"stage": "serve", "stopped": True}

    def stop_serving(self) -> dict[str, Any]:
        """Take the endpoint down; on a cluster, this model only."""
        from orchestrator.serving.host import stop_host

        if self.address or os.environ.get("RAY_ADDRESS"):
            from orchestrator.serving.on_ray import undeploy

            return {"stage": "serve", "stopped": bool(self.session) and undeploy(self.recipe.name)}
        return {"stage": "serve", "stopped": stop_host(self.storage, self.recipe.serving.port)}

    def _deploy(self, version: VersionRecord, session: Session, pid: int | None) -> EndpointRecord:
        from orchestrator.serving.on_ray import deploy
        from orchestrator.serving.served import served_version

        started = time.monotonic()
        url = deploy(served_version(self.registry, version, self.recipe.serving), self.report)
        return self._endpoint(version, url, session.address, pid, time.monotonic() - started)

    def _endpoint(
        self, version: VersionRecord, url: str, address: str, pid: int | None, seconds: float
    ) -> EndpointRecord:
        settings = self.recipe.serving
        return EndpointRecord(
            name=version.name, version=version.version, url=url, predict_url=f"{url}/v1/models/{version.name}:predict",
            host=settings.host, port=settings.port, min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas, ray_address=address, pid=pid, seconds=seconds,
        )  # fmt: skip

    # --------------------------------------------------------------------------------------------------------- again

    def _once(self, stage: str, key: str, kind: type[R], make: Callable[[], R], folder: str | None = None) -> R:
        """The stage's record if it is there under its key, else made now. ``folder``: where it lies, if not by its key."""
        location = f"{folder or stage_location(stage, self.recipe.name, key)}/{RECORD}"
        values = self.storage.read_json(location)
        if values is not None and values["key"] == key:
            self.report(Event(stage, message="unchanged, taken from before"))
            return kind.model_validate(values)
        started = time.monotonic()
        record = make()
        if folder or not self.storage.exists(location):
            self.storage.write_json(location, record.model_dump(mode="json"))
        self.report(Event(stage, message=f"done in {format_seconds(time.monotonic() - started)}"))
        return record


def code_version() -> str:
    """This package's version, with the commit when it runs from a repository."""
    folder = Path(orchestrator.__file__).parent
    command = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git here, or no repository
        return orchestrator.__version__
    return f"{orchestrator.__version__}+{commit}"
