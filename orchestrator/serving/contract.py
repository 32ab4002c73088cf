"""What clients send and get: TensorFlow-Serving-like ``/v1`` and the Open Inference Protocol ``/v2``.

In: a request's body as bytes, and what the model says of itself. Out: checked inputs (texts, or the bytes of images),
or an ``ApiError`` that names the field. Knows no HTTP server, no network and no Ray.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

REQUEST_ID_PATTERN = r"^[A-Za-z0-9._:-]{1,128}$"
_MAX_TEXT_CHARACTERS = 1_000_000
_LABEL, _PROBABILITIES = "label", "probabilities"

Input = str | bytes
"""A text, or the bytes of an image file."""


class ApiError(Exception):
    """An answer other than 200: ``{"error": {"code", "message", "next_step"}}``."""

    def __init__(
        self, status: int, code: str, message: str, next_step: str = "", *, retry_after_s: int | None = None
    ) -> None:
        super().__init__(status, code, message, next_step)
        self.status, self.code, self.message, self.next_step = status, code, message, next_step
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        return {"error": {"code": self.code, "message": self.message, "next_step": self.next_step}}


class Shape(BaseModel):
    """Part of a request or an answer."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


# -------------------------------------------------------------------------------------------------- what a model says


class Limits(Shape):
    max_instances: int
    """Instances in one request at most."""
    max_body_bytes: int
    request_timeout_s: float


class ModelInfo(Shape):
    """What a model on the endpoint says of itself."""

    model_name: str
    model_version: str
    task: str
    input_kind: Literal["text", "image"]
    labels: tuple[str, ...]
    limits: Limits

    def metadata(self) -> dict[str, Any]:
        """The Open Inference Protocol's model metadata."""
        return {
            "name": self.model_name,
            "versions": [self.model_version],
            "platform": "pytorch",
            "inputs": [{"name": self.input_kind, "datatype": "BYTES", "shape": [-1]}],
            "outputs": [
                {"name": _LABEL, "datatype": "BYTES", "shape": [-1]},
                {"name": _PROBABILITIES, "datatype": "FP32", "shape": [-1, len(self.labels)]},
            ],
            "parameters": {"labels": list(self.labels), "task": self.task},
        }


# ----------------------------------------------------------------------------------------------------------- requests


class Image(Shape):
    b64: str
    """The image file's bytes (PNG, JPEG, ...) in base64."""


class PredictRequest(Shape):
    instances: Annotated[
        list[Any],
        Field(min_length=1),
        WithJsonSchema({"type": "array", "minItems": 1, "items": {"anyOf": [
            {"type": "string", "description": "a text"},
            {"type": "object", "required": ["b64"], "properties": {"b64": {"type": "string"}},
             "description": "an image file's bytes in base64"}]}}),
    ]  # fmt: skip
    """Texts for a text model, ``{"b64": ...}`` for an image model."""


class FeedbackRequest(Shape):
    request_id: Annotated[str, Field(pattern=REQUEST_ID_PATTERN)]
    """The ``request_id`` of the answer that this is about."""
    label: str
    """What the right answer would have been; one of the model's labels."""
    index: int = Field(default=0, ge=0)
    """Which of the request's instances."""


class InferInput(Shape):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any]
    parameters: dict[str, Any] = {}


class InferOutput(Shape):
    name: str
    parameters: dict[str, Any] = {}


class InferRequest(Shape):
    inputs: Annotated[list[InferInput], Field(min_length=1)]
    """One BYTES tensor: texts, or image files in base64."""
    id: str | None = None
    outputs: list[InferOutput] = []
    """Which outputs to send; all when empty."""
    parameters: dict[str, Any] = {}


def read_predict(body: bytes, model: ModelInfo) -> list[Input]:
    """Inputs of a ``/v1`` predict request. Raises ApiError 400 (not JSON) or 422 (not what this model takes)."""
    request = _checked(PredictRequest, body)
    return _inputs(request.instances, "instances", model)


def read_infer(body: bytes, model: ModelInfo) -> tuple[list[Input], InferRequest]:
    """Inputs of a ``/v2`` infer request, and the request itself. Raises ApiError 400 or 422."""
    request = _checked(InferRequest, body)
    if len(request.inputs) != 1:
        _refuse("inputs", f"must hold the one tensor {model.input_kind!r}, but holds {len(request.inputs)}")
    tensor = request.inputs[0]
    for field, value, expected in (("name", tensor.name, model.input_kind), ("datatype", tensor.datatype, "BYTES")):
        if value != expected:
            _refuse(f"inputs[0].{field}", f"must be {expected!r}, but is {_shown(value)}")
    for output in request.outputs:
        if output.name not in (_LABEL, _PROBABILITIES):
            _refuse("outputs", f"names {_shown(output.name)}, but there are only 'label' and 'probabilities'")
    data = list(_flat(tensor.data))
    if math.prod(tensor.shape) != len(data) or min(tensor.shape, default=0) < 1:
        _refuse("inputs[0].shape", f"is {_shown(tensor.shape)}, but data holds {len(data)} values")
    values = [{"b64": value} for value in data] if model.input_kind == "image" else data
    return _inputs(values, "inputs[0].data", model), request


def read_feedback(body: bytes, model: ModelInfo) -> FeedbackRequest:
    """A feedback request. Raises ApiError 400 or 422."""
    request = _checked(FeedbackRequest, body)
    if request.label not in model.labels:
        _refuse("label", f"must be one of {', '.join(model.labels[:20])}, but is {_shown(request.label)}")
    return request


# ------------------------------------------------------------------------------------------------------------ answers


class Answers(Shape):
    """What one replica answers to one request."""

    version: str
    outputs: list[dict[str, Any]]
    """Per input ``{"label": ..., "scores": {label: probability}}``; empty if the input could not be read."""
    unreadable: dict[int, str] = {}
    """Index of an input -> why it cannot be read."""
    batch_size: int = 0
    """How many inputs were computed together."""


class PredictAnswer(Shape):
    predictions: list[dict[str, Any]]
    model_name: str
    model_version: str
    request_id: str


class ErrorDetail(Shape):
    code: str
    message: str
    next_step: str


class ErrorAnswer(Shape):
    error: ErrorDetail


def predict_answer(answers: Answers, model: ModelInfo, request_id: str) -> dict[str, Any]:
    """The body of a ``/v1`` answer. Raises ApiError 422 if an input could not be read."""
    _refuse_unreadable(answers, "instances")
    return {
        "predictions": answers.outputs,
        "model_name": model.model_name,
        "model_version": answers.version,
        "request_id": request_id,
    }


def infer_answer(answers: Answers, model: ModelInfo, request: InferRequest, request_id: str) -> dict[str, Any]:
    """The body of a ``/v2`` answer; probabilities flat, row by row. Raises ApiError 422 if an input is unreadable."""
    _refuse_unreadable(answers, "inputs[0].data")
    rows = len(answers.outputs)
    columns = list(answers.outputs[0]["scores"])
    flat = [output["scores"][label] for output in answers.outputs for label in columns]
    tensors = [
        {"name": _LABEL, "datatype": "BYTES", "shape": [rows], "data": [output["label"] for output in answers.outputs]},
        {"name": _PROBABILITIES, "datatype": "FP32", "shape": [rows, len(columns)], "data": flat},
    ]
    wanted = {output.name for output in request.outputs} or {_LABEL, _PROBABILITIES}
    return {
        "model_name": model.model_name,
        "model_version": answers.version,
        "id": request.id or request_id,
        "parameters": {"labels": columns},
        "outputs": [tensor for tensor in tensors if tensor["name"] in wanted],
    }


def dump_json(value: Any) -> bytes:
    """JSON as UTF-8. Text that is not Unicode (half a surrogate pair, echoed in an error) leaves as an escape."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


# ------------------------------------------------------------------------------------------------------------ reading


def parse_json(body: bytes) -> Any:
    """Strict JSON: UTF-8, no key twice, no NaN, no numbers beyond a float, no nesting beyond the parser's stack.

    Raises ApiError 400.
    """
    try:
        return json.loads(
            body.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
    except RecursionError:
        reason = "it is nested too deeply"
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except ValueError as error:
        reason = str(error).split(";")[0]
    raise ApiError(400, "invalid_json", f"the body is not valid JSON: {reason}", 'send {"instances": [...]} as UTF-8')


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {_shown(next(key for key in keys if keys.count(key) > 1))} is given twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


_Request = TypeVar("_Request", bound=Shape)


def _checked(shape: type[_Request], body: bytes) -> _Request:
    value = parse_json(body)
    if not isinstance(value, Mapping):
        _refuse("the body", f"must be a JSON object, but is {_kind(value)}")
    try:
        return shape.model_validate(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        _refuse(_dotted(first["loc"]), _problem(first, shape))


def _problem(error: Mapping[str, Any], shape: type[Shape]) -> str:
    if error["type"] == "missing":
        return "is required"
    if error["type"] == "extra_forbidden":
        return f"is not a field; known here are {', '.join(shape.model_fields)}"
    message: str = error["msg"]
    return f"is not valid: {message[0].lower()}{message[1:]}, but got {_shown(error['input'])}"


def _dotted(location: Sequence[str | int]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in location)
    return "".join(parts).lstrip(".")


def _inputs(values: Sequence[Any], field: str, model: ModelInfo) -> list[Input]:
    limit = model.limits.max_instances
    if len(values) > limit:
        _refuse(
            field, f"holds {len(values)} inputs, more than the {limit} this model takes at once", "send fewer at a time"
        )
    read = _image if model.input_kind == "image" else _text
    return [read(value, f"{field}[{index}]", model) for index, value in enumerate(values)]


def _text(value: Any, field: str, model: ModelInfo) -> str:
    if not isinstance(value, str):
        _refuse(field, f"must be a text, since {model.model_name} classifies texts, but is {_kind(value)}")
    if len(value) > _MAX_TEXT_CHARACTERS:
        _refuse(field, f"has {len(value)} characters, more than {_MAX_TEXT_CHARACTERS}", "shorten it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        _refuse(field, f"holds half a surrogate pair at character {error.start}, which is no text")
    return value


def _image(value: Any, field: str, model: ModelInfo) -> bytes:
    content = value.get("b64") if isinstance(value, Mapping) and set(value) == {"b64"} else None
    if not isinstance(content, str):
        wanted = 'must be {"b64": "..."}' if field.startswith("instances") else "must be an image file in base64"
        _refuse(field, f"{wanted}, since {model.model_name} classifies images, but is {_kind(value)}")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        _refuse(field, "is not base64", "encode the image file's bytes in standard base64, without line breaks")


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    """Tensors may come flat or nested; iterative, since the client decides how deeply."""
    stack = [iter(values)]
    while stack:
        for value in stack[-1]:
            if isinstance(value, list):
                stack.append(iter(value))
                break
            yield value
        else:
            stack.pop()


def _refuse_unreadable(answers: Answers, field: str) -> None:
    if answers.unreadable:
        named = [f"{field}[{index}] {reason}" for index, reason in sorted(answers.unreadable.items())]
        more = f" (and {len(named) - 5} more)" if len(named) > 5 else ""
        raise ApiError(422, "unreadable_input", "; ".join(named[:5]) + more, "leave these inputs out, or repair them")


def _refuse(field: str, problem: str, next_step: str = "see /docs for the shape of a request") -> NoReturn:
    raise ApiError(422, "invalid_request", f"{field} {problem}", next_step)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(value: Any) -> str:
    """At most 60 characters of a client's value, to be put in a message."""
    shown = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else _kind(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
