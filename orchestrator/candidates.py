"""A candidate of a compression: another structure, recovery and form of a trained model, measured beside it.

In: a number and a point. Out: ``Measured``. Runs in a process of the search, where it also trains what is left of the network;
a runtime that takes the process down with it costs this candidate alone. Candidates that differ in their form only share one
student.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.compression.measuring import Judge
from orchestrator.compression.rows import Rows
from orchestrator.compression.sensitivity import Sensitivity, measure_sensitivity
from orchestrator.compression.structure import Structure, reshape
from orchestrator.compression.survey import Survey, folder_of_base
from orchestrator.data.text import TextEncoder
from orchestrator.errors import DiskFull, OrchestratorError
from orchestrator.exporting.forms import FORMS
from orchestrator.models.checkpoint import count_parameters, load_model, save_model, save_surroundings
from orchestrator.progress import ignore
from orchestrator.recipe import Distillation, Recipe
from orchestrator.recipe_compression import Compression
from orchestrator.records import DatasetRecord, ModelRecord
from orchestrator.session import Resources, Session
from orchestrator.storage import (
    BEST,
    CHECKPOINTS,
    MANIFEST,
    MEMBERS,
    MODEL,
    RECOVERY,
    SCRATCH,
    START,
    STUDENTS,
    TRIALS,
    Storage,
    part_location,
    sha256_json,
)
from orchestrator.training.here import Here
from orchestrator.training.placement import Placement
from orchestrator.training.stage import Engine, TrainStage
from orchestrator.tuning.measured import GoOn, Measured
from orchestrator.tuning.space import Point, recipe_with

_ALONE = {"folds": None, "ensemble": 1, "lora": None, "early_stopping": None, "freeze": (), "averaging": None,
          "strategy": "ddp"}  # fmt: skip
"""What a student's training has none of, whatever its parent's had."""


@dataclass(frozen=True)
class Candidates:
    """A ``tuning.measured.RunTrial``."""

    recipe: Recipe
    """Of the candidate with an empty point."""
    parent: ModelRecord
    dataset: DatasetRecord
    survey: Survey
    location: str
    """Of the study: its candidates lie below."""
    placement: Placement
    answers: str | None = None
    """Location of what the uncompressed model says of the training rows; None: students ask it."""

    def location_of(self, number: int) -> str:
        return part_location(self.location, TRIALS, number)

    def __call__(self, number: int, point: Point, go_on: GoOn) -> Measured:
        started, run = time.monotonic(), self.location_of(number)
        try:
            metrics = self._metrics(recipe_with(self.recipe, point), run)
        except OrchestratorError as error:
            kind = "no_room" if isinstance(error, DiskFull) else error.kind or "raised"
            return Measured("failed", {}, run, error=str(error), kind=kind, seconds=time.monotonic() - started)
        return Measured("complete", metrics, run, seconds=time.monotonic() - started)

    def _metrics(self, recipe: Recipe, run: str) -> dict[str, float]:
        torch.set_num_threads(max(1, int(self.placement.cpus_per_worker)))
        storage = Storage(recipe.storage)
        rows = Rows(storage.fetch(self.dataset.location, verify=False), recipe.seed)
        started = time.monotonic()
        student = storage.fetch(Student(self, recipe, run, rows).location())
        student_s = time.monotonic() - started
        model = f"{run}/{MODEL}"
        if not storage.exists(model):
            write_form(storage, student, model, settings_of(recipe), rows)
        judge = Judge(
            storage.fetch(self.parent.model_location), self.survey, rows, settings_of(recipe),
            recipe.evaluation.batch_size, recipe.serving.max_batch_size,
        )  # fmt: skip
        return judge.metrics(student, storage.fetch(model)) | {"student_s": student_s}


def settings_of(recipe: Recipe) -> Compression:
    assert recipe.compression
    return recipe.compression


def structure_of(settings: Compression) -> Structure:
    return Structure(
        settings.layers, settings.heads, settings.units, settings.filters, settings.vocabulary, settings.rank,
        settings.sparsity, settings.tokens,
    )  # fmt: skip


def has_student(settings: Compression) -> bool:
    """Whether anything but the form differs from the uncompressed model."""
    changed = structure_of(settings) != Structure() or settings.max_tokens is not None
    return changed or settings.recovery.fake_int8


def write_form(storage: Storage, student: Path, location: str, settings: Compression, rows: Rows) -> None:
    """Export a student as a model of its own. Raises CompressionFailed."""
    model = load_model(student)
    batches = rows.calibration(model.encoder, settings.calibration_rows)
    with storage.publish(location) as folder:
        FORMS[settings.form].write(model.network, batches, folder)
        card = model.card | {"parameters": count_parameters(model.network), "form": settings.form}
        save_surroundings(folder, model.encoder, model.labels, card)


class Student:
    """What is left of a network, trained on: made once for all candidates that have the same."""

    def __init__(self, study: Candidates, recipe: Recipe, run: str, rows: Rows) -> None:
        self.study, self.recipe, self.run, self.rows = study, recipe, run, rows
        self.settings, self.storage = settings_of(recipe), Storage(recipe.storage)
        self.structure, self.recovery = structure_of(self.settings), self.settings.recovery

    @staticmethod
    def name_of(recipe: Recipe) -> str:
        """Of its folder."""
        return Student.key_of(recipe)[:12]

    @staticmethod
    def key_of(recipe: Recipe) -> str:
        settings = settings_of(recipe)
        return sha256_json(
            [vars(structure_of(settings)), settings.max_tokens, settings.recovery.model_dump(mode="json")]
        )

    @cached_property
    def base(self) -> str:
        """Location of the network that is made smaller."""
        location = self.study.parent.model_location
        return (
            location
            if folder_of_base(self.storage.fetch(location)).name == MODEL
            else part_location(location, MEMBERS, 0)
        )

    def location(self) -> str:
        """Of the saved student. Raises what training raises."""
        if not has_student(self.settings):
            return self.base  # there is nothing to recover from
        shared = f"{self.study.location}/{STUDENTS}/{self.name_of(self.recipe)}"
        if not self.storage.exists(shared):
            made = self.storage.fetch(self._made())
            with self.storage.publish(shared) as folder:
                shutil.copytree(made, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
            self._clear()
        return shared

    def _clear(self) -> None:
        """Metrics and curves of the recovery stay."""
        for step in range(self.recovery.steps):
            for name in (START, MODEL, BEST, CHECKPOINTS, SCRATCH):
                self.storage.remove(f"{part_location(self.run, RECOVERY, step)}/{name}")

    def _made(self) -> str:
        """In steps, each of which takes an equal part away and is recovered from."""
        current, steps = self.base, self.recovery.steps if self.recovery.epochs else 1
        for step in range(steps):
            place = part_location(self.run, RECOVERY, step)
            started = f"{place}/{START}"
            if not self.storage.exists(started):
                self._make_smaller(current, started, step, steps)
            current = self._recovered(started, place, step, steps) if self.recovery.epochs else started
        return current

    def _make_smaller(self, source: str, target: str, step: int, steps: int) -> None:
        model = load_model(self.storage.fetch(source))
        encoder, limit = model.encoder, self.settings.max_tokens
        if limit and isinstance(encoder, TextEncoder):
            encoder = encoder.shortened(limit)
        batches = list(self.rows.labelled(encoder, self.settings.calibration_rows))
        sensitivity = Sensitivity.from_json(self.study.survey.sensitivity)
        if step:  # look anew at what matters in what is left
            sensitivity = replace(measure_sensitivity(model.network, batches), tokens=sensitivity.tokens)
        structure, inputs = part_of(self.structure, step, steps), [inputs for inputs, _ in batches]
        smaller = reshape(model.network, structure, sensitivity, inputs[0], inputs)
        with self.storage.publish(target) as folder:
            save_model(folder, smaller, encoder, model.labels, model.task)

    def _recovered(self, start: str, place: str, step: int, steps: int) -> str:
        """Trained on, with the uncompressed model as teacher."""
        recipe = self._training(step, steps)
        stage = TrainStage(
            recipe, self.storage, self._engine(place), ignore, lambda _: np.empty(0), is_trial=True,
            start=start, teacher=self.study.parent.model_location, answers=self.study.answers,
        )  # fmt: skip
        key = sha256_json([self.study.parent.key, self.key_of(self.recipe), step])
        return stage.train(self.study.dataset, key, place).model_location

    def _training(self, step: int, steps: int) -> Recipe:
        """The parent's recipe, for this step's share of the epochs."""
        own, asked = self.recipe.training, self.recovery
        epochs = asked.epochs * (step + 1) // steps - asked.epochs * step // steps
        distillation = Distillation(
            weight=asked.distillation, temperature=asked.temperature, hidden=asked.hidden, altered=asked.altered
        )
        changed = {
            "epochs": max(1, epochs), "learning_rate": asked.learning_rate or own.learning_rate,
            "distillation": distillation if asked.distillation or asked.hidden else None,
            "fake_int8": asked.fake_int8, **_ALONE,
        }  # fmt: skip
        return self.recipe.model_copy(update={"training": own.model_copy(update=changed)})

    def _engine(self, place: str) -> Engine:
        """In this process; several workers are started from within it, which is on Ray already."""
        if self.study.placement.workers == 1:
            return Here(self.study.placement, ignore)
        from orchestrator.training.on_ray import OnRay

        scratch = self.storage.path(f"{place}/{SCRATCH}")
        session = Session(os.environ.get("RAY_ADDRESS", ""), Resources(0, 0, 0, 0, 0), scratch, is_private=False)
        return OnRay(lambda: session, ignore, None, self.study.placement)


def part_of(structure: Structure, step: int, steps: int) -> Structure:
    """What step ``step`` of so many leaves of what the one before left: shares kept fall evenly, sparsity rises evenly."""

    def kept(share: float) -> float:
        now, before = (1.0 - (1.0 - share) * done / steps for done in (step + 1, step))
        return now / before

    shares: dict[str, Any] = {
        name: kept(value) for name, value in vars(structure).items() if name not in {"sparsity", "tokens"}
    }
    return replace(structure, **shares, sparsity=structure.sparsity * (step + 1) / steps)
