"""What every answer has, whatever happened inside: a request id, JSON for errors; and what is told of it: metrics, a
line in the log, a span.

An ASGI middleware around the gateway's routes. Knows no models.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.serving.contract import REQUEST_ID_PATTERN, Answers, ApiError, dump_json
from orchestrator.serving.logs import log_request, request_line
from orchestrator.serving.traces import NoTracer, Tracer

log = logging.getLogger(__name__)
REQUEST_ID = "x-request-id"
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOLD = ("request_id", "model", "version", "instances", "batch_size", "bytes_in", "error")
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


class Metrics:
    """Prometheus metrics of one gateway."""

    def __init__(self) -> None:
        disable_created_metrics()  # they would double what is scraped
        self.registry = there = CollectorRegistry()
        by_model, by_version = ("model",), ("model", "version", "arm")
        self.requests = Counter("orchestrator_requests", "Requests by model and status.", ("model", "route", "status"),
                                registry=there)  # fmt: skip
        self.seconds = Histogram("orchestrator_request_seconds", "Time to answer, by model.", ("model", "route"),
                                 buckets=_SECONDS, registry=there)  # fmt: skip
        self.queue_seconds = Histogram("orchestrator_queue_seconds", "Wait at a replica for the batch to begin.", by_model,
                                       buckets=_SECONDS, registry=there)  # fmt: skip
        self.instances = Counter("orchestrator_instances", "Inputs answered, by version.", by_version, registry=there)
        self.tokens = Counter("orchestrator_tokens", "Tokens of texts that were computed.", by_model, registry=there)
        self.batch_size = Histogram("orchestrator_batch_size", "Inputs that were computed together.", by_model,
                                    buckets=_SIZES, registry=there)  # fmt: skip
        self.cache_hits = Counter("orchestrator_cache_hits", "Inputs whose answer was known.", by_model, registry=there)
        self.retries = Counter(
            "orchestrator_retries", "Requests asked again of another replica.", by_model, registry=there
        )
        self.recorded = Counter(
            "orchestrator_recorded", "Answers that were written to the storage.", by_model, registry=there
        )
        self.recorded_dropped = Counter("orchestrator_recorded_dropped", "Answers that should have been kept and are lost.",
                                        by_model, registry=there)  # fmt: skip
        self.replicas = Gauge("orchestrator_replicas", "Replicas that run.", by_model, registry=there)
        self.version_info = Gauge(
            "orchestrator_version_info", "1 for each version that answers.", by_version, registry=there
        )
        self.in_flight_bytes = Gauge("orchestrator_in_flight_bytes", "Bytes of request bodies being answered.",
                                     registry=there)  # fmt: skip

    def count(self, model: str, answers: Answers) -> None:
        """What one request was answered."""
        self.instances.labels(model, answers.version, answers.arm).inc(len(answers.outputs))
        if answers.cached:
            self.cache_hits.labels(model).inc(answers.cached)
        if answers.batch_size:
            self.batch_size.labels(model).observe(answers.batch_size)
            self.queue_seconds.labels(model).observe(answers.queue_ms / 1000)
            self.tokens.labels(model).inc(answers.tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Envelope:
    """Wraps an ASGI app. Routes tell what is to be known of a request through ``request.state``, by ``request_line``'s names,
    and ``key``."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: Tracer | None = None, is_logged: bool = False) -> None:
        """``is_logged``: a line for each request."""
        self.app, self.metrics, self.tracer, self.is_logged = app, metrics, tracer or NoTracer(), is_logged

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state, headers = scope.setdefault("state", {}), Headers(scope=scope)
        state["request_id"] = sane_request_id(headers.get(REQUEST_ID))
        method = scope["method"] if scope["method"] in _METHODS else "HTTP"
        with self.tracer.span(method, headers.get("traceparent")) as span:
            status = await self._answer(scope, receive, send)
            span.set("http.response.status_code", status or 499)
            for name in ("request_id", "model", "version", "route", "instances"):
                if name in state:
                    span.set(name, state[name])

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> int | None:
        """The status; None if the client hung up."""
        started, statuses, state = time.perf_counter(), list[int](), scope["state"]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                MutableHeaders(scope=message)[REQUEST_ID] = state["request_id"]
            await send(message)

        try:
            refuse_cross_site(scope)
            await self.app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            if not await _is_gone(receive):
                raise
        except ClientDisconnect:  # before its request was whole
            pass
        except Exception as error:
            if statuses:
                raise
            told = _as_api_error(error, state["request_id"])
            state["error"] = told.code
            await error_response(told, scope["path"])(scope, receive, send_with_id)
        finally:
            self._tell(state, statuses[0] if statuses else None, time.perf_counter() - started)
        return statuses[0] if statuses else None

    def _tell(self, state: Mapping[str, Any], status: int | None, seconds: float) -> None:
        model, route = state.get("model", ""), state.get("route", "other")
        self.metrics.requests.labels(model, route, "aborted" if status is None else str(status)).inc()
        if model:
            self.metrics.seconds.labels(model, route).observe(seconds)
        if self.is_logged:
            known = {name: state[name] for name in _TOLD if name in state}
            if "key" in state:
                known["key_id"] = state["key"].id
            log_request(request_line(**known, route=route, status=status, ms=1000 * seconds))


async def _is_gone(receive: Receive) -> bool:
    """Whether the client hung up: its request was cancelled for that, and there is nobody to tell."""
    try:
        async with asyncio.timeout(0.1):
            return (await receive())["type"] == "http.disconnect"
    except TimeoutError:
        return False


def sane_request_id(told: str | None) -> str:
    """The client's own id if it is a plain token of at most 128 characters, else a new one."""
    return told if told and re.fullmatch(REQUEST_ID_PATTERN, told) else uuid.uuid4().hex


def refuse_cross_site(scope: Scope) -> None:
    """A page of another site may not make a visitor's browser post here; browsers say so themselves."""
    if scope["method"] == "POST" and Headers(scope=scope).get("sec-fetch-site") == "cross-site":
        raise ApiError(403, "cross_site", "a page of another site sent this request", "call the endpoint from a server")


def error_response(error: ApiError, path: str) -> Response:
    headers = {"retry-after": str(error.retry_after_s)} if error.retry_after_s is not None else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(dump_json(error.body(path)), error.status, headers, "application/json")


def _as_api_error(error: Exception, request_id: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    log.error("request %s failed", request_id, exc_info=error)
    return ApiError(500, "internal", "the endpoint failed to answer this request",
                    f"its log tells more about request {request_id}")  # fmt: skip
