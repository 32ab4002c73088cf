"""The story: prepare -> train -> compress -> evaluate -> promote -> serve, one function per stage, record in, record out.

The only file that knows the order and introduces rooms to each other. A stage's key hashes everything it reads; a stage
whose record is already there under its key does nothing. Ray is started when the first stage needs it, and only then.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import orchestrator
from orchestrator.data.dataset import Split
from orchestrator.data.encoder import Encoder
from orchestrator.data.encoders import load_encoder
from orchestrator.data.prepare import content_key
from orchestrator.data.prepare import prepare as prepare_dataset
from orchestrator.data.schema import infer_schema
from orchestrator.data.sources import Source, open_source
from orchestrator.errors import ModelNotFound, RecipeError, UserError
from orchestrator.evaluation.predictions import read_predictions
from orchestrator.progress import Event, Report, format_seconds, ignore
from orchestrator.recipe import Model, Recipe
from orchestrator.recipe_file import parse_recipe
from orchestrator.records import (
    CompressionRecord,
    DatasetRecord,
    EnsembleRecord,
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
    MODEL,
    MODEL_RECORD,
    PREDICTIONS,
    RECIPE,
    RECORD,
    REPORT,
    SAMPLES,
    Storage,
    stage_location,
)
from orchestrator.tasks import TASKS

if TYPE_CHECKING:
    from orchestrator.compress import CompressStage
    from orchestrator.evaluate import EvaluateStage
    from orchestrator.serve import ServeStage
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
        self._check_searches(verb)
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
        if self.recipe.compression:
            compressed = records["compress"] = self.compress(model, dataset, records.get("tune"))
            if verb == "compress":
                return compressed
            model = compressed.model
        evaluation = records["evaluate"] = self.evaluate(model, dataset)
        if verb == "evaluate":
            return evaluation
        decision = records["promote"] = self.promote(model, dataset, evaluation)
        if verb == "promote":
            return decision
        stage = self.serve_stage()
        records["serve"] = stage.serve(stage.version_to_serve())
        return {name: r.model_dump(mode="json") if isinstance(r, Record) else r for name, r in records.items()}

    def _check_searches(self, verb: str) -> None:
        """What is wrong in them is said before anything runs."""
        if verb == "compress" and not self.recipe.compression:
            raise RecipeError("the recipe has no compression section", "add one: compression: {trials: 24}")
        if self.recipe.tuning and verb != "prepare":
            self.tune_stage().check()
        if self.recipe.compression and verb not in ("prepare", "tune", "train"):
            self.compress_stage(None).check()

    # ------------------------------------------------------------------------------------------------------- prepare

    def prepare(self, model: Model | None = None) -> DatasetRecord:
        """Read, clean, split and encode. ``model``: encode for another model than the recipe's."""
        recipe = self.recipe if model is None else self.recipe.model_copy(update={"model": model})
        return self._prepare(recipe, self.encoder_for(recipe))

    def prepare_for(self, encoder: Encoder) -> DatasetRecord:
        """The same, encoded for a saved model, whose encoder it is."""
        return self._prepare(self.recipe, encoder)

    def _prepare(self, recipe: Recipe, encoder: Encoder) -> DatasetRecord:
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
        predict = partial(self.evaluate_stage.predict, dataset=dataset, split="validation", stage="train")
        return TrainStage(self.recipe, self.storage, engine, self.report, predict).train(dataset, key)

    # ---------------------------------------------------------------------------------------------------------- tune

    def tune(self, dataset: DatasetRecord) -> StudyRecord:
        """Search for better values of recipe fields, going on with the study if an earlier run was cut short."""
        stage = self.tune_stage()
        return self._once("tune", stage.key(dataset), StudyRecord, lambda: stage.tune(dataset), stage.location(dataset))

    def tune_stage(self) -> TuneStage:
        from orchestrator.tune import TuneStage

        return TuneStage(
            self.recipe, self.storage, lambda: self.session, self.report, self.prepare, self.evaluate_stage.validated
        )

    def dataset_of(self, study: StudyRecord, dataset: DatasetRecord) -> DatasetRecord:
        """As the winner reads it: for another backbone it is encoded anew."""
        from orchestrator.tuning.space import recipe_with

        model = recipe_with(self.recipe, study.winner.parameters).model
        return dataset if model == self.recipe.model else self.prepare(model)

    # ------------------------------------------------------------------------------------------------------ compress

    def compress(self, model: ModelRecord, dataset: DatasetRecord, study: StudyRecord | None) -> CompressionRecord:
        """Make a trained model smaller and faster, going on with the sweep if an earlier run was cut short."""
        return self._compress(self.compress_stage(study), model, dataset)

    def _compress(self, stage: CompressStage, model: ModelRecord, dataset: DatasetRecord) -> CompressionRecord:
        return self._once(
            "compress", stage.key(model, dataset), CompressionRecord, lambda: stage.compress(model, dataset),
            stage.location(model, dataset),
        )  # fmt: skip

    def compress_version(self, number: int) -> dict[str, Any]:
        """Compress a registered version, and register what comes of it. Raises ModelNotFound."""
        self._check_searches("compress")
        version = self.registry.get(self.recipe.name, number)
        folder = self.registry.open(version)
        if not (folder / MODEL_RECORD).is_file():
            raise ModelNotFound(f"version {number} of {version.name} was registered without the record of its training",
                                "compress the model by its recipe, without --version")  # fmt: skip
        trained = ModelRecord.model_validate_json((folder / MODEL_RECORD).read_text(encoding="utf-8"))
        if trained.mixture is not None:
            members = ", ".join(str(member.version) for member in trained.mixture.members)
            raise UserError(f"version {number} is an ensemble of versions, which cannot be compressed",
                            f"compress its members ({members}), then join what comes of them")  # fmt: skip
        model = trained.model_copy(update={"model_location": f"{version.location}/{MODEL}"})
        recipe = parse_recipe((folder / RECIPE).read_text(encoding="utf-8"))
        dataset = self.prepare(recipe.model)
        stage = self.compress_stage(None, recipe.model_copy(update={"compression": self.recipe.compression}))
        compressed = self._compress(stage, model, dataset)
        evaluation = self.evaluate(compressed.model, dataset)
        promoted = self.promote(compressed.model, dataset, evaluation, (number,))
        return self._told(compress=compressed, evaluate=evaluation, promote=promoted)

    def _told(self, **records: Record) -> dict[str, Any]:
        told = {name: record.model_dump(mode="json") for name, record in records.items()}
        return {"stage": "run", "name": self.recipe.name, **told}

    def compress_stage(self, study: StudyRecord | None, trained_by: Recipe | None = None) -> CompressStage:
        """``study``: whose winner is compressed, if the model comes from a search. ``trained_by``: the recipe of a model that
        is not this recipe's."""
        from orchestrator.compress import CompressStage
        from orchestrator.tuning.space import recipe_with

        recipe = recipe_with(trained_by or self.recipe, study.winner.parameters if study else {})
        recipe = recipe.model_copy(update={"storage": self.storage.url})
        return CompressStage(recipe, self.storage, lambda: self.session, self.report, self.evaluate_stage.validated)

    # ------------------------------------------------------------------------------------------------------ ensemble

    def join_versions(self, versions: str, combine: str, weights: str) -> dict[str, Any]:
        """Join registered versions to one model, and register it. The arguments are those of ``Wish.parse``."""
        from orchestrator.ensemble import EnsembleStage, Wish

        predict = partial(self.evaluate_stage.predict, split="validation", stage="ensemble")
        stage = EnsembleStage(self.recipe, self.storage, self.registry, self.prepare_for, predict, self.report)
        group = stage.group(Wish.parse(versions, combine, weights))
        dataset = self.prepare_for(group.encoding[0])
        record = self._once(
            "ensemble", stage.key(group, dataset), EnsembleRecord, lambda: stage.ensemble(group, dataset)
        )
        evaluation = self.evaluate(record.model, dataset)
        promoted = self.promote(record.model, dataset, evaluation, group.wish.versions)
        return self._told(ensemble=record, evaluate=evaluation, promote=promoted)

    # ------------------------------------------------------------------------------------------------------ evaluate

    def evaluate(self, model: ModelRecord, dataset: DatasetRecord) -> EvaluationRecord:
        """Score the test rows, measure what an answer costs, write the report."""
        stage = self.evaluate_stage
        return self._once(
            "evaluate", stage.key(model, dataset), EvaluationRecord, lambda: stage.evaluate(model, dataset)
        )

    @cached_property
    def evaluate_stage(self) -> EvaluateStage:
        from orchestrator.evaluate import EvaluateStage

        return EvaluateStage(self.recipe, self.storage, lambda: self.session, self.report)

    # ------------------------------------------------------------------------------------------------------- promote

    def promote(
        self, model: ModelRecord, dataset: DatasetRecord, evaluation: EvaluationRecord, parents: tuple[int, ...] = ()
    ) -> VersionRecord | Hold:
        """Register the model; make it champion if it is better than the present one on the same test rows, or as good and
        made from it by compression. ``parents``: versions it was made from."""
        version = self._register(model, dataset, evaluation, parents)
        if CHAMPION in version.aliases:
            return version.model_copy(update={"decision": version.decision or "already champion"})
        champion = self._champion()
        rival = None if champion is None else self._answers_of_champion(champion, dataset)
        compressed = champion is not None and model.parent == champion.model and self.recipe.compression
        allowed = compressed.limits.macro_f1_drop if compressed else None
        verdict = decide(self._answers(evaluation), rival, self.recipe.promotion, self.recipe.seed, allowed)
        expected = None if champion is None else champion.version
        if isinstance(verdict, Promote):
            self.registry.set_alias(version.name, CHAMPION, version.version, verdict.reason, expected=expected)
            return self.registry.get(version.name, version.version).model_copy(update={"decision": verdict.reason})
        self.registry.set_alias(version.name, CHALLENGER, version.version, verdict.reason)
        return Hold(name=version.name, version=version.version, champion=expected, reason=verdict.reason)

    def _register(
        self, model: ModelRecord, dataset: DatasetRecord, evaluation: EvaluationRecord, parents: tuple[int, ...]
    ) -> VersionRecord:
        draft = VersionRecord(
            name=self.recipe.name, version=0, location="", model=model.key, dataset=dataset.key,
            evaluation=evaluation.key, metrics={n: i.value for n, i in evaluation.metrics.items()},
            code_version=code_version(), created_at=datetime.now(UTC).isoformat(), manifest_sha256="", parents=parents,
        )  # fmt: skip
        results = self.storage.fetch(evaluation.location)
        files = {MODEL: self.storage.fetch(model.model_location), RECIPE: self.storage.pull(f"{model.location}/{RECIPE}"),
                 EVALUATION: results / RECORD, REPORT: results / REPORT}  # fmt: skip
        if (results / SAMPLES).is_file():
            files[SAMPLES] = results / SAMPLES
        with tempfile.TemporaryDirectory() as scratch:
            files[MODEL_RECORD] = Path(scratch) / MODEL_RECORD
            files[MODEL_RECORD].write_text(model.model_dump_json(indent=2), encoding="utf-8")
            return self.registry.register(draft, files)

    def _champion(self) -> VersionRecord | None:
        try:
            return self.registry.get(self.recipe.name, CHAMPION)
        except ModelNotFound:
            return None

    def _answers(self, evaluation: EvaluationRecord) -> Answers:
        return Answers(*read_predictions(self.storage.fetch(evaluation.location) / PREDICTIONS))

    def _answers_of_champion(self, champion: VersionRecord, dataset: DatasetRecord) -> Answers:
        """The champion's answers on today's test rows: those it gave already, or given now if the data has changed. Of the same
        data, encoded for another model, they are the same rows."""
        folder = self.registry.open(champion)
        earlier = EvaluationRecord.model_validate_json((folder / EVALUATION).read_text(encoding="utf-8"))
        if earlier.dataset == dataset.key:
            return self._answers(earlier)
        encoded_for_it = self.prepare_for(load_encoder(folder / MODEL))
        if earlier.dataset == encoded_for_it.key:
            return self._answers(earlier)
        self.report(Event("promote", message=f"the data has changed: asking version {champion.version} again"))
        probabilities = self.evaluate_stage.predict(f"{champion.location}/{MODEL}", encoded_for_it, "test", "promote")
        split = Split(self.storage.fetch(encoded_for_it.location, verify=False), "test")
        return Answers(split.column("row").to_numpy(), split.labels, probabilities.argmax(axis=1))

    # --------------------------------------------------------------------------------------------------------- serve

    def serve_stage(self) -> ServeStage:
        from orchestrator.serve import ServeStage

        return ServeStage(self.recipe, self.storage, self.registry, self.address, lambda: self.session,
                          self.close_session, self.report)  # fmt: skip

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
