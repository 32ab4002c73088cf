"""The recipe's ``serving`` section: where the endpoint listens, to whom it answers, and what it promises."""

from __future__ import annotations

import ipaddress
from typing import Literal

from pydantic import Field, field_validator, model_validator

from orchestrator.section import Section

Precision = Literal["auto", "fp32", "bf16"]


def full_path(given: str, example: str, does: str) -> str:
    """Raises ValueError if it depends on the folder that a process runs in."""
    if not given.startswith("/"):
        raise ValueError(f"must be a full path, such as {example}: another process {does} it")
    return given


class Tls(Section):
    """Files on the machine that listens; TLS 1.2 or newer is spoken."""

    certificate: str
    """PEM, with the whole chain."""
    key: str
    """PEM, without a password."""

    @field_validator("certificate", "key")
    @classmethod
    def _is_a_full_path(cls, given: str) -> str:
        return full_path(given, "/etc/endpoint/chain.pem", "reads")


class Rollout(Section):
    """When a version that is rolled out beside the stable one is taken back, or goes on. ``serve --canary 10%`` starts it."""

    max_error_rate_rise: float = Field(default=0.01, ge=0.0, le=1.0)
    """By how much the share of requests that it fails may be above the stable version's."""
    max_slow_rise: float = Field(default=0.05, ge=0.0, le=1.0)
    """By how much the share of requests that take longer than ``latency_budget_ms`` may be above the stable version's."""
    min_agreement: float | None = Field(default=None, gt=0.0, le=1.0)
    """Share of the compared inputs that both versions have to label alike; None: it may answer differently."""
    compare: float = Field(default=0.2, ge=0.0, le=1.0)
    """Share of the candidate's requests that the stable version is asked as well, in the background."""
    promote_after: int | None = Field(default=None, ge=1)
    """Requests after which a canary that nothing speaks against answers everybody. Small faults take many to be seen: one
    that fails 5% of its requests, some 400 to 1,900. None: a person decides."""
    confidence: float = Field(default=0.95, ge=0.5, lt=1.0)
    """That a version is not taken back by mistake, however often one looks."""


class Recording(Section):
    """Answers that are kept as Parquet files in the storage (``serve/predictions/NAME``), for whoever watches the model."""

    share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Of the requests."""
    keep_inputs: bool = False
    """Texts too, which may be personal. Of images, and otherwise of texts, a hash is kept."""
    keep_days: int = Field(default=90, ge=1, le=36_500)


class Traces(Section):
    """Requests as OpenTelemetry spans; takes the extra ``trace``."""

    endpoint: str = Field(pattern=r"^https?://[^/\s]+")
    """Of a collector that takes OTLP over HTTP, such as ``http://127.0.0.1:4318``."""
    share: float = Field(default=1.0, ge=0.0, le=1.0)
    """Of the requests; a client that sends a trace of its own decides that itself."""


class Shelf(Section):
    """Replicas that many models share. The first model that comes to the shelf starts it, and later ones change what of this
    their recipes name."""

    bytes: int = Field(default=2_000_000_000, ge=1_000_000, le=1_000_000_000_000)
    """Memory that the models which are loaded may take in each replica, beside the some 600 MB of the process itself. The
    model that was not asked for longest is unloaded first."""
    min_replicas: int = Field(default=1, ge=1, le=1000)
    max_replicas: int = Field(default=1, ge=1, le=1000)
    cpus_per_replica: float = Field(default=1.0, gt=0.0, le=256.0)
    """CPU cores that each replica reserves, and the threads it computes with."""

    @model_validator(mode="after")
    def _replicas_in_order(self) -> Shelf:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) must not exceed max_replicas ({self.max_replicas})")
        return self


class Listen(Section):
    """Where the endpoint listens, and what it tells of requests. The first model that comes to it starts it."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the endpoint to the network, which takes ``keys`` and ``tls``."""
    port: int = Field(default=8000, ge=1, le=65_535)
    tls: Tls | None = None
    """Speak HTTPS."""
    open_to_network: bool = False
    """Listen on the network without keys or without TLS: something in front of the endpoint sees to them."""
    request_log: str | None = None
    """File on the machine that listens, to which a line of JSON is added for each request; never inputs or keys."""
    traces: Traces | None = None

    @field_validator("request_log")
    @classmethod
    def _is_a_full_path(cls, given: str | None) -> str | None:
        return given if given is None else full_path(given, "/var/log/endpoint.jsonl", "writes")

    @property
    def is_open(self) -> bool:
        """Whether others than this machine get there."""
        return not is_loopback(self.host)


class Serving(Listen):
    min_replicas: int = Field(default=1, ge=0, le=1000)
    """0: the last replica ends too when nobody asks, and the first request afterwards waits until one has started."""
    max_replicas: int = Field(default=2, ge=1, le=1000)
    idle_s: float = Field(default=60.0, ge=1.0, le=86_400.0)
    """A replica that is not needed for so long ends."""
    cpus_per_replica: float = Field(default=1.0, gt=0.0, le=256.0)
    """CPU cores that each replica reserves, and the threads it computes with."""
    max_batch_size: int = Field(default=32, ge=1, le=4096)
    """Instances that are predicted together at most."""
    precision: Precision = "auto"
    """Of a model that was not compressed. ``auto``: bf16 where the hardware multiplies it, it is faster, and rows that it was
    evaluated on keep their labels (no probability moves by more than 0.01); else fp32."""
    runtime: Literal["auto", "torch"] = "auto"
    """What computes a model that was not compressed. ``auto``: OpenVINO on processors where the extra ``openvino`` is
    installed, under the same conditions as bf16; else torch. On the shelf, torch."""
    latency_budget_ms: float = Field(default=50.0, gt=0.0, le=60_000.0)
    """What a request may take; the autoscaling follows from it."""
    request_timeout_s: float = Field(default=30.0, gt=0.0, le=3600.0)
    """A request that is not answered by then is answered with 503."""
    max_instances: int = Field(default=128, ge=1, le=100_000)
    """Instances in one request at most."""
    max_body_bytes: int = Field(default=10_000_000, ge=1_000, le=1_000_000_000)
    """Size of a request's body at most."""
    max_pixels: int = Field(default=64_000_000, ge=1, le=1_000_000_000)
    """Of an image at most: a small file can unfold to gigabytes."""
    keys: bool = False
    """Answer those alone who show a key; ``orchestrator keys create`` makes one."""
    recording: Recording | None = None
    cache_bytes: int = Field(default=0, ge=0, le=100_000_000_000)
    """Memory for answers that were given: an input that comes again is not computed again. 0: none are kept. How soon an
    answer comes then tells whether somebody asked the same before."""
    rollout: Rollout = Rollout()
    shared: bool = False
    """Put the model on the shelf, beside others: it is loaded when it is first asked. ``min_replicas``, ``max_replicas`` and
    ``cpus_per_replica`` are then the shelf's, not the model's."""
    shelf: Shelf = Shelf()

    @model_validator(mode="after")
    def _is_not_open_by_mistake(self) -> Serving:
        missing = [name for name, there in (("keys: true", self.keys), ("tls", self.tls)) if not there]
        if missing and self.is_open and not self.open_to_network:
            raise ValueError(
                f"host {self.host} opens the endpoint to the network without {' and '.join(missing)}: add them, or, if "
                "something in front sees to them, say so with open_to_network: true"
            )
        return self

    @model_validator(mode="after")
    def _replicas_in_order(self) -> Serving:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) must not exceed max_replicas ({self.max_replicas})")
        return self


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine gets there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
