"""The client: the endpoint's answers as values, its errors as one exception, and what fails for a moment asked again."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator import client as module
from orchestrator.client import AsyncClient, Client, EndpointError, Model, Part, Prediction

FINE = httpx.Response(200, json={
    "predictions": [{"label": "good", "scores": {"bad": 0.25, "good": 0.75}}], "model_name": "reviews",
    "model_version": "3", "request_id": "r-1",
})  # fmt: skip
BUSY = httpx.Response(503, headers={"retry-after": "2"}, json={
    "error": {"code": "overloaded", "message": "busy", "next_step": "try again later"},
})  # fmt: skip


class Endpoint:
    """Answers what it is told to, one after the other, and keeps what it was asked."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers, self.asked = list(answers), list[httpx.Request]()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []

    async def asleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(module.time, "sleep", slept.append)
    monkeypatch.setattr(module.asyncio, "sleep", asleep)
    return slept


Call = Callable[[Endpoint, str, Sequence[Any]], Any]


def at_once(endpoint: Endpoint, method: str, arguments: Sequence[Any] = (), **options: Any) -> Any:
    with Client("http://endpoint/", transport=httpx.MockTransport(endpoint), **options) as client:
        return getattr(client, method)(*arguments)


def with_asyncio(endpoint: Endpoint, method: str, arguments: Sequence[Any] = (), **options: Any) -> Any:
    async def call() -> Any:
        async with AsyncClient("http://endpoint", transport=httpx.MockTransport(endpoint), **options) as client:
            return await getattr(client, method)(*arguments)

    return asyncio.run(call())


both = pytest.mark.parametrize("call", [at_once, with_asyncio])


@both
@pytest.mark.parametrize(
    ("parts", "heatmap"),
    [([{"text": "good", "start": 2, "end": 6, "weight": 0.5}], None), (None, [[0.1, 0.2], [0.3, 0.4]])],
)
def test_explanations_come_back_as_values(call: Any, parts: Any, heatmap: Any) -> None:
    told = {"label": "good", "score": 0.8, "baseline_score": 0.3, "method": "occlusion", "parts": parts, "heatmap": heatmap,
            "model_name": "reviews", "model_version": "3", "request_id": "r-1"}  # fmt: skip
    endpoint = Endpoint(httpx.Response(200, json=told))
    found = call(endpoint, "explain", ("reviews", "a good text", "good"))
    assert (found.label, found.score, found.method) == ("good", 0.8, "occlusion")
    assert found.parts == ((Part("good", 2, 6, 0.5),) if parts else None)
    assert found.heatmap == (((0.1, 0.2), (0.3, 0.4)) if heatmap else None)
    (asked,) = endpoint.asked
    assert asked.url.path == "/v1/models/reviews:explain"
    assert json.loads(asked.content) == {"instance": "a good text", "label": "good", "method": "auto"}


@both
def test_predictions_come_back_as_values(call: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"pixels")
    endpoint = Endpoint(FINE)
    answer = call(endpoint, "predict", ("reviews", ["a text", b"bytes", tmp_path / "a.png"]), key="orc_1_2")
    assert answer.predictions == (Prediction("good", {"bad": 0.25, "good": 0.75}),)
    assert (answer.model_version, answer.request_id) == ("3", "r-1")
    (asked,) = endpoint.asked
    assert (
        asked.url == "http://endpoint/v1/models/reviews:predict" and asked.headers["authorization"] == "Bearer orc_1_2"
    )
    images = [{"b64": base64.b64encode(content).decode()} for content in (b"bytes", b"pixels")]
    assert json.loads(asked.content) == {"instances": ["a text", *images]}


@both
def test_models(call: Any) -> None:
    limits = {"max_instances": 8, "max_body_bytes": 9, "request_timeout_s": 1.0}
    told = {"model_name": "reviews", "model_version": "3", "task": "text_classification", "input_kind": "text",
            "labels": ["bad", "good"], "limits": limits}  # fmt: skip
    expected = Model("reviews", "3", "text", ("bad", "good"), 8)
    assert call(Endpoint(httpx.Response(200, json={"models": [told]})), "models") == [expected]
    assert call(Endpoint(httpx.Response(200, json=told)), "model", ("reviews",)) == expected


@both
def test_a_busy_endpoint_is_asked_again_when_it_said(call: Any, pauses: list[float]) -> None:
    endpoint = Endpoint(BUSY, httpx.ReadError("gone"), FINE)
    assert call(endpoint, "predict", ("reviews", ["a"])).model_version == "3"
    assert len(endpoint.asked) == 3
    assert 2.0 < pauses[0] < 2.5 and 0.1 < pauses[1] < 0.5, "what it asked for, and a little that differs by client"


@both
def test_it_gives_up_with_the_endpoints_own_words(call: Any, pauses: list[float]) -> None:
    endpoint = Endpoint(*[BUSY] * 3)
    with pytest.raises(EndpointError, match="busy: try again later") as caught:
        call(endpoint, "predict", ("reviews", ["a"]), retries=2)
    assert (caught.value.status, caught.value.code, len(endpoint.asked)) == (503, "overloaded", 3)
    with pytest.raises(EndpointError, match="nothing answered .*refused") as unreachable:
        call(Endpoint(*[httpx.ConnectError("refused")] * 2), "predict", ("reviews", ["a"]), retries=1)
    assert unreachable.value.status == 0


@both
def test_what_will_not_change_is_not_asked_again(call: Any, pauses: list[float]) -> None:
    missing = httpx.Response(404, json={"error": {"code": "model_not_found", "message": "no", "next_step": "other"}})
    tomorrow = httpx.Response(429, headers={"retry-after": "40000"}, json={
        "error": {"code": "quota_used_up", "message": "used up", "next_step": "tomorrow"}})  # fmt: skip
    for answer, code in ((missing, "model_not_found"), (tomorrow, "quota_used_up")):
        endpoint = Endpoint(answer)
        with pytest.raises(EndpointError) as caught:
            call(endpoint, "predict", ("reviews", ["a"]))
        assert caught.value.code == code and len(endpoint.asked) == 1
    assert pauses == []


@both
def test_feedback_that_may_have_arrived_is_not_sent_twice(call: Any, pauses: list[float]) -> None:
    lost = Endpoint(httpx.ReadTimeout("late"))
    with pytest.raises(EndpointError):
        call(lost, "feedback", ("reviews", "r-1", "bad"))
    assert len(lost.asked) == 1
    never_sent = Endpoint(httpx.ConnectError("refused"), BUSY, httpx.Response(200, json={"stored": True}))
    call(never_sent, "feedback", ("reviews", "r-1", "bad", 2))
    assert json.loads(never_sent.asked[-1].content) == {"request_id": "r-1", "label": "bad", "index": 2}


@both
@pytest.mark.parametrize(
    "answer",
    [httpx.Response(502), httpx.Response(504, content=b"<html>"), httpx.Response(503, json={
        "error": {"code": "timeout", "message": "the request was not answered within 30 s", "next_step": "later"}})],
)  # fmt: skip
def test_feedback_of_which_nobody_says_that_it_was_turned_away_is_not_sent_twice(
    call: Any, answer: httpx.Response, pauses: list[float]
) -> None:
    endpoint = Endpoint(answer, answer)
    with pytest.raises(EndpointError):
        call(endpoint, "feedback", ("reviews", "r-1", "bad"))
    assert (len(endpoint.asked), pauses) == (1, [])
    with pytest.raises(EndpointError):
        call(endpoint := Endpoint(answer, answer), "predict", ("reviews", ["a"]), retries=1)
    assert len(endpoint.asked) == 2, "what changes nothing is"


@both
def test_feedback_that_was_turned_away_is_sent_again(call: Any, pauses: list[float]) -> None:
    often = httpx.Response(429, json={"error": {"code": "too_often", "message": "wait", "next_step": "wait"}})
    endpoint = Endpoint(often, BUSY, httpx.Response(200, json={"stored": True}))
    call(endpoint, "feedback", ("reviews", "r-1", "bad"))
    assert len(endpoint.asked) == 3


@both
def test_a_client_may_have_a_name(call: Any) -> None:
    endpoint = Endpoint(FINE, FINE)
    call(endpoint, "predict", ("reviews", ["a"]), client_id="shop-7")
    call(endpoint, "predict", ("reviews", ["a"]))
    assert [request.headers.get("x-client-id") for request in endpoint.asked] == ["shop-7", None]


@both
@pytest.mark.parametrize("content", [b"<html>", b"", b"[]", b"{}"])
@pytest.mark.parametrize("status", [200, 502])
@pytest.mark.parametrize(
    ("method", "arguments"),
    [("models", ()), ("model", ("reviews",)), ("predict", ("reviews", ["a"])), ("explain", ("reviews", "a")),
     ("feedback", ("reviews", "r-1", "bad"))],
)  # fmt: skip
def test_something_else_that_listens_there_is_said(
    call: Any, method: str, arguments: Sequence[Any], status: int, content: bytes
) -> None:
    with pytest.raises(EndpointError, match=f"answered {status}, but not as an endpoint does") as caught:
        call(Endpoint(httpx.Response(status, content=content)), method, arguments, retries=0)
    assert (caught.value.status, caught.value.code) == (status, "no_contract")


@both
def test_one_text_that_is_no_list_is_a_mistake(call: Any) -> None:
    with pytest.raises(TypeError, match="put the one in a list"):
        call(Endpoint(), "predict", ("reviews", "a text"))
