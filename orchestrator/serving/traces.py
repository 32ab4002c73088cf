"""Where a request's time went, as OpenTelemetry spans: a client's own trace goes on here.

In: the address of a collector, and what a client says of its trace. Out: spans, by OTLP over HTTP; nothing at all without an
address. A span holds neither inputs nor messages of errors. Knows no HTTP server and no Ray.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from orchestrator.errors import ServingFailed, UserError
from orchestrator.serving.contract import ApiError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter

READ, PREDICT = "read", "queue and predict"
"""Phases of a request at the gateway: its body arrives; it waits for a replica and is computed there."""
Value = str | bool | int | float
_EXPORTER, _PATH = "opentelemetry.exporter.otlp.proto.http.trace_exporter", "/v1/traces"
_WAITING = 4_096
"""Spans that wait for the collector, at most; what comes on top is dropped."""
_MAX_VALUE, _MAX_HEADER = 128, 256
"""Characters of an attribute, and of a ``traceparent``: today's have 55."""
_STATUS = "http.response.status_code"
_CLOSING_S = 2.0


class Span(Protocol):
    """What is going on."""

    def set(self, name: str, value: Value) -> None:
        """An attribute. ``http.response.status_code`` from 500 on makes it a failed span."""


class Tracer(Protocol):
    def span(self, name: str, traceparent: str | None = None) -> AbstractContextManager[Span]:
        """Runs around what is measured. An exception passes through, and is told by its code or type.

        ``traceparent``: the header that came with a request, if one did; what is not well-formed is ignored. Without one the
        span is a part of the one around it, if there is one.
        """

    def close(self) -> None:
        """Send what is left, if that takes two seconds at most."""


def tracer(endpoint: str, share: float = 1.0) -> Tracer:
    """``endpoint``: of an OTLP/HTTP collector, such as ``http://127.0.0.1:4318``. ``share``: of the requests that are traced,
    0 to 1; a client that sends a trace decides that itself. Raises UserError for an address that is none, ServingFailed
    without the extra ``trace``."""
    address = urlsplit(endpoint)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UserError(f"{endpoint[:80]!r} is no address of a collector", "give one such as http://127.0.0.1:4318")
    try:
        exporter = import_module(_EXPORTER).OTLPSpanExporter
        return OpenTelemetry(exporter(endpoint=endpoint.rstrip("/").removesuffix(_PATH) + _PATH), share)
    except ImportError:
        raise ServingFailed(
            "traces take packages that are missing here", "pip install 'ray-orchestrator[trace]'"
        ) from None


class NoTracer:
    """Where nothing is traced."""

    def __init__(self) -> None:
        self._nothing = nullcontext(_NoSpan())

    def span(self, name: str, traceparent: str | None = None) -> AbstractContextManager[Span]:
        return self._nothing

    def close(self) -> None:
        return None


class _NoSpan:
    def set(self, name: str, value: Value) -> None:
        return None


class OpenTelemetry:
    """A tracer of its own: no other library in this process gets to send spans by it."""

    def __init__(self, exporter: SpanExporter, share: float = 1.0) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        resource = Resource.create({"service.name": "ray-orchestrator"})
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(share)), resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=_WAITING))
        self._tracer = self._provider.get_tracer(__name__)

    @contextmanager
    def span(self, name: str, traceparent: str | None = None) -> Iterator[Span]:
        from opentelemetry.trace import SpanKind, get_current_span

        told = _continued(traceparent)
        is_inner = told is None and get_current_span().get_span_context().is_valid
        started = self._tracer.start_as_current_span(
            name, told, SpanKind.INTERNAL if is_inner else SpanKind.SERVER,
            record_exception=False, set_status_on_exception=False,
        )  # fmt: skip
        with started as inner:
            try:
                yield _Span(inner)
            except BaseException as error:
                _tell(inner, error)
                raise

    def close(self) -> None:
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)  # waits for half a minute by itself
        closing.start()
        closing.join(_CLOSING_S)


class _Span:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def set(self, name: str, value: Value) -> None:
        self._inner.set_attribute(name, _bounded(value))
        if name == _STATUS and isinstance(value, int) and value >= 500:
            _fail(self._inner)


def _bounded(value: Value) -> Value:
    return value[:_MAX_VALUE] if isinstance(value, str) else value


def _continued(traceparent: str | None) -> Context | None:
    """The client's trace; None if it sent none, or something else."""
    from opentelemetry.context import Context
    from opentelemetry.trace import get_current_span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if not traceparent or len(traceparent) > _MAX_HEADER:
        return None
    context = TraceContextTextMapPropagator().extract({"traceparent": traceparent}, Context())
    return context if get_current_span(context).get_span_context().is_valid else None


def _tell(span: Any, error: BaseException) -> None:
    """Of what ended a span; that a client asked for something wrong, or hung up, is no failure of ours."""
    span.set_attribute("error.type", error.code if isinstance(error, ApiError) else type(error).__name__)
    is_theirs = error.status < 500 if isinstance(error, ApiError) else isinstance(error, asyncio.CancelledError)
    if not is_theirs:
        _fail(span)


def _fail(span: Any) -> None:
    from opentelemetry.trace import StatusCode

    span.set_status(StatusCode.ERROR)
