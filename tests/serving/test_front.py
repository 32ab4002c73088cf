"""What the proxy must not be told by clients."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message, Receive, Scope, Send

from orchestrator.serving.front import StripServeHeaders, proxy_middlewares


def passed(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    seen: list[tuple[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(scope["headers"])

    async def nothing() -> Message:
        return {"type": "http.disconnect"}

    async def ignore(message: Message) -> None:
        pass

    asyncio.run(StripServeHeaders(app)({"type": "http", "headers": headers}, nothing, ignore))
    return seen


@pytest.mark.parametrize(
    "name",
    [b"x-request-timeout-seconds", b"X-Request-Timeout-Seconds", b"x-request-disconnect-disabled", b"x-session-id",
     b"serve_multiplexed_model_id", b"serve-multiplexed-model-id", b"x-serve-router-target", b"n\xc3\xa4me"],
)  # fmt: skip
def test_headers_that_the_proxy_obeys_are_taken_away(name: bytes) -> None:
    assert passed([(name, b"0"), (b"host", b"here")]) == [(b"host", b"here")]


def test_other_headers_pass() -> None:
    headers = [(b"content-type", b"application/json"), (b"x-request-id", b"a-1"), (b"authorization", b"Bearer x"),
               (b"accept-language", b"\xff")]  # fmt: skip
    assert passed(headers) == headers


@pytest.mark.parametrize("value", [b"\xff", b"with space", b"x" * 129, b""])
def test_a_request_id_that_is_no_plain_token_is_taken_away(value: bytes) -> None:
    assert passed([(b"x-request-id", value)]) == []


def test_serve_is_given_a_middleware() -> None:
    assert proxy_middlewares()[0].cls is StripServeHeaders
