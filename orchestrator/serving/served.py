"""What a replica is made from, and how a Serve config file names it.

In: a registered version. Out: a small ``Served`` value that any node can start a replica from, and again. Knows no Ray.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from orchestrator.recipe_serving import Listen, Serving, Shelf
from orchestrator.records import EvaluationRecord, VersionRecord
from orchestrator.registry.store import CHAMPION, Registry
from orchestrator.serving.scaling import Latency, Scale, plan_scale
from orchestrator.storage import EVALUATION, MODEL, SAMPLES, Storage

MODEL_APP = "model-"
"""Prefix of a model's application in Serve; the gateway serves every application that is named so."""
CANDIDATE_APP = "candidate-"
"""Of the version that is rolled out beside it."""
SHELF_APP = "shelf"
"""The application in which many models stand; the gateway serves each of them as if it had one of its own."""


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
    def key(self) -> str:
        """By which requests find a shelf's replica that has it loaded."""
        return f"{self.name}@{self.version}"

    @property
    def scale(self) -> Scale:
        return plan_scale(self.settings, self.latency)

    @property
    def at_once(self) -> int:
        """Inputs in one request, at most, that its replicas compute together."""
        return min(self.scale.max_batch_size, self.settings.max_instances)


_SERVED: TypeAdapter[Served] = TypeAdapter(Served)


def to_values(served: Served) -> dict[str, Any]:
    """As JSON has it: what a Serve config may hold."""
    values: dict[str, Any] = _SERVED.dump_python(served, mode="json", exclude_defaults=True)
    return values


def from_values(values: Mapping[str, Any]) -> Served:
    return _SERVED.validate_python(values)


def served_version(registry: Registry, version: VersionRecord, settings: Serving) -> Served:
    """A registered version with the latency that its evaluation measured.

    Raises IntegrityError when a file of it was changed: before anything is started for it.
    """
    folder = registry.open(version)
    evaluation = EvaluationRecord.model_validate_json((folder / EVALUATION).read_text(encoding="utf-8"))
    latency = Latency(single_ms=evaluation.latency_ms_p50, per_row_ms=1000.0 / evaluation.throughput_per_s)
    location = f"{version.location}/{MODEL}"
    return Served(version.name, version.version, registry.storage.url, location, settings, latency)


def known_inputs(storage: Storage, location: str) -> list[str | bytes]:
    """Some rows that the model at ``location`` was evaluated on; none of versions that were registered without."""
    rows = storage.read_json(f"{location.rpartition('/')[0]}/{SAMPLES}") or []
    inputs = [row["input"] for row in rows]
    return [given if isinstance(given, str) else base64.b64decode(given["b64"]) for given in inputs]


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


class GatewayArguments(Listen):
    """``args`` of the gateway's application in a Serve config file."""

    doors: int = Field(default=1, ge=1, le=1000)
    """How many gateways, each on a node of its own; each counts its own requests and limits."""
    resource: str | None = None
    """Custom resource of the nodes that may listen (``ray start --resources '{"door": 1}'``). None: one door is on the head
    node, several are anywhere."""

    @model_validator(mode="after")
    def _speaks_https_on_the_network(self) -> GatewayArguments:
        if self.is_open and self.tls is None and not self.open_to_network:
            raise ValueError(f"host {self.host} opens the endpoint to the network without tls: add it, or, if something in "
                             "front does TLS, say so with open_to_network: true")  # fmt: skip
        return self


class ShelfArguments(Shelf):
    """``args`` of the shelf's application in a Serve config file."""

    models: list[ModelArguments] = []
