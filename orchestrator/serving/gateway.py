"""The endpoint's HTTP face: one app, all models.

In: HTTP requests. Out: the answers of ``Models``, a small protocol behind which replicas, or a test's fake, stand.
Knows no Ray and no torch.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

import orchestrator
from orchestrator.serving.contract import (
    Answers,
    ApiError,
    ErrorAnswer,
    FeedbackRequest,
    InferRequest,
    Input,
    ModelInfo,
    PredictAnswer,
    PredictRequest,
    dump_json,
    infer_answer,
    predict_answer,
    read_feedback,
    read_infer,
    read_predict,
)
from orchestrator.serving.envelope import Envelope, Metrics, error_response

_MAX_BYTES_IN_FLIGHT = 256_000_000
"""Of request bodies at any moment: a crowd of large requests is turned away before memory runs out."""
_RETRY_AFTER_S = 1
_FOLDER = Path(__file__).parent


class Models(Protocol):
    """What the gateway asks of the models behind it."""

    async def names(self) -> list[str]:
        """All models that can be asked, sorted."""

    async def describe(self, name: str) -> ModelInfo | None:
        """None: there is no such model."""

    async def predict(self, name: str, version: str | None, inputs: Sequence[Input]) -> Answers:
        """Raises ApiError 503 if no replica takes it, 404 if ``version`` is not the one that answers."""

    async def feedback(self, name: str, entry: dict[str, Any]) -> None:
        """Store it for good."""


Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def build_app(models: Models, *, answers_request_id: bool = True, lifespan: Lifespan | None = None) -> FastAPI:
    """The app. ``lifespan`` runs around it, as FastAPI's own."""
    app = FastAPI(title="Model endpoint", version=orchestrator.__version__, docs_url=None, redoc_url=None,
                  lifespan=lifespan)  # fmt: skip
    metrics = Metrics()
    app.add_middleware(Envelope, metrics=metrics, answers_request_id=answers_request_id)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ApiError, _api_error)
    Routes(models, metrics).add_to(app)
    return app


class Routes:
    """The routes; each answers a Response or raises ApiError."""

    def __init__(self, models: Models, metrics: Metrics) -> None:
        self.models, self.metrics, self.bytes_in_flight = models, metrics, 0

    def add_to(self, app: FastAPI) -> None:
        version = "/v2/models/{name}/versions/{version}"
        get: list[tuple[str, Any, str]] = [
            ("/v1/models", self.list_models, "All models"),
            ("/v1/models/{name}", self.describe, "What a model takes and answers"),
            ("/v2", self.server, "Open Inference Protocol: server metadata"),
            ("/v2/health/live", self.live, "The gateway runs"),
            ("/v2/health/ready", self.ready, "Every model answers"),
            ("/v2/models/{name}", self.metadata, "Open Inference Protocol: model metadata"),
            ("/v2/models/{name}/ready", self.model_ready, "The model answers"),
            (version, self.metadata, "Metadata of one version"),
            (f"{version}/ready", self.model_ready, "This version answers"),
            ("/metrics", self.prometheus, "Prometheus metrics"),
        ]
        post: list[tuple[str, Any, str, dict[str, Any]]] = [
            ("/v1/models/{name}:predict", self.predict, "Classify texts or images", PredictRequest.model_json_schema()),
            ("/v1/models/{name}:feedback", self.feedback, "Tell the right label", FeedbackRequest.model_json_schema()),
            ("/v2/models/{name}/infer", self.infer, "Open Inference Protocol: infer", _infer_schema()),
            (f"{version}/infer", self.infer, "Infer with one version", _infer_schema()),
        ]
        for path, endpoint, summary in get:
            app.get(path, summary=summary, response_class=Response)(endpoint)
        for path, endpoint, summary, schema in post:
            body = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
            answers: dict[int | str, dict[str, Any]] = {
                code: {"model": ErrorAnswer} for code in (400, 404, 413, 422, 503)
            }
            if endpoint == self.predict:
                answers[200] = {"model": PredictAnswer}
            app.post(path, summary=summary, openapi_extra=body, responses=answers, response_class=Response)(endpoint)
        for path, file in (("/", "page.html"), ("/docs", "docs.html")):
            app.get(path, include_in_schema=False, response_class=Response)(_page(_FOLDER / file))

    # ------------------------------------------------------------------------------------------------------- asking

    async def predict(self, name: str, request: Request) -> Response:
        model = await self._model(name, request, "predict")
        async with self._answering(request, model) as body:
            inputs = read_predict(body, model)
            answers = await self._predict(model, None, inputs)
            return _json(predict_answer(answers, model, request.state.request_id))

    async def infer(self, name: str, request: Request, version: str | None = None) -> Response:
        model = await self._model(name, request, "infer", version)
        async with self._answering(request, model) as body:
            inputs, asked = read_infer(body, model)
            answers = await self._predict(model, version, inputs)
            return _json(infer_answer(answers, model, asked, request.state.request_id))

    async def feedback(self, name: str, request: Request) -> Response:
        model = await self._model(name, request, "feedback")
        async with self._answering(request, model) as body:
            told = read_feedback(body, model)
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            await self.models.feedback(name, {"time": time, "model_version": model.model_version} | told.model_dump())
            return _json({"stored": True, "request_id": told.request_id})

    async def _predict(self, model: ModelInfo, version: str | None, inputs: Sequence[Input]) -> Answers:
        answers = await self.models.predict(model.model_name, version, inputs)
        self.metrics.instances.labels(model.model_name, answers.version).inc(len(inputs))
        self.metrics.batch_size.labels(model.model_name).observe(answers.batch_size)
        return answers

    # ------------------------------------------------------------------------------------------------------ looking

    async def list_models(self) -> Response:
        described = [await self.models.describe(name) for name in await self.models.names()]
        return _json({"models": [model.model_dump() for model in described if model is not None]})

    async def describe(self, name: str, request: Request) -> Response:
        if name.endswith((":predict", ":feedback")):
            raise ApiError(405, "method_not_allowed", "GET is not possible here", "use POST")
        return _json((await self._model(name, request, "describe")).model_dump())

    async def server(self) -> Response:
        return _json({"name": "ray-orchestrator", "version": orchestrator.__version__, "extensions": []})

    async def live(self) -> Response:
        return _json({"live": True})

    async def ready(self) -> Response:
        if not await self.models.names():
            raise ApiError(503, "not_ready", "no model answers yet", "try again soon", retry_after_s=_RETRY_AFTER_S)
        return _json({"ready": True})

    async def metadata(self, name: str, request: Request, version: str | None = None) -> Response:
        return _json((await self._model(name, request, "describe", version)).metadata())

    async def model_ready(self, name: str, request: Request, version: str | None = None) -> Response:
        model = await self._model(name, request, "ready", version)
        return _json({"name": model.model_name, "ready": True})

    async def prometheus(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # -------------------------------------------------------------------------------------------------- in between

    async def _model(self, name: str, request: Request, route: str, version: str | None = None) -> ModelInfo:
        request.state.route = route
        model = await self.models.describe(name)
        if model is None:
            known = ", ".join(await self.models.names()) or "none yet"
            raise ApiError(404, "model_not_found", f"there is no model {name[:80]!r} here", f"models here: {known}")
        request.state.model = name
        if version not in (None, model.model_version):
            raise wrong_version(name, version, model.model_version)
        return model

    @asynccontextmanager
    async def _answering(self, request: Request, model: ModelInfo) -> AsyncIterator[bytes]:
        """The request's body; until the block ends its bytes count as in flight, and the model's time limit runs."""
        timeout_s, taken = model.limits.request_timeout_s, 0
        try:
            async with asyncio.timeout(timeout_s):
                chunks = []
                async for chunk in _body(request, model.limits.max_body_bytes):
                    self._take(len(chunk))
                    taken += len(chunk)
                    chunks.append(chunk)
                yield b"".join(chunks)
        except TimeoutError:
            raise ApiError(
                503, "timeout", f"the request was not answered within {timeout_s:g} s",
                "send fewer instances, or try again later", retry_after_s=_RETRY_AFTER_S,
            ) from None  # fmt: skip
        finally:
            self._take(-taken)

    def _take(self, size_bytes: int) -> None:
        if size_bytes > 0 and self.bytes_in_flight + size_bytes > _MAX_BYTES_IN_FLIGHT:
            raise overloaded("the endpoint is busy with many large requests")
        self.bytes_in_flight += size_bytes
        self.metrics.in_flight_bytes.set(self.bytes_in_flight)


def overloaded(message: str) -> ApiError:
    return ApiError(503, "overloaded", message, "try again later", retry_after_s=_RETRY_AFTER_S)


def wrong_version(name: str, asked: str | None, serving: str) -> ApiError:
    return ApiError(404, "version_not_found", f"{name} version {str(asked)[:40]!r} is not served here",
                    f"version {serving} is")  # fmt: skip


async def _body(request: Request, limit_bytes: int) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises ApiError 413 as soon as it is known to be too large."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ApiError(415, "unsupported_encoding", "compressed bodies are not taken", "send plain JSON")
    told = request.headers.get("content-length", "")
    received = int(told) if told.isascii() and told.isdigit() and len(told) < 20 else 0
    _check_size(received, limit_bytes)
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        _check_size(received, limit_bytes)
        yield chunk


def _check_size(size_bytes: int, limit_bytes: int) -> None:
    if size_bytes > limit_bytes:
        raise ApiError(413, "too_large", f"the body is larger than the {limit_bytes} bytes this model takes",
                       "send fewer or smaller instances at a time")  # fmt: skip


def _page(file: Path) -> Callable[[], Awaitable[Response]]:
    """A self-contained HTML file. Its own scripts and styles are allowed by their hashes, and nothing else is."""
    html = file.read_text(encoding="utf-8")
    allowed = {f"{tag}-src": _hashes(re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)) for tag in ("script", "style")}
    policy = {"default-src": "'none'", **allowed, "img-src": "'self' blob: data:", "connect-src": "'self'",
              "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'"}  # fmt: skip
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    async def page() -> Response:
        return Response(html, headers=headers, media_type="text/html; charset=utf-8")

    return page


def _hashes(texts: Sequence[str]) -> str:
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _infer_schema() -> dict[str, Any]:
    """The schema without references, since it stands inside another document."""
    schema = InferRequest.model_json_schema()
    parts = schema.pop("$defs")
    for field, part in (("inputs", "InferInput"), ("outputs", "InferOutput")):
        schema["properties"][field]["items"] = parts[part]
    return schema


def _json(value: Any) -> Response:
    return Response(dump_json(value), media_type="application/json", headers={"x-content-type-options": "nosniff"})


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("allow") or (error.headers or {}).get("Allow", "")
        told = ApiError(405, "method_not_allowed", f"{request.method[:20]} is not possible here", f"use {allowed}")
    else:
        told = ApiError(
            error.status_code, "not_found", "there is nothing at this address", "see /docs for what there is"
        )
    response = error_response(told)
    response.headers.update(error.headers or {})
    return response
