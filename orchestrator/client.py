"""Asking an endpoint from Python, at once or with asyncio; what fails for a moment is asked again.

    with Client("http://127.0.0.1:8000") as client:
        answer = client.predict("reviews", ["great coffee", "stale tea"])
        print([p.label for p in answer.predictions], answer.model_version)

Needs httpx: ``pip install 'ray-orchestrator[client]'``. Imports nothing else of this package, and no torch.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import httpx

Input = str | bytes | Path
"""A text; the bytes of an image file; the path of one."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_FOR_A_MOMENT = (429, 502, 503, 504)
_CLIENT_ID = "x-client-id"


@dataclass(frozen=True)
class Prediction:
    label: str
    scores: Mapping[str, float]
    """Label -> probability."""


@dataclass(frozen=True)
class Answer:
    predictions: tuple[Prediction, ...]
    """In the inputs' order."""
    model_version: str
    request_id: str
    """For ``feedback``."""


@dataclass(frozen=True)
class Part:
    """A word of a text, and what it does for the score."""

    text: str
    start: int
    end: int
    """In characters of the text that was sent."""
    weight: float


@dataclass(frozen=True)
class Explanation:
    """Why ``label`` has its score: ``parts`` of a text, or of an image a ``heatmap`` of its patches, row by row."""

    label: str
    score: float
    baseline_score: float
    """With everything hidden."""
    method: str
    parts: tuple[Part, ...] | None
    heatmap: tuple[tuple[float, ...], ...] | None


@dataclass(frozen=True)
class Model:
    """What a model takes and answers."""

    name: str
    version: str
    input_kind: str
    """``text`` or ``image``."""
    labels: tuple[str, ...]
    max_instances: int


class EndpointError(Exception):
    """The endpoint answered that it will not; or, with status 0, nothing answered."""

    def __init__(self, status: int, code: str, message: str, next_step: str = "") -> None:
        super().__init__(f"{message}: {next_step}" if next_step else message)
        self.status, self.code, self.message, self.next_step = status, code, message, next_step


_Value = TypeVar("_Value")


@dataclass(frozen=True)
class _Call(Generic[_Value]):
    method: str
    path: str
    make: Callable[[Any], _Value]
    """A value from the answer's JSON."""
    body: Any = None
    repeats: bool = True
    """Whether it may be sent again when nobody knows if it arrived."""


_Steps = Generator[_Call[Any] | float, "httpx.Response | httpx.TransportError | None", httpx.Response]
"""Yields what to send, or how many seconds to wait; is sent what came of it."""


def _asked(call: _Call[Any], retries: int, longest_wait_s: float) -> _Steps:
    """One call, again and again while it fails for a moment. Knows no network."""
    for attempt in range(retries + 1):
        came = yield call
        if isinstance(came, httpx.Response) and came.status_code not in _FOR_A_MOMENT:
            return came
        pause_s = _pause_s(came, attempt)
        never_sent = isinstance(came, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        may_repeat = call.repeats or never_sent or _turned_away(came)
        if attempt == retries or not may_repeat or pause_s > longest_wait_s:
            break
        yield pause_s
    if isinstance(came, httpx.Response):
        return came
    raise EndpointError(0, "unreachable", f"nothing answered ({type(came).__name__}: {came})", "see whether it runs")


def _turned_away(came: httpx.Response | httpx.TransportError | None) -> bool:
    """Whether the endpoint itself says that it did nothing. Others on the way, and a time that is over, say no such thing."""
    return isinstance(came, httpx.Response) and (came.status_code == 429 or _told(came).get("code") == "overloaded")


def _pause_s(came: httpx.Response | httpx.TransportError | None, attempt: int) -> float:
    """What the endpoint asked for; else longer each time, by chance, so that many clients do not come back at once."""
    told = came.headers.get("retry-after", "") if isinstance(came, httpx.Response) else ""
    least = float(told) if told.isascii() and told.isdigit() else 0.0
    grown = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt)
    return least + grown * random.uniform(0.5, 1.0)


class _Face:
    """What both clients share: calls as values, and values from answers."""

    def __init__(
        self, url: str, key: str | None = None, *, timeout_s: float = 30.0, retries: int = 3, longest_wait_s: float = 60.0,
        client_id: str | None = None, verify: bool | str = True, transport: Any = None,
    ) -> None:  # fmt: skip
        """``key``: where the endpoint asks for one. ``retries``: of a request that fails for a moment. ``longest_wait_s``: an
        endpoint that asks for a longer pause than this is not asked again. ``client_id``: of a user or a machine;
        while two versions answer, requests of the same one stay with one of them. ``verify``: False, or a file of
        certificates to trust, for HTTPS. ``transport``: httpx's, where it is not the network."""
        self.retries, self.longest_wait_s = retries, longest_wait_s
        headers = {"authorization": f"Bearer {key}"} if key else {}
        headers |= {_CLIENT_ID: client_id} if client_id else {}
        self._options: dict[str, Any] = {
            "base_url": url.rstrip("/"), "headers": headers, "timeout": timeout_s, "verify": _context(verify),
            "transport": transport,
        }  # fmt: skip

    def _steps(self, call: _Call[Any]) -> _Steps:
        return _asked(call, self.retries, self.longest_wait_s)


def _context(verify: bool | str) -> Any:
    if isinstance(verify, bool):
        return verify
    import ssl

    return ssl.create_default_context(cafile=verify)


def _predicting(name: str, inputs: Sequence[Input]) -> _Call[Answer]:
    """Predicting changes nothing: it may be sent again at any time."""
    if isinstance(inputs, str | bytes | Path):
        raise TypeError("inputs is a list of texts or images: put the one in a list")
    instances = [_instance(value) for value in inputs]
    return _Call("POST", f"/v1/models/{name}:predict", _answer, {"instances": instances})


def _instance(value: Input) -> Any:
    if isinstance(value, str):
        return value
    content = value.read_bytes() if isinstance(value, Path) else value
    return {"b64": base64.b64encode(content).decode()}


def _feeding_back(name: str, request_id: str, label: str, index: int) -> _Call[None]:
    told = {"request_id": request_id, "label": label, "index": index}
    return _Call("POST", f"/v1/models/{name}:feedback", _stored, told, repeats=False)


def _explaining(name: str, value: Input, label: str | None, method: str) -> _Call[Explanation]:
    asked = {"instance": _instance(value), "label": label, "method": method}
    return _Call("POST", f"/v1/models/{name}:explain", _explanation, asked)


def _all_models() -> _Call[list[Model]]:
    return _Call("GET", "/v1/models", lambda value: [_model(model) for model in value["models"]])


def _one_model(name: str) -> _Call[Model]:
    return _Call("GET", f"/v1/models/{name}", _model)


def _explanation(value: Mapping[str, Any]) -> Explanation:
    parts, heatmap = value["parts"], value["heatmap"]
    return Explanation(
        value["label"], value["score"], value["baseline_score"], value["method"],
        None if parts is None else tuple(Part(**part) for part in parts),
        None if heatmap is None else tuple(map(tuple, heatmap)),
    )  # fmt: skip


def _read(response: httpx.Response, call: _Call[_Value]) -> _Value:
    """The value of the answer. Raises EndpointError for anything but 200, and for what is no answer of an endpoint."""
    told = _told(response)
    if response.status_code == 200:
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            return call.make(response.json())
    raise EndpointError(
        response.status_code, str(told.get("code", "no_contract")),
        str(told.get("message", f"{response.url} answered {response.status_code}, but not as an endpoint does")),
        str(told.get("next_step", "see whether it is the endpoint that listens there")),
    )  # fmt: skip


def _told(response: httpx.Response) -> Mapping[str, Any]:
    """The endpoint's own words about what failed; none if it was not the endpoint that answered."""
    try:
        error = response.json()["error"]
    except (KeyError, TypeError, ValueError):
        return {}
    return error if isinstance(error, dict) else {}


def _answer(value: Mapping[str, Any]) -> Answer:
    predictions = tuple(Prediction(p["label"], p["scores"]) for p in value["predictions"])
    return Answer(predictions, value["model_version"], value["request_id"])


def _stored(value: Mapping[str, Any]) -> None:
    """Raises KeyError if the answer does not say so."""
    value["stored"]


def _model(value: Mapping[str, Any]) -> Model:
    return Model(value["model_name"], value["model_version"], value["input_kind"], tuple(value["labels"]),
                 value["limits"]["max_instances"])  # fmt: skip


class Client(_Face):
    """Asks at once. May be shared by threads."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __init__(self, url: str, key: str | None = None, **options: Any) -> None:
        super().__init__(url, key, **options)
        self._http = httpx.Client(**self._options)

    def close(self) -> None:
        self._http.close()

    def predict(self, model: str, inputs: Sequence[Input]) -> Answer:
        """Raises EndpointError."""
        return self._ask(_predicting(model, inputs))

    def explain(self, model: str, value: Input, label: str | None = None, method: str = "auto") -> Explanation:
        """Of one input. ``label``: whose score; None: the one that is answered. Raises EndpointError."""
        return self._ask(_explaining(model, value, label, method))

    def feedback(self, model: str, request_id: str, label: str, index: int = 0) -> None:
        """Tell what the right answer would have been, of the ``index``-th input of that request. Raises EndpointError."""
        self._ask(_feeding_back(model, request_id, label, index))

    def models(self) -> list[Model]:
        """Raises EndpointError."""
        return self._ask(_all_models())

    def model(self, name: str) -> Model:
        """Raises EndpointError."""
        return self._ask(_one_model(name))

    def _ask(self, call: _Call[_Value]) -> _Value:
        steps = self._steps(call)
        came: httpx.Response | httpx.TransportError | None = None
        try:
            while True:
                step = steps.send(came)
                if isinstance(step, _Call):
                    came = self._send(step)
                else:
                    time.sleep(step)
        except StopIteration as over:
            return _read(over.value, call)

    def _send(self, call: _Call[Any]) -> httpx.Response | httpx.TransportError:
        try:
            return self._http.request(call.method, call.path, json=call.body)
        except httpx.TransportError as error:
            return error


class AsyncClient(_Face):
    """The same, with asyncio."""

    def __init__(self, url: str, key: str | None = None, **options: Any) -> None:
        super().__init__(url, key, **options)
        self._http = httpx.AsyncClient(**self._options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def predict(self, model: str, inputs: Sequence[Input]) -> Answer:
        """Raises EndpointError."""
        return await self._ask(_predicting(model, inputs))

    async def explain(self, model: str, value: Input, label: str | None = None, method: str = "auto") -> Explanation:
        """Of one input. ``label``: whose score; None: the one that is answered. Raises EndpointError."""
        return await self._ask(_explaining(model, value, label, method))

    async def feedback(self, model: str, request_id: str, label: str, index: int = 0) -> None:
        """Tell what the right answer would have been, of the ``index``-th input of that request. Raises EndpointError."""
        await self._ask(_feeding_back(model, request_id, label, index))

    async def models(self) -> list[Model]:
        """Raises EndpointError."""
        return await self._ask(_all_models())

    async def model(self, name: str) -> Model:
        """Raises EndpointError."""
        return await self._ask(_one_model(name))

    async def _ask(self, call: _Call[_Value]) -> _Value:
        steps = self._steps(call)
        came: httpx.Response | httpx.TransportError | None = None
        try:
            while True:
                step = steps.send(came)
                if isinstance(step, _Call):
                    came = await self._send(step)
                else:
                    await asyncio.sleep(step)
        except StopIteration as over:
            return _read(over.value, call)

    async def _send(self, call: _Call[Any]) -> httpx.Response | httpx.TransportError:
        try:
            return await self._http.request(call.method, call.path, json=call.body)
        except httpx.TransportError as error:
            return error
