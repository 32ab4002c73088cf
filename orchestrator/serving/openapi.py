"""What ``/openapi.json`` says of each route: bodies, every status it answers, and the shape of each answer.

In: the app with its routes. Out: the description. What it says is tested against what the gateway does; nothing here
changes what is answered.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from orchestrator.serving.binary_tensors import JSON_LENGTH
from orchestrator.serving.contract import ModelInfo, Shape
from orchestrator.serving.inference_protocol import InferRequest

Described = dict[int | str, dict[str, Any]]
"""By status, as FastAPI takes it."""
_LOCKED = (401, 403, 404, 429)
_POSTED = (400, 401, 403, 404, 413, 415, 422, 429, 503)
_BINARY = "application/octet-stream"


class ErrorDetail(Shape):
    code: str
    message: str
    next_step: str


class ErrorAnswer(Shape):
    error: ErrorDetail


class ProtocolError(Shape):
    """As the Open Inference Protocol has it."""

    error: str
    code: str


class ModelList(Shape):
    models: list[ModelInfo]


class Prediction(Shape):
    label: str
    scores: dict[str, float]
    """Label -> probability."""


class PredictAnswer(Shape):
    predictions: list[Prediction]
    """In the instances' order."""
    model_name: str
    model_version: str
    request_id: str


class Part(Shape):
    text: str
    start: int
    end: int
    weight: float


class ExplainAnswer(Shape):
    label: str
    score: float
    baseline_score: float
    """With everything hidden."""
    method: str
    parts: list[Part] | None
    """Of a text, in its order."""
    heatmap: list[list[float]] | None
    """Of an image, row by row."""
    model_name: str
    model_version: str
    request_id: str


class FeedbackAnswer(Shape):
    stored: bool
    request_id: str


class ServerMetadata(Shape):
    name: str
    version: str
    extensions: list[str]


class Live(Shape):
    live: bool


class Ready(Shape):
    ready: bool


class ModelReady(Shape):
    name: str
    ready: bool


class TensorMetadata(Shape):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Shape):
    name: str
    versions: list[str]
    """Those that can be asked by their number."""
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    parameters: dict[str, Any]


class TensorAnswer(TensorMetadata):
    data: list[Any] | None = None
    """Left out where the tensor follows the JSON."""
    parameters: dict[str, Any] = {}


class InferAnswer(Shape):
    model_name: str
    model_version: str
    id: str
    parameters: dict[str, Any]
    outputs: list[TensorAnswer]


def of_get(answer: type[BaseModel] | None, *statuses: int, error: type[BaseModel] = ErrorAnswer) -> Described:
    """``answer``: of 200, in JSON; None: some object. ``error``: of the others."""
    fine: Described = {200: {"model": dict[str, Any] if answer is None else answer}}
    return fine | {status: {"model": error} for status in sorted(statuses)}


def of_locked(answer: type[BaseModel] | None, *statuses: int, error: type[BaseModel] = ErrorAnswer) -> Described:
    """The same of a route that may ask for a key."""
    return of_get(answer, *_LOCKED, *statuses, error=error)


def of_v2(answer: type[BaseModel], *statuses: int) -> Described:
    return of_get(answer, *statuses, error=ProtocolError)


def of_metrics() -> Described:
    told = of_get(None, 401, 403, 429)
    told[200] = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    return told


def of_post(answer: type[BaseModel]) -> Described:
    return of_get(answer, *_POSTED)


def of_infer() -> Described:
    told = of_v2(InferAnswer, *_POSTED)
    told[200]["content"] = {_BINARY: {"schema": {"type": "string", "format": "binary"}}}
    return told


def json_body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def infer_body() -> dict[str, Any]:
    """JSON, or JSON that is followed by binary tensors."""
    told = json_body(_without_references(InferRequest))
    told["requestBody"]["content"][_BINARY] = {"schema": {"type": "string", "format": "binary"}}
    header = {"name": JSON_LENGTH, "in": "header", "required": False, "schema": {"type": "integer", "minimum": 0},
              "description": "how many bytes of the body are JSON; 0: none, the body is one text or image file"}  # fmt: skip
    return told | {"parameters": [header]}


def describe(app: FastAPI) -> dict[str, Any]:
    """The document. Keys open what some models ask them for, so no route needs one in general."""
    api = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = api["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which no route answers
        schemas.pop(name, None)
    for path in api["paths"].values():
        for operation in path.values():
            told = operation["responses"].get("422", {}).get("content", {}).get("application/json", {})
            if told.get("schema", {}).get("$ref", "").endswith("/HTTPValidationError"):
                del operation["responses"]["422"]
            if "401" in operation["responses"]:
                operation["security"] = [{}, {"bearer": []}, {"header": []}]
    api["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return api


def _without_references(shape: type[BaseModel]) -> dict[str, Any]:
    """The schema as it may stand inside another document."""
    schema = shape.model_json_schema()
    parts = schema.pop("$defs", {})

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolved(parts[value["$ref"].rsplit("/", 1)[1]])
            return {key: resolved(inner) for key, inner in value.items()}
        return [resolved(inner) for inner in value] if isinstance(value, list) else value

    return dict(resolved(schema))
