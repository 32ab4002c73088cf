"""What clients send and get: TensorFlow-Serving-like ``/v1`` and the Open Inference Protocol ``/v2``.

In: a request's body as bytes, and what the model says of itself. Out: checked inputs (texts, or the bytes of images),
or an ``ApiError`` that names the field. Knows no HTTP server, no network and no Ray.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

REQUEST_ID_PATTERN = r"^[A-Za-z0-9._:-]{1,128}$"
_MAX_TEXT_CHARACTERS = 1_000_000
_SMALL_BYTES = 65_536
"""A body of this size is parsed in milliseconds, whatever it holds."""
_MAX_DIGITS = 1000
LABEL, PROBABILITIES = "label", "probabilities"

Input = str | bytes
"""A text, or the bytes of an image file."""
Role = Literal["stable", "candidate", "shadow"]
"""Of a version that answered: the one that usually does, one that is rolled out beside it, or either of them for comparison
only."""


class ApiError(Exception):
    """An answer other than 200: ``{"error": {"code", "message", "next_step"}}``, and under ``/v2``, where the Open Inference
    Protocol has it a text, ``{"error": "message: next_step", "code"}``."""

    def __init__(
        self, status: int, code: str, message: str, next_step: str = "", *, retry_after_s: int | None = None
    ) -> None:
        super().__init__(status, code, message, next_step)
        self.status, self.code, self.message, self.next_step = status, code, message, next_step
        self.retry_after_s = retry_after_s

    def body(self, path: str = "") -> dict[str, Any]:
        """``path``: that was asked."""
        if path == "/v2" or path.startswith("/v2/"):
            return {"error": f"{self.message}: {self.next_step}" if self.next_step else self.message, "code": self.code}
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
    max_pixels: int | None = None
    """Of an image; None where there are none."""


class ModelInfo(Shape):
    """What a model on the endpoint says of itself."""

    model_name: str
    model_version: str
    task: str
    input_kind: Literal["text", "image"]
    labels: tuple[str, ...]
    limits: Limits
    precision: Literal["fp32", "bf16"] = "fp32"
    """What a model that was not compressed is multiplied in; one that was has its own."""

    def metadata(self, versions: Sequence[str]) -> dict[str, Any]:
        """The Open Inference Protocol's model metadata. ``versions``: all that can be asked by their number."""
        return {
            "name": self.model_name,
            "versions": list(versions),
            "platform": "pytorch",
            "inputs": [{"name": self.input_kind, "datatype": "BYTES", "shape": [-1]}],
            "outputs": [
                {"name": LABEL, "datatype": "BYTES", "shape": [-1]},
                {"name": PROBABILITIES, "datatype": "FP32", "shape": [-1, len(self.labels)]},
            ],
            "parameters": {"labels": list(self.labels), "task": self.task},
        }


# ----------------------------------------------------------------------------------------------------------- requests


EXPLAIN_PARTS = 64
"""Words, or patches, that an explanation tells apart at most; each costs a prediction."""
_INSTANCE = {"anyOf": [
    {"type": "string", "description": "a text"},
    {"type": "object", "required": ["b64"], "properties": {"b64": {"type": "string"}},
     "description": "an image file's bytes in base64"},
]}  # fmt: skip


class Image(Shape):
    b64: str
    """The image file's bytes (PNG, JPEG, ...) in base64."""


class PredictRequest(Shape):
    instances: Annotated[
        list[Any],
        Field(min_length=1),
        WithJsonSchema({"type": "array", "minItems": 1, "items": _INSTANCE}),
    ]  # fmt: skip
    """Texts for a text model, ``{"b64": ...}`` for an image model."""


class FeedbackRequest(Shape):
    request_id: Annotated[str, Field(pattern=REQUEST_ID_PATTERN)]
    """The ``request_id`` of the answer that this is about."""
    label: str
    """What the right answer would have been; one of the model's labels."""
    index: int = Field(default=0, ge=0)
    """Which of the request's instances."""


class ExplainRequest(Shape):
    instance: Annotated[Any, WithJsonSchema(_INSTANCE)]
    label: str | None = None
    """Whose score is explained; None: the one that is answered."""
    method: Literal["auto", "occlusion", "integrated_gradients"] = "auto"
    """``integrated_gradients`` takes a torch network; ``auto``: that where there is one, else occlusion."""


def read_predict(body: bytes, model: ModelInfo) -> list[Input]:
    """Inputs of a ``/v1`` predict request. Raises ApiError 400 (not JSON) or 422 (not what this model takes)."""
    request = checked(PredictRequest, body, model)
    return read_inputs(request.instances, "instances", model)


def read_feedback(body: bytes, model: ModelInfo) -> FeedbackRequest:
    """A feedback request. Raises ApiError 400 or 422."""
    request = checked(FeedbackRequest, body, model)
    if request.label not in model.labels:
        refuse("label", f"must be one of {', '.join(model.labels[:20])}, but is {shown(request.label)}")
    return request


def read_explain(body: bytes, model: ModelInfo) -> tuple[Input, ExplainRequest]:
    """One input, and what is asked of it. Raises ApiError 400 or 422."""
    request = checked(ExplainRequest, body, model)
    if request.label not in (None, *model.labels):
        refuse("label", f"must be one of {', '.join(model.labels[:20])}, but is {shown(request.label)}")
    (value,) = read_inputs([request.instance], "instance", model)
    return value, request


# ------------------------------------------------------------------------------------------------------------ answers


class Caller(NamedTuple):
    """Who asks."""

    identity: str | bytes
    """The same for all requests of one client, or of one content: it stays with one version."""
    request_id: str
    chance: float = 0.0
    """Uniform in [0, 1), drawn by the gateway: whether the request belongs to a sample is not the client's choice."""
    due_s: float = math.inf
    """When the request's time is up, by the event loop's clock."""


class Answers(Shape):
    """What one replica answers to one request."""

    version: str
    outputs: list[dict[str, Any]]
    """Per input ``{"label": ..., "scores": {label: probability}}``; empty if the input could not be read."""
    unreadable: dict[int, str] = {}
    """Index of an input -> why it cannot be read."""
    batch_size: int = 0
    """How many inputs were computed together; 0: nothing had to be computed."""
    queue_ms: float = 0.0
    """Between its arrival at the replica and the start of its batch."""
    tokens: int = 0
    """That were read of all texts."""
    arm: Role = "stable"
    cached: int = 0
    """How many of the outputs had been computed before."""


class Explained(Shape):
    """What one replica says of one input."""

    version: str
    explanation: dict[str, Any] = {}
    """Fields of ``explain.Explanation``."""
    refused: tuple[str, str] | None = None
    """Why there is none, and what can be done."""
    busy: bool = False
    """There is none because another input is being explained."""


def predict_answer(answers: Answers, model: ModelInfo, request_id: str) -> dict[str, Any]:
    """The body of a ``/v1`` answer. Raises ApiError 422 if an input could not be read."""
    refuse_unreadable(answers, "instances")
    return {
        "predictions": answers.outputs,
        "model_name": model.model_name,
        "model_version": answers.version,
        "request_id": request_id,
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
            body.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_whole,
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
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(twice)} is given twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:  # would take the square of its length
        raise ValueError(f"the number {digits[:20]} is too large")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


_Request = TypeVar("_Request", bound=Shape)


def checked(shape: type[_Request], body: bytes, model: ModelInfo) -> _Request:
    _check_values(body, model)
    value = parse_json(body)
    if not isinstance(value, Mapping):
        refuse("the body", f"must be a JSON object, but is {_kind(value)}")
    try:
        return shape.model_validate(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        refuse(_dotted(first["loc"]), _problem(first, shape))


def _check_values(body: bytes, model: ModelInfo) -> None:
    """Refuses a large body of more values than any request to this model has, before objects are made of them: millions of
    them would hold up everybody's requests for a second, in whatever thread."""
    if len(body) <= _SMALL_BYTES:
        return
    most = 4 * model.limits.max_instances + 4096  # an image is two: its object and its text
    pieces = (
        body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"', most)
    )  # within texts, and between them, by turns
    between = b"".join(pieces[::2])
    if len(pieces) > most or sum(map(between.count, (b",", b"[", b"{"))) > most:
        refuse("the body", f"holds more values than any request to {model.model_name} does: it takes at most"
               f" {model.limits.max_instances} instances at once", "send fewer at a time")  # fmt: skip


def _problem(error: Mapping[str, Any], shape: type[Shape]) -> str:
    if error["type"] == "missing":
        return "is required"
    if error["type"] == "extra_forbidden":
        return f"is not a field; known here are {', '.join(shape.model_fields)}"
    message: str = error["msg"]
    return f"is not valid: {message[0].lower()}{message[1:]}, but got {shown(error['input'])}"


def _dotted(location: Sequence[str | int]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part[:80]}" for part in location)
    return "".join(parts).lstrip(".")


def read_inputs(values: Sequence[Any], field: str, model: ModelInfo) -> list[Input]:
    check_count(len(values), field, model)
    read = _image if model.input_kind == "image" else read_text
    return [read(value, f"{field}[{index}]", model) for index, value in enumerate(values)]


def check_count(count: int, field: str, model: ModelInfo) -> None:
    if count > model.limits.max_instances:
        refuse(field, f"holds {shown(count)} inputs, more than the {model.limits.max_instances} this model takes at once",
                "send fewer at a time")  # fmt: skip


def read_text(value: Any, field: str, model: ModelInfo) -> str:
    if not isinstance(value, str):
        refuse(field, f"must be a text, since {model.model_name} classifies texts, but is {_kind(value)}")
    if len(value) > _MAX_TEXT_CHARACTERS:
        refuse(field, f"has {len(value)} characters, more than {_MAX_TEXT_CHARACTERS}", "shorten it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        refuse(field, f"holds half a surrogate pair at character {error.start}, which is no text")
    return value


def _image(value: Any, field: str, model: ModelInfo) -> bytes:
    content = value.get("b64") if isinstance(value, Mapping) and set(value) == {"b64"} else None
    if not isinstance(content, str):
        wanted = 'must be {"b64": "..."}' if field.startswith("instances") else "must be an image file in base64"
        refuse(field, f"{wanted}, since {model.model_name} classifies images, but is {_kind(value)}")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        refuse(field, "is not base64", "encode the image file's bytes in standard base64, without line breaks")


def refuse_unreadable(answers: Answers, field: str) -> None:
    if answers.unreadable:
        named = [f"{field}[{index}] {reason}" for index, reason in sorted(answers.unreadable.items())]
        more = f" (and {len(named) - 5} more)" if len(named) > 5 else ""
        raise ApiError(422, "unreadable_input", "; ".join(named[:5]) + more, "leave these inputs out, or repair them")


def refuse(field: str, problem: str, next_step: str = "see /docs for the shape of a request") -> NoReturn:
    raise ApiError(422, "invalid_request", f"{field} {problem}", next_step)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def shown(value: Any) -> str:
    """At most 60 characters of a client's value, to be put in a message."""
    shown = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else _kind(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
