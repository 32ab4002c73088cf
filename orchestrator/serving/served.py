"""What a replica is made from, and how a Serve config file names it.

In: a registered version. Out: a small ``Served`` value that any node can start a replica from, and again. Knows no Ray.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from orchestrator.recipe import Serving
from orchestrator.records import EvaluationRecord, VersionRecord
from orchestrator.registry.store import CHAMPION, Registry
from orchestrator.serving.scaling import Latency, Scale, plan_scale
from orchestrator.storage import EVALUATION, MODEL, Storage

MODEL_APP = "model-"
"""Prefix of a model's application in Serve; the gateway serves every application that is named so."""


@dataclass(frozen=True)
class Served:
    name: str
    version: int
    storage: str
    """URL or absolute path of the storage root."""
    location: str
    """The model's folder below it, with a manifest."""
    settings: Serving
    latency: Latency | None = None
    """Measured by evaluation; None: numbers are derived from the latency budget alone."""

    @property
    def app(self) -> str:
        return MODEL_APP + self.name

    @property
    def scale(self) -> Scale:
        return plan_scale(self.settings, self.latency)


def served_version(registry: Registry, version: VersionRecord, settings: Serving) -> Served:
    """A registered version with the latency that its evaluation measured.

    Raises IntegrityError when a file of it was changed: before anything is started for it.
    """
    folder = registry.open(version)
    evaluation = EvaluationRecord.model_validate_json((folder / EVALUATION).read_text(encoding="utf-8"))
    latency = Latency(single_ms=evaluation.latency_ms_p50, per_row_ms=1000.0 / evaluation.throughput_per_s)
    location = f"{version.location}/{MODEL}"
    return Served(version.name, version.version, registry.storage.url, location, settings, latency)


class ModelArguments(BaseModel):
    """``args`` of a model's application in a Serve config file."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str
    version: int | None = None
    """None: the version that ``alias`` points at when the file is deployed."""
    alias: str = CHAMPION
    storage: str
    """A folder that every node sees, or a URL."""
    registry: str | None = None
    """SQLAlchemy URL; None: the SQLite file in the storage."""
    serving: Serving = Serving()

    def resolve(self) -> Served:
        """Raises ModelNotFound when there is no such version, IntegrityError when its files were changed."""
        registry = Registry(Storage(self.storage), self.registry)
        return served_version(registry, registry.get(self.name, self.version or self.alias), self.serving)
