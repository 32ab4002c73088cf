"""The listener on real sockets: clients that are silent, slow, endless, gone or too many, and a change of doors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx
import pytest
from certificates import write_certificate
from ports import free_port
from test_gateway import Fake

from orchestrator.errors import PortInUse, ServingFailed
from orchestrator.recipe_serving import Listen, Tls
from orchestrator.serving import door
from orchestrator.serving.contract import Answers, Caller, Input
from orchestrator.serving.door import Door
from orchestrator.serving.gateway import build_app
from orchestrator.storage import Storage

BODY = json.dumps({"instances": ["a"]}).encode()
HEAD = b"POST /v1/models/reviews:predict HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n"


class Slow(Fake):
    """Takes its time, and tells who was not waited for."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self.begun, self.dropped = 0, 0

    async def predict(self, name: str, version: str | None, inputs: Sequence[Input], caller: Caller) -> Answers:
        self.begun += 1
        try:
            await asyncio.sleep(0.25)
        except asyncio.CancelledError:
            self.dropped += 1
            raise
        return await super().predict(name, version, inputs, caller)


@pytest.fixture
def fake(tmp_path: Path) -> Slow:
    return Slow(Storage(str(tmp_path)))


@pytest.fixture
def listen() -> Listen:
    return Listen(port=free_port())


@contextlib.asynccontextmanager
async def opened(fake: Fake, listen: Listen) -> AsyncIterator[Door]:
    made = Door(build_app(fake), listen)
    await made.open()
    try:
        yield made
    finally:
        await made.close(1.0)


async def connect(listen: Listen) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(listen.host, listen.port)


async def status(reader: asyncio.StreamReader) -> int:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    return int(head.split(b" ", 2)[1])


def test_a_request_whose_client_is_gone_is_given_up(fake: Slow, listen: Listen) -> None:
    async def check() -> None:
        async with opened(fake, listen):
            _, writer = await connect(listen)
            writer.write(HEAD % len(BODY) + BODY)
            while not fake.begun:
                await asyncio.sleep(0.01)
            writer.close()
            await asyncio.sleep(0.3)
            assert (fake.begun, fake.dropped) == (1, 1)
            reader, writer = await connect(listen)
            writer.write(HEAD % len(BODY) + BODY)
            assert await status(reader) == 200, "others are answered"
            assert fake.dropped == 1

    asyncio.run(check())


@pytest.mark.parametrize("sent", [b"", b"POST /v1/mod", b"POST / HTTP/1.1\r\nhost: a\r\nx-a: 1\r\n"])
def test_who_sends_no_head_is_cut_off(fake: Slow, listen: Listen, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_HEAD_S", 0.15)

    async def check() -> None:
        async with opened(fake, listen):
            reader, writer = await connect(listen)
            writer.write(sent)
            assert await asyncio.wait_for(reader.read(), 5) == b""
            reader, writer = await connect(listen)
            writer.write(HEAD % len(BODY) + BODY)
            assert await status(reader) == 200, "an answer may take longer than a head"
            writer.write(sent or b"P")
            await asyncio.wait_for(reader.read(), 5)

    asyncio.run(check())


def test_one_byte_at_a_time_gains_no_time(fake: Slow, listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_HEAD_S", 0.5)

    async def check() -> None:
        async with opened(fake, listen):
            reader, writer = await connect(listen)
            ended = asyncio.create_task(reader.read())
            with contextlib.suppress(ConnectionError):
                for byte in b"GET / HTTP/1.1\r\nx-slow: " + b"a" * 100:
                    if ended.done():
                        break
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.05)
            assert ended.done()

    asyncio.run(check())


def test_an_endless_head_is_refused(fake: Slow, listen: Listen) -> None:
    async def check() -> None:
        async with opened(fake, listen):
            reader, writer = await connect(listen)
            writer.write(b"GET / HTTP/1.1\r\nx-long: " + b"a" * 200_000)
            assert await status(reader) == 431

    asyncio.run(check())


def test_more_connections_than_there_may_be_are_turned_away(
    fake: Slow, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_MAX_CONNECTIONS", 3)

    async def check() -> None:
        async with opened(fake, listen):
            inside = [await connect(listen) for _ in range(3)]
            reader, _ = await connect(listen)
            head = await asyncio.wait_for(reader.read(), 5)
            assert head.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in head
            inside[0][1].close()
            await asyncio.sleep(0.1)
            reader, writer = await connect(listen)
            writer.write(HEAD % len(BODY) + BODY)
            assert await status(reader) == 200, "there is room again"

    asyncio.run(check())


def test_another_door_takes_over_without_a_failed_request(fake: Slow, listen: Listen) -> None:
    async def ask(client: httpx.AsyncClient) -> int:
        return (await client.post("/v1/models/reviews:predict", content=BODY)).status_code

    async def check() -> None:
        async with (
            httpx.AsyncClient(base_url=f"http://{listen.host}:{listen.port}", timeout=10) as client,
            opened(fake, listen) as first,
        ):
            asked = [asyncio.create_task(ask(client)) for _ in range(5)]
            while fake.begun < 5:
                await asyncio.sleep(0.01)
            async with opened(fake, listen):
                closing = asyncio.create_task(first.close(5.0))
                await asyncio.sleep(0.2)
                asked += [asyncio.create_task(ask(client)) for _ in range(5)]
                assert await asyncio.gather(*asked) == [200] * 10
                await closing
                with pytest.raises(ServingFailed, match="no longer listens"):
                    first.check()

    asyncio.run(check())


def test_an_answer_waits_for_no_acknowledgement(fake: Slow, listen: Listen) -> None:
    """Two writes on a connection that is kept; with Nagle's algorithm on, the second waits 40 ms for the first."""

    async def check() -> None:
        async with opened(fake, listen), httpx.AsyncClient(base_url=f"http://{listen.host}:{listen.port}") as client:
            times = []
            for _ in range(20):
                times.append((await client.get("/v2/health/live")).elapsed.total_seconds())
            assert sorted(times)[10] < 0.02

    asyncio.run(check())


def test_an_address_that_cannot_be_had(fake: Slow, listen: Listen) -> None:
    async def check() -> None:
        with socket.socket() as other:
            other.bind((listen.host, listen.port))
            other.listen()
            with pytest.raises(PortInUse, match=f"port {listen.port}"):
                await Door(build_app(fake), listen).open()

    asyncio.run(check())


def test_https(fake: Slow, listen: Listen, tmp_path: Path) -> None:
    tls = write_certificate(tmp_path)

    async def check() -> None:
        async with opened(fake, listen.model_copy(update={"tls": tls})):
            import ssl

            context = ssl.create_default_context(cafile=tls.certificate)
            async with httpx.AsyncClient(verify=context) as client:
                assert (await client.get(f"https://127.0.0.1:{listen.port}/v2/health/live")).status_code == 200
        broken = Tls(certificate=tls.key, key=tls.key)
        with pytest.raises(ServingFailed, match="cannot speak HTTPS"):
            await Door(build_app(fake), listen.model_copy(update={"tls": broken})).open()

    asyncio.run(check())
