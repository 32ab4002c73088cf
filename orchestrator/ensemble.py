"""The ensemble stage: registered versions of a model joined to one that answers by their weighted mean or vote.

In: the recipe, and versions of its model. Out: ``EnsembleRecord``. The versions may have been trained by other recipes: what
they need in common is the task and the labels. The validation rows choose, where weights are fitted; the test rows have no part
in it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np

from orchestrator.data.combined import together
from orchestrator.data.dataset import Split
from orchestrator.data.encoder import Encoder
from orchestrator.data.encoders import load_encoder
from orchestrator.errors import DataError, IntegrityError, UserError
from orchestrator.evaluation.metrics import summary
from orchestrator.models.checkpoint import CARD, LABELS, save_mixture
from orchestrator.models.ensemble import Combine, Mixture, disagreement, fitted_weights
from orchestrator.progress import Event, Report
from orchestrator.recipe import Recipe
from orchestrator.recipe_file import to_yaml
from orchestrator.records import (
    DatasetRecord,
    EnsembleRecord,
    MixtureMember,
    MixtureOfVersions,
    ModelRecord,
    VersionRecord,
)
from orchestrator.registry.store import Registry
from orchestrator.storage import (
    MODEL,
    MODEL_RECORD,
    RECIPE,
    Storage,
    atomic_write,
    folder_bytes,
    sha256_json,
    stage_location,
)

_SAME = 1 / 100
"""Share of the rows whose label may differ between the ensemble as it was saved and its members' answers put together: int8
products depend on what else is in a batch. At least ``_SAME_ROWS``."""
_SAME_ROWS = 3


How = Literal["equal", "fitted", "given"]
_HOW: Mapping[str, How] = {"equal": "equal", "fitted": "fitted"}


@dataclass(frozen=True)
class Wish:
    """What is asked for."""

    versions: tuple[int, ...]
    """Ascending."""
    combine: Combine
    how: How
    weights: tuple[float, ...]
    """One per version, together 1; of fitted ones, what they begin with."""

    @classmethod
    def parse(cls, versions: str, combine: str, weights: str) -> Wish:
        """As the command line has them: ``3,5,7``, ``mean`` or ``vote``, and ``equal``, ``fitted`` or ``0.5,0.3,0.2``.

        Raises UserError.
        """
        numbers = _numbers(versions)
        if combine not in get_args(Combine):
            raise UserError(f"--combine {combine!r} is not known", f"known are {', '.join(get_args(Combine))}")
        how = _HOW.get(weights, "given")
        shares = _shares(weights, numbers) if how == "given" else dict.fromkeys(numbers, 1.0 / len(numbers))
        if how == "fitted" and combine == "vote":
            raise UserError("--weights fitted does not go with --combine vote: a vote gives labels no likelihood",
                            "choose --combine mean, or give the weights")  # fmt: skip
        ascending = tuple(sorted(numbers))
        return cls(ascending, cast(Combine, combine), how, tuple(shares[number] for number in ascending))


def _numbers(versions: str) -> list[int]:
    words = [word.strip() for word in versions.split(",")]
    wrong = [word for word in words if not (word.isascii() and word.isdigit())]
    if wrong:
        raise UserError(f"--versions {versions!r}: {wrong[0]!r} is not a version", "give their numbers: --versions 3,5")
    numbers = [int(word) for word in words]
    twice = [number for number in numbers if numbers.count(number) > 1]
    if twice:
        raise UserError(
            f"--versions {versions!r} names version {twice[0]} twice", "name each once, and give it a weight"
        )
    if len(numbers) < 2:
        raise UserError(f"an ensemble has at least two members, but --versions is {versions!r}", "name one more")
    return numbers


def _shares(weights: str, numbers: list[int]) -> dict[int, float]:
    """By version; together 1."""
    try:
        values = [float(word) for word in weights.split(",")]
    except ValueError:
        raise UserError(
            f"--weights {weights!r} is not known", "use equal, fitted, or numbers such as 0.5,0.3,0.2"
        ) from None
    if len(values) != len(numbers):
        raise UserError(f"--weights has {len(values)} numbers for {len(numbers)} versions", "give one for each version")
    if not all(0.0 <= value < float("inf") for value in values) or not 0.0 < sum(values) < float("inf"):
        raise UserError(f"--weights {weights!r}: weights are at least 0, and not all 0", "such as 0.5,0.3,0.2")
    return {number: value / sum(values) for number, value in zip(numbers, values, strict=True)}


@dataclass(frozen=True)
class Member:
    version: VersionRecord
    folder: Path
    """The saved model."""
    task: str
    labels: tuple[str, ...]
    backbone: str
    encoder: Encoder

    @property
    def location(self) -> str:
        return f"{self.version.location}/{MODEL}"


@dataclass(frozen=True)
class Group:
    """The versions that are joined, and how."""

    wish: Wish
    members: tuple[Member, ...]

    @cached_property
    def encoding(self) -> tuple[Encoder, tuple[int, ...]]:
        """The encoder of all together, and the number of each member's own."""
        return together([member.encoder for member in self.members])


@dataclass(frozen=True)
class EnsembleStage:
    recipe: Recipe
    storage: Storage
    registry: Registry
    prepare: Callable[[Encoder], DatasetRecord]
    """The recipe's data, encoded by this encoder."""
    predict: Callable[[str, DatasetRecord], np.ndarray]
    """Location of a saved model -> its probabilities [rows, classes] of the validation rows of such a dataset."""
    report: Report

    def group(self, wish: Wish) -> Group:
        """The versions, every file of theirs verified. Raises ModelNotFound, UserError."""
        members = tuple(self._member(number) for number in wish.versions)
        first = members[0]
        for member in members:
            number = member.version.version
            if member.task != self.recipe.task:
                raise UserError(f"version {number} does {member.task}, and the recipe is for {self.recipe.task}",
                                "name other versions")  # fmt: skip
            if set(member.labels) != set(first.labels):
                raise UserError(
                    f"version {first.version.version} tells {_some(first.labels)} apart, and version {number} "
                    f"{_some(member.labels)}", "join versions of the same labels",
                )  # fmt: skip
        return Group(wish, members)

    def _member(self, number: int) -> Member:
        version = self.registry.get(self.recipe.name, number)
        folder = self.registry.open(version)
        trained = folder / MODEL_RECORD
        record = ModelRecord.model_validate_json(trained.read_text(encoding="utf-8")) if trained.is_file() else None
        if record is not None and record.mixture is not None:
            numbers = ",".join(str(member.version) for member in record.mixture.members)
            raise UserError(f"version {number} is an ensemble itself", f"name its members: {numbers}")
        model = folder / MODEL
        card = json.loads((model / CARD).read_text(encoding="utf-8"))
        labels = tuple(json.loads((model / LABELS).read_text(encoding="utf-8")))
        return Member(version, model, card["task"], labels, record.backbone if record else "", load_encoder(model))

    def key(self, group: Group, dataset: DatasetRecord) -> str:
        wish = group.wish
        weights = list(wish.weights) if wish.how == "given" else wish.how
        joined = [[member.version.version, member.version.model] for member in group.members]
        return sha256_json([joined, wish.combine, weights, dataset.key, self.recipe.training.best_metric])

    def ensemble(self, group: Group, dataset: DatasetRecord) -> EnsembleRecord:
        """``dataset``: encoded by the group's encoder.

        Raises:
            DataError: the recipe's data have other labels, or rows, than the members answer.
            IntegrityError: the ensemble, loaded afresh, does not answer as its members do.
        """
        began, wish = time.monotonic(), group.wish
        encoder, numbers = group.encoding
        orders = tuple(_order(dataset.labels, member) for member in group.members)
        split = self._split(dataset)
        answers = np.stack([self._alone(m, n, dataset, split) for m, n in zip(group.members, numbers, strict=True)])
        ordered = np.stack([answer[:, order] for answer, order in zip(answers, orders, strict=True)])
        weights = wish.weights
        if wish.how == "fitted":
            weights = tuple(fitted_weights(ordered[:, np.arange(len(split)), split.labels]).tolist())
        mixture = Mixture(weights, orders, numbers, wish.combine)
        location = stage_location("ensemble", self.recipe.name, self.key(group, dataset))
        scores = [summary(split.labels, alone) for alone in ordered]
        told = MixtureOfVersions(
            members=tuple(
                MixtureMember(version=m.version.version, model=m.version.model, backbone=m.backbone, weight=weight,
                              validation=score)
                for m, weight, score in zip(group.members, weights, scores, strict=True)
            ),
            combine=wish.combine, weights=wish.how, validation=summary(split.labels, mixture.probabilities(answers)),
            disagreement=disagreement(ordered, weights),
        )  # fmt: skip
        with self.storage.publish(f"{location}/{MODEL}") as folder:
            save_mixture(folder, [member.folder for member in group.members], mixture, encoder, dataset.labels,
                         {"ensemble": told.model_dump(mode="json")})  # fmt: skip
        self._check(f"{location}/{MODEL}", dataset, mixture.probabilities(answers))
        atomic_write(self.storage.path(location) / RECIPE, to_yaml(self.recipe).encode())
        self.storage.push(f"{location}/{RECIPE}")
        return self._record(group, dataset, told, location, time.monotonic() - began)

    def _split(self, dataset: DatasetRecord) -> Split:
        return Split(self.storage.fetch(dataset.location, verify=False), "validation")

    def _alone(self, member: Member, number: int, dataset: DatasetRecord, split: Split) -> np.ndarray:
        """A member's own answers to the validation rows. A dataset encoded for all holds what the first encoder makes under
        its usual names; for another one, the rows are encoded once more."""
        self.report(Event("ensemble", message=f"asking version {member.version.version}"))
        own = self.prepare(member.encoder) if number else dataset
        theirs = self._split(own)
        if not np.array_equal(theirs.column("row").to_numpy(), split.column("row").to_numpy()):
            raise DataError(
                f"version {member.version.version} cannot read all rows that the others can", "leave it out"
            )
        return self.predict(member.location, own)

    def _check(self, location: str, dataset: DatasetRecord, expected: np.ndarray) -> None:
        self.report(Event("ensemble", message="asking all together"))
        found = self.predict(location, dataset)
        different = int((found.argmax(axis=1) != expected.argmax(axis=1)).sum())
        if different > max(_SAME_ROWS, _SAME * len(found)):
            raise IntegrityError(
                f"the ensemble, loaded afresh, has another label than its members' answers put together for {different} of "
                f"{len(found)} validation rows", f"delete {location} in the storage and run the same command again",
            )  # fmt: skip

    def _record(
        self, group: Group, dataset: DatasetRecord, told: MixtureOfVersions, location: str, seconds: float
    ) -> EnsembleRecord:
        key, metric = self.key(group, dataset), self.recipe.training.best_metric
        sign = -1.0 if metric == "loss" else 1.0
        best = max(told.members, key=lambda member: sign * member.validation[metric])
        folder = self.storage.path(f"{location}/{MODEL}")
        numbers = ", ".join(str(member.version) for member in told.members)
        model = ModelRecord(
            name=self.recipe.name, key=key, location=location, model_location=f"{location}/{MODEL}",
            task=self.recipe.task, backbone=f"ensemble of versions {numbers}", dataset=dataset.key, epochs=(),
            best_epoch=0, best_metric=metric, best_value=told.validation[metric], steps=0, workers=0, device="cpu",
            precision="fp32", parameters=json.loads((folder / CARD).read_text(encoding="utf-8"))["parameters"],
            size_bytes=folder_bytes(folder), seconds=0.0, samples_per_s=0.0, mixture=told,
        )  # fmt: skip
        return EnsembleRecord(
            name=self.recipe.name, key=key, location=location, rows=dataset.splits["validation"].rows, best=best.version,
            is_better=sign * told.validation[metric] > sign * best.validation[metric], seconds=seconds, model=model,
        )  # fmt: skip


def _order(labels: tuple[str, ...], member: Member) -> tuple[int, ...]:
    """Of each label its place among the member's. Raises DataError."""
    if set(labels) != set(member.labels):
        raise DataError(f"the recipe's data have the labels {_some(labels)}, the versions tell {_some(member.labels)} apart",
                        "use the data that they were trained for")  # fmt: skip
    return tuple(member.labels.index(label) for label in labels)


def _some(labels: tuple[str, ...], limit: int = 8) -> str:
    return ", ".join(labels[:limit]) + (f" and {len(labels) - limit} more" if len(labels) > limit else "")
