"""The endpoint's HTTP face: one app, all models.

In: HTTP requests. Out: the answers of ``Models``, a small protocol behind which replicas, or a test's fake, stand.
Knows no Ray and no torch.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

import orchestrator
from orchestrator.serving import openapi as api
from orchestrator.serving.access import Keys, Scope, admit_any, key_in
from orchestrator.serving.binary_tensors import EXTENSION, JSON_LENGTH
from orchestrator.serving.contract import (
    EXPLAIN_PARTS,
    Answers,
    ApiError,
    Caller,
    Explained,
    ExplainRequest,
    FeedbackRequest,
    Input,
    ModelInfo,
    PredictRequest,
    dump_json,
    predict_answer,
    read_explain,
    read_feedback,
    read_predict,
)
from orchestrator.serving.envelope import Envelope, Metrics, error_response
from orchestrator.serving.inference_protocol import infer_answer, read_infer
from orchestrator.serving.pages import page
from orchestrator.serving.traces import PREDICT, READ, NoTracer, Tracer

_MAX_BYTES_IN_FLIGHT = 256_000_000
"""Of request bodies at any moment: a crowd of large requests is turned away before memory runs out."""
_LARGE_BYTES = 262_144
"""A body from this size on is parsed in a thread."""
_RETRY_AFTER_S = 1
_SCOPES: Mapping[str, Scope] = {"predict": "predict", "infer": "predict", "explain": "predict", "feedback": "feedback"}
"""Of a key, by route; what is not here any key opens."""
CLIENT_ID = "x-client-id"
"""Header by which a client, or one of several behind a key, stays with one version while two answer; without either, a
content does."""
_FOLDER = Path(__file__).parent


class Models(Protocol):
    """What the gateway asks of the models behind it."""

    async def names(self) -> list[str]:
        """All models that can be asked, sorted."""

    async def describe(self, name: str, version: str | None = None) -> ModelInfo | None:
        """None: there is no such model. ``version``: of the one that is rolled out; any other gives the stable one."""

    async def predict(self, name: str, version: str | None, inputs: Sequence[Input], caller: Caller) -> Answers:
        """Raises ApiError 503 if no replica takes it, 404 if ``version`` is none that answers."""

    async def explain(self, name: str, value: Input, asked: ExplainRequest) -> Explained:
        """Of the stable version. Raises ApiError 503 if no replica takes it."""

    async def feedback(self, name: str, entry: dict[str, Any]) -> None:
        """Store it for good."""

    async def rollout(self, name: str) -> dict[str, Any] | None:
        """What is known of the version that is rolled out beside the stable one; None: there is none."""

    def keys(self, name: str) -> Keys | None:
        """That open this model; None: it is open to all."""

    def is_ready(self, name: str) -> bool:
        """Whether a replica of it runs, or starts when it is asked."""


Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def build_app(
    models: Models, *, lifespan: Lifespan | None = None, metrics: Metrics | None = None, tracer: Tracer | None = None,
    is_logged: bool = False,
) -> FastAPI:  # fmt: skip
    """The app. ``lifespan`` runs around it, as FastAPI's own; ``is_logged``: a line for each request."""
    app = FastAPI(title="Model endpoint", version=orchestrator.__version__, docs_url=None, redoc_url=None,
                  lifespan=lifespan)  # fmt: skip
    metrics, tracer = metrics or Metrics(), tracer or NoTracer()
    app.add_middleware(Envelope, metrics=metrics, tracer=tracer, is_logged=is_logged)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ApiError, _api_error)
    Routes(models, metrics, tracer).add_to(app)
    return app


class Routes:
    """The routes; each answers a Response or raises ApiError."""

    def __init__(self, models: Models, metrics: Metrics, tracer: Tracer) -> None:
        self.models, self.metrics, self.tracer, self.bytes_in_flight = models, metrics, tracer, 0

    def add_to(self, app: FastAPI) -> None:
        version = "/v2/models/{name}/versions/{version}"
        metadata, ready = api.of_locked(api.ModelMetadata, error=api.ProtocolError), api.of_v2(api.ModelReady, 404, 503)
        version_ready = api.of_locked(api.ModelReady, 503, error=api.ProtocolError)
        get: list[tuple[str, Any, str, api.Described]] = [
            ("/v1/models", self.list_models, "All models", api.of_get(api.ModelList)),
            ("/v1/models/{name}", self.describe, "What a model takes and answers", api.of_locked(ModelInfo, 405)),
            ("/v1/models/{name}/rollout", self.rollout, "A new version beside the stable one: both compared",
             api.of_locked(None)),
            ("/v2", self.server, "Open Inference Protocol: server metadata", api.of_v2(api.ServerMetadata)),
            ("/v2/health/live", self.live, "The gateway runs", api.of_v2(api.Live)),
            ("/v2/health/ready", self.ready, "Every model has a replica, or starts one", api.of_v2(api.Ready, 503)),
            ("/v2/models/{name}", self.metadata, "Open Inference Protocol: model metadata", metadata),
            ("/v2/models/{name}/ready", self.model_ready, "It has a replica, or starts one", ready),
            (version, self.version_metadata, "Metadata of one version", metadata),
            (f"{version}/ready", self.version_ready, "The same of one version", version_ready),
            ("/metrics", self.prometheus, "Prometheus metrics", api.of_metrics()),
        ]  # fmt: skip
        ask, tell, explain = (
            api.json_body(s.model_json_schema()) for s in (PredictRequest, FeedbackRequest, ExplainRequest)
        )
        post: list[tuple[str, Any, str, dict[str, Any], api.Described]] = [
            ("/v1/models/{name}:predict", self.predict, "Classify texts or images", ask, api.of_post(api.PredictAnswer)),
            ("/v1/models/{name}:feedback", self.feedback, "Tell the right label", tell, api.of_post(api.FeedbackAnswer)),
            ("/v1/models/{name}:explain", self.explain, "What each word or patch does for a score", explain,
             api.of_post(api.ExplainAnswer)),
            ("/v2/models/{name}/infer", self.infer, "Open Inference Protocol: infer", api.infer_body(), api.of_infer()),
            (f"{version}/infer", self.infer_version, "Infer with one version", api.infer_body(), api.of_infer()),
        ]  # fmt: skip
        # First, so that what is not possible at NAME:predict is told what is: NAME alone would match it as well.
        for path, endpoint, summary, body, answers in post:
            app.post(path, summary=summary, openapi_extra=body, responses=answers, response_class=Response)(endpoint)
        for path, endpoint, summary, answers in get:
            app.get(path, summary=summary, responses=answers, response_class=Response)(endpoint)
        for path, file in (("/", "page.html"), ("/docs", "docs.html")):
            app.get(path, include_in_schema=False, response_class=Response)(page(_FOLDER / file))
        app.get("/-/healthz", include_in_schema=False, response_class=Response)(self.healthz)
        app.openapi = cache(partial(api.describe, app))  # type: ignore[method-assign]

    # ------------------------------------------------------------------------------------------------------- asking

    async def predict(self, name: str, request: Request) -> Response:
        model = await self._model(name, request, "predict")
        async with self._answering(request, model) as body:
            inputs = await _read(read_predict, body, model)
            answers = await self._predict(model, None, inputs, body, request)
            return _json(predict_answer(answers, model, request.state.request_id))

    async def infer(self, name: str, request: Request) -> Response:
        return await self._infer(name, None, request)

    async def infer_version(self, name: str, version: str, request: Request) -> Response:
        return await self._infer(name, version, request)

    async def _infer(self, name: str, version: str | None, request: Request) -> Response:
        model = await self._model(name, request, "infer", version)
        async with self._answering(request, model) as body:
            inputs, asked = await _read(read_infer, body, model, request.headers.get(JSON_LENGTH))
            answers = await self._predict(model, version, inputs, body, request)
            return _json(*infer_answer(answers, model, asked, request.state.request_id))

    async def explain(self, name: str, request: Request) -> Response:
        model = await self._model(name, request, "explain")
        async with self._answering(request, model) as body:
            value, asked = await _read(read_explain, body, model)
            if (keys := self.models.keys(model.model_name)) is not None:
                keys.take_inputs(request.state.key, EXPLAIN_PARTS)  # so many variants of it are computed
            explained = await self.models.explain(model.model_name, value, asked)
            if explained.busy:
                if keys is not None:
                    keys.give_back(request.state.key, EXPLAIN_PARTS)
                raise overloaded("another input is being explained")
            if explained.refused is not None:
                raise ApiError(422, "explanation_refused", *explained.refused)
            known = {"model_name": model.model_name, "model_version": explained.version}
            return _json(explained.explanation | known | {"request_id": request.state.request_id})

    async def feedback(self, name: str, request: Request) -> Response:
        model = await self._model(name, request, "feedback")
        async with self._answering(request, model) as body:
            told = await _read(read_feedback, body, model)
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            await self.models.feedback(name, {"time": time, "model_version": model.model_version} | told.model_dump())
            return _json({"stored": True, "request_id": told.request_id})

    async def _predict(
        self, model: ModelInfo, version: str | None, inputs: Sequence[Input], body: bytes, request: Request
    ) -> Answers:
        client = request.headers.get(CLIENT_ID)
        identity: str | bytes = body if client is None else client
        if (keys := self.models.keys(model.model_name)) is not None:
            keys.take_inputs(request.state.key, len(inputs))
            identity = request.state.key.id if client is None else f"{request.state.key.id}/{client}"
        caller = Caller(identity, request.state.request_id, random.random(), request.state.due_s)
        request.state.instances = len(inputs)
        with self.tracer.span(PREDICT) as span:
            answers = await self.models.predict(model.model_name, version, inputs, caller)
            span.set("queue_ms", answers.queue_ms)
            span.set("batch_size", answers.batch_size)
        request.state.version, request.state.batch_size = answers.version, answers.batch_size
        self.metrics.count(model.model_name, answers)
        return answers

    # ------------------------------------------------------------------------------------------------------ looking

    async def list_models(self, request: Request) -> Response:
        described = [await self.models.describe(name) for name in await self._visible(request)]
        return _json({"models": [model.model_dump() for model in described if model is not None]})

    async def describe(self, name: str, request: Request) -> Response:
        if name.endswith((":predict", ":feedback", ":explain")):
            raise HTTPException(405, headers={"Allow": "POST"})
        return _json((await self._model(name, request, "describe")).model_dump())

    async def rollout(self, name: str, request: Request) -> Response:
        model = await self._model(name, request, "rollout")
        told = await self.models.rollout(model.model_name)
        if told is None:
            raise ApiError(404, "no_rollout", f"no version of {name} is rolled out beside the stable one",
                           "start one: orchestrator serve RECIPE --canary 10%")  # fmt: skip
        return _json(told)

    async def server(self) -> Response:
        return _json({"name": "ray-orchestrator", "version": orchestrator.__version__, "extensions": [EXTENSION]})

    async def live(self) -> Response:
        return _json({"live": True})

    async def healthz(self) -> Response:
        """What KubeRay asks whether a pod may get requests."""
        names = await self.models.names()
        return Response("success" if names else "no model answers yet", 200 if names else 503, media_type="text/plain")

    async def ready(self) -> Response:
        ready = [self.models.is_ready(name) for name in await self.models.names()]
        if not ready:
            raise _not_ready("no model answers yet")
        if not all(ready):  # not which: their names are for those who may ask them
            raise _not_ready(f"{ready.count(False)} of {len(ready)} models have no replica that runs")
        return _json({"ready": True})

    async def metadata(self, name: str, request: Request) -> Response:
        return await self._metadata(name, None, request)

    async def version_metadata(self, name: str, version: str, request: Request) -> Response:
        return await self._metadata(name, version, request)

    async def _metadata(self, name: str, version: str | None, request: Request) -> Response:
        model = await self._model(name, request, "describe", version)
        return _json(model.metadata(await self._versions(name)))

    async def model_ready(self, name: str, request: Request) -> Response:
        return await self._ready(name, None, request)

    async def version_ready(self, name: str, version: str, request: Request) -> Response:
        return await self._ready(name, version, request)

    async def _ready(self, name: str, version: str | None, request: Request) -> Response:
        model = await self._model(name, request, "ready", version)
        if not self.models.is_ready(name):
            raise _not_ready(f"no replica of {name} runs")
        return _json({"name": model.model_name, "ready": True})

    async def prometheus(self, request: Request) -> Response:
        locks = [keys for name in await self.models.names() if (keys := self.models.keys(name)) is not None]
        if locks:
            admit_any(locks, key_in(request.headers))
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # -------------------------------------------------------------------------------------------------- in between

    async def _model(self, name: str, request: Request, route: str, version: str | None = None) -> ModelInfo:
        request.state.route = route
        model = await self.models.describe(name, version)
        if model is None:
            known = ", ".join(await self._visible(request)) or "none yet"
            raise ApiError(404, "model_not_found", f"there is no model {name[:80]!r} here", f"models here: {known}")
        request.state.model = name
        keys = self.models.keys(name)
        if keys is not None and (route != "ready" or version is not None):  # which versions there are is not for all
            request.state.key = keys.admit(key_in(request.headers), _SCOPES.get(route), name)
        if version not in (None, model.model_version):
            raise wrong_version(name, version, model.model_version)
        return model

    async def _versions(self, name: str) -> list[str]:
        """That answer: the stable one, and one that is rolled out beside it."""
        told = await self.models.rollout(name) or {}
        found = [await self.models.describe(name, version) for version in (None, told.get("candidate_version"))]
        return list(dict.fromkeys(model.model_version for model in found if model is not None))

    async def _visible(self, request: Request) -> list[str]:
        """Names of the models that this request may know of."""
        shown, names = key_in(request.headers), await self.models.names()
        locks = {name: self.models.keys(name) for name in names}
        return [name for name, keys in locks.items() if keys is None or keys.opens(shown, name)]

    @asynccontextmanager
    async def _answering(self, request: Request, model: ModelInfo) -> AsyncIterator[bytes]:
        """The request's body; until the block ends its bytes count as in flight, and the model's time limit runs."""
        timeout_s, taken = model.limits.request_timeout_s, 0
        try:
            async with asyncio.timeout(timeout_s) as limit:
                request.state.due_s, chunks = limit.when(), list[bytes]()
                with self.tracer.span(READ):
                    async for chunk in _body(request, model.limits.max_body_bytes):
                        self._take(len(chunk))
                        taken += len(chunk)
                        chunks.append(chunk)
                body = b"".join(chunks)
                chunks.clear()  # it is held once
                with _given_up_when_gone(request):
                    yield body
        except TimeoutError:
            raise ApiError(
                503, "timeout", f"the request was not answered within {timeout_s:g} s",
                "send fewer instances, or try again later", retry_after_s=_RETRY_AFTER_S,
            ) from None  # fmt: skip
        finally:
            request.state.bytes_in = taken
            self._take(-taken)

    def _take(self, size_bytes: int) -> None:
        if size_bytes > 0 and self.bytes_in_flight + size_bytes > _MAX_BYTES_IN_FLIGHT:
            raise overloaded("the endpoint is busy with many large requests")
        self.bytes_in_flight += size_bytes
        self.metrics.in_flight_bytes.set(self.bytes_in_flight)


def overloaded(message: str) -> ApiError:
    return ApiError(503, "overloaded", message, "try again later", retry_after_s=_RETRY_AFTER_S)


def _not_ready(message: str) -> ApiError:
    return ApiError(503, "not_ready", message, "try again soon", retry_after_s=_RETRY_AFTER_S)


def wrong_version(name: str, asked: str | None, serving: str) -> ApiError:
    return ApiError(404, "version_not_found", f"{name} version {str(asked)[:40]!r} is not served here",
                    f"version {serving} is")  # fmt: skip


_Parameters = ParamSpec("_Parameters")
_Found = TypeVar("_Found")


async def _read(
    reader: Callable[Concatenate[bytes, _Parameters], _Found],
    body: bytes,
    *more: _Parameters.args,
    **options: _Parameters.kwargs,
) -> _Found:
    """What ``reader`` makes of the body. Others are answered while it reads a large one."""
    if len(body) < _LARGE_BYTES:
        return reader(body, *more, **options)
    return await asyncio.to_thread(reader, body, *more, **options)


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


@contextmanager
def _given_up_when_gone(request: Request) -> Iterator[None]:
    """Cancels the block when the client hangs up: nobody computes what nobody waits for."""
    answering = asyncio.current_task()
    assert answering is not None

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        answering.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


def _check_size(size_bytes: int, limit_bytes: int) -> None:
    if size_bytes > limit_bytes:
        raise ApiError(413, "too_large", f"the body is larger than the {limit_bytes} bytes this model takes",
                       "send fewer or smaller instances at a time")  # fmt: skip


def _json(value: Any, following: bytes = b"") -> Response:
    """``following``: binary tensors behind the JSON."""
    content, headers = dump_json(value), {"x-content-type-options": "nosniff"}
    if not following:
        return Response(content, media_type="application/json", headers=headers)
    headers[JSON_LENGTH] = str(len(content))
    return Response(content + following, media_type="application/octet-stream", headers=headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.state.error = error.code
    return error_response(error, request.url.path)


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
    request.state.error = told.code
    response = error_response(told, request.url.path)
    response.headers.update(error.headers or {})
    return response
