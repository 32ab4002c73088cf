"""What every answer has, whatever happened inside: a request id, JSON for errors, a line in the metrics.

An ASGI middleware around the gateway's routes. Knows no models.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.serving.contract import REQUEST_ID_PATTERN, ApiError, dump_json

log = logging.getLogger(__name__)
REQUEST_ID = "x-request-id"
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Prometheus metrics of one gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("orchestrator_requests", "Requests by model and status.", ("model", "route", "status"),
                                registry=self.registry)  # fmt: skip
        self.seconds = Histogram("orchestrator_request_seconds", "Time to answer, by model.", ("model", "route"),
                                 buckets=_SECONDS, registry=self.registry)  # fmt: skip
        self.instances = Counter("orchestrator_instances", "Inputs predicted, by model and version.",
                                 ("model", "version"), registry=self.registry)  # fmt: skip
        self.batch_size = Histogram("orchestrator_batch_size", "Inputs that were computed together.", ("model",),
                                    buckets=_SIZES, registry=self.registry)  # fmt: skip
        self.in_flight_bytes = Gauge("orchestrator_in_flight_bytes", "Bytes of request bodies being answered.",
                                     registry=self.registry)  # fmt: skip

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Envelope:
    """Wraps an ASGI app. Routes tell ``model`` and ``route`` to the metrics through ``request.state``."""

    def __init__(self, app: ASGIApp, metrics: Metrics, answers_request_id: bool) -> None:
        """``answers_request_id``: False behind a proxy that puts the header on every answer itself."""
        self.app, self.metrics, self.answers_request_id = app, metrics, answers_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, statuses = time.perf_counter(), list[int]()
        state = scope.setdefault("state", {})
        state["request_id"] = sane_request_id(Headers(scope=scope).get(REQUEST_ID))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                if self.answers_request_id:
                    MutableHeaders(scope=message)[REQUEST_ID] = state["request_id"]
            await send(message)

        try:
            refuse_cross_site(scope)
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if statuses:
                raise
            await error_response(_as_api_error(error, state["request_id"]))(scope, receive, send_with_id)
        finally:
            self._count(state, statuses, time.perf_counter() - started)

    def _count(self, state: Mapping[str, Any], statuses: Sequence[int], seconds: float) -> None:
        model, route = state.get("model", ""), state.get("route", "other")
        self.metrics.requests.labels(model, route, str(statuses[0]) if statuses else "aborted").inc()
        if model:
            self.metrics.seconds.labels(model, route).observe(seconds)


def sane_request_id(told: str | None) -> str:
    """The client's own id if it is a plain token of at most 128 characters, else a new one."""
    return told if told and re.fullmatch(REQUEST_ID_PATTERN, told) else uuid.uuid4().hex


def refuse_cross_site(scope: Scope) -> None:
    """A page of another site may not make a visitor's browser post here; browsers say so themselves."""
    if scope["method"] == "POST" and Headers(scope=scope).get("sec-fetch-site") == "cross-site":
        raise ApiError(403, "cross_site", "a page of another site sent this request", "call the endpoint from a server")


def error_response(error: ApiError) -> Response:
    headers = {"retry-after": str(error.retry_after_s)} if error.retry_after_s is not None else {}
    return Response(dump_json(error.body()), error.status, headers, "application/json")


def _as_api_error(error: Exception, request_id: str) -> ApiError:
    if isinstance(error, ApiError):
        return error
    log.error("request %s failed", request_id, exc_info=error)
    return ApiError(500, "internal", "the endpoint failed to answer this request",
                    f"its log tells more about request {request_id}")  # fmt: skip
