"""The listener on real sockets: clients that are silent, slow, endless, gone or too many, and a change of doors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from certificates import write_certificate
from ports import free_port
from test_gateway import Fake

from orchestrator.errors import PortInUse, ServingFailed
from orchestrator.recipe_serving import Listen, Tls
from orchestrator.serving import door
from orchestrator.serving.contract import Answers, Caller, Input, Limits
from orchestrator.serving.door import Door
from orchestrator.serving.gateway import build_app
from orchestrator.storage import Storage

BODY = json.dumps({"instances": ["a"]}).encode()
HEAD = b"POST /v1/models/reviews:predict HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n"
GET = b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\n\r\n"
LIMITS = Limits(max_instances=3, max_body_bytes=200_000, request_timeout_s=60)


class Slow(Fake):
    """Answers when it is let, and tells who was not waited for."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self.infos = {name: info.model_copy(update={"limits": LIMITS}) for name, info in self.infos.items()}
        self.begun, self.dropped, self.let = 0, 0, asyncio.Event()

    async def predict(self, name: str, version: str | None, inputs: Sequence[Input], caller: Caller) -> Answers:
        self.begun += 1
        try:
            await self.let.wait()
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
    """Of the next answer, whose body is taken as well."""
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
    await asyncio.wait_for(reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0])), 60)
    return int(head.split(b" ", 2)[1])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def ended(reader: asyncio.StreamReader) -> bytes:
    """What came until the door closed the connection."""
    try:
        return await asyncio.wait_for(reader.read(), 30)
    except ConnectionError:
        return b""


def test_a_request_whose_client_is_gone_is_given_up(fake: Slow, listen: Listen) -> None:
    async def check() -> None:
        async with opened(fake, listen):
            _, writer = await connect(listen)
            writer.write(HEAD % len(BODY) + BODY)
            await until(lambda: fake.begun == 1)
            writer.close()
            await until(lambda: fake.dropped == 1)
            reader, writer = await connect(listen)
            writer.write(HEAD % len(BODY) + BODY)
            fake.let.set()
            assert await status(reader) == 200, "others are answered"
            assert fake.dropped == 1

    asyncio.run(check())


@pytest.mark.parametrize("sent", [b"", b"POST /v1/mod", b"POST / HTTP/1.1\r\nhost: a\r\nx-a: 1\r\n"])
def test_who_sends_no_head_is_cut_off(fake: Slow, listen: Listen, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_HEAD_S", 0.5)

    async def check() -> None:
        async with opened(fake, listen):
            reader, writer = await connect(listen)
            writer.write(HEAD % len(BODY) + BODY)
            await until(lambda: fake.begun == 1)
            silent, other = await connect(listen)
            other.write(sent)
            assert await ended(silent) == b""
            fake.let.set()
            assert await status(reader) == 200, "an answer may take longer than a head"
            writer.write(sent or b"P")
            assert await ended(reader) == b""

    asyncio.run(check())


def test_one_byte_at_a_time_gains_no_time(fake: Slow, listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_HEAD_S", 0.5)

    async def check() -> None:
        async with opened(fake, listen):
            reader, writer = await connect(listen)
            over = asyncio.create_task(ended(reader))
            with contextlib.suppress(ConnectionError):
                for byte in b"GET / HTTP/1.1\r\nx-slow: " + b"a" * 1000:
                    if over.done():
                        break
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.05)
            assert over.done()

    asyncio.run(check())


@pytest.mark.parametrize(
    ("request_", "answer", "then"),
    [(GET, 200, b"\r\n"), (HEAD % 1_000_000, 413, b"a"), (GET, 200, b"\r\n" + GET[:9])],
    ids=["a line end", "a refused body", "half a head"],
)
def test_bytes_that_begin_no_request_gain_no_time(
    fake: Slow, listen: Listen, request_: bytes, answer: int, then: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_HEAD_S", 0.5)

    async def check() -> None:
        async with opened(fake, listen):
            reader, writer = await connect(listen)
            writer.write(request_)
            assert await status(reader) == answer
            writer.write(then)
            assert await ended(reader) == b""

    asyncio.run(check())


def test_many_requests_ahead_of_their_answers_are_refused(fake: Slow, listen: Listen) -> None:
    async def check() -> None:
        async with opened(fake, listen):
            reader, writer = await connect(listen)
            writer.write(HEAD % len(BODY) + BODY + GET * door._MAX_QUEUED)
            await until(lambda: fake.begun == 1)
            fake.let.set()
            assert [await status(reader) for _ in range(door._MAX_QUEUED + 1)] == [200] * (door._MAX_QUEUED + 1)
            fake.let.clear()
            writer.write(HEAD % len(BODY) + BODY + GET * (door._MAX_QUEUED + 1))
            assert (await ended(reader)).startswith(b"HTTP/1.1 400 ")

    asyncio.run(check())


def test_a_connection_with_requests_that_wait_is_not_read(fake: Slow, listen: Listen) -> None:
    """Of pings, the first is answered, and others wait: what follows stays in the kernel, and its sender has to wait."""
    waiting = []

    async def ping(scope: Any, receive: Any, send: Any) -> None:
        (protocol,) = made.server.server_state.connections
        waiting.append((len(protocol.pipeline), protocol.flow.read_paused))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def check() -> None:
        await made.open()
        reader, writer = await connect(listen)
        writer.write(GET * 3)
        assert [await status(reader) for _ in range(3)] == [200] * 3
        assert waiting == [(2, True), (1, True), (0, False)]
        await made.close(1.0)

    made = Door(ping, listen)
    asyncio.run(check())


def test_a_client_that_takes_no_answer_is_cut_off(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_UNREAD_S", 1)

    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"50000000")]})
        await send({"type": "http.response.body", "body": bytes(50_000_000)})

    async def check() -> None:
        await made.open()
        with socket.create_connection((listen.host, listen.port)) as client:
            client.sendall(GET)
            await until(lambda: len(made.server.server_state.connections) == 1)
            await until(lambda: not made.server.server_state.connections)
        await made.close(1.0)

    made = Door(large, listen)
    asyncio.run(check())


def test_a_head_is_measured_without_the_body_before_it(fake: Slow, listen: Listen) -> None:
    body = json.dumps({"instances": ["a" * 100_000]}).encode()

    async def check() -> None:
        async with opened(fake, listen):
            fake.let.set()
            reader, writer = await connect(listen)
            writer.write(HEAD % len(body) + body + GET[:-2])
            assert await status(reader) == 200
            writer.write(GET[-2:])
            assert await status(reader) == 200

    asyncio.run(check())


def test_an_endless_head_is_refused(fake: Slow, listen: Listen) -> None:
    async def check() -> None:
        async with opened(fake, listen):
            reader, writer = await connect(listen)
            writer.write(b"GET / HTTP/1.1\r\nx-long: ".ljust(door._HEAD_BYTES, b"a"))
            await asyncio.sleep(0.1)
            assert not reader.at_eof()
            writer.write(b"a")  # with more than this on the way, the answer would be lost with the connection
            assert (await ended(reader)).startswith(b"HTTP/1.1 431 ")

    asyncio.run(check())


def test_more_connections_than_there_may_be_are_turned_away(
    fake: Slow, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_MAX_CONNECTIONS", 3)

    async def check() -> None:
        async with opened(fake, listen) as made:
            inside = [await connect(listen) for _ in range(3)]
            reader, _ = await connect(listen)
            head = await ended(reader)
            assert head.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in head
            inside[0][1].close()
            await until(lambda: len(made.server.server_state.connections) == 2)
            fake.let.set()
            reader, writer = await connect(listen)
            writer.write(HEAD % len(BODY) + BODY)
            assert await status(reader) == 200, "there is room again"

    asyncio.run(check())


def test_another_door_takes_over_without_a_failed_request(fake: Slow, listen: Listen) -> None:
    async def ask(client: httpx.AsyncClient) -> int:
        return (await client.post("/v1/models/reviews:predict", content=BODY)).status_code

    async def check() -> None:
        async with (
            httpx.AsyncClient(base_url=f"http://{listen.host}:{listen.port}", timeout=60) as client,
            opened(fake, listen) as first,
        ):
            asked = [asyncio.create_task(ask(client)) for _ in range(5)]
            await until(lambda: fake.begun == 5)
            async with opened(fake, listen):
                closing = asyncio.create_task(first.close(60.0))
                await until(lambda: not any(server.is_serving() for server in first.server.servers))
                asked += [asyncio.create_task(ask(client)) for _ in range(5)]
                await until(lambda: fake.begun == 10)
                fake.let.set()
                assert await asyncio.gather(*asked) == [200] * 10
                await closing
                with pytest.raises(ServingFailed, match="no longer listens"):
                    first.check()

    asyncio.run(check())


def test_an_answer_waits_for_no_acknowledgement(fake: Slow, listen: Listen) -> None:
    """Two writes on a connection that is kept; with Nagle's algorithm on, the second waits 40 ms for the first."""

    async def check() -> None:
        async with opened(fake, listen) as made:
            await connect(listen)
            await until(lambda: len(made.server.server_state.connections) == 1)
            (protocol,) = made.server.server_state.connections
            accepted = protocol.transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    asyncio.run(check())


def test_an_address_that_cannot_be_had(fake: Slow, listen: Listen) -> None:
    async def check() -> None:
        with socket.socket() as other:
            other.bind((listen.host, listen.port))
            other.listen()
            with pytest.raises(PortInUse, match=f"port {listen.port}"):
                await Door(build_app(fake), listen).open()

    asyncio.run(check())


def test_who_agrees_on_no_encryption_is_cut_off(
    fake: Slow, listen: Listen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_HEAD_S", 0.5)
    listen = listen.model_copy(update={"tls": write_certificate(tmp_path)})

    async def check() -> None:
        async with opened(fake, listen):
            reader, _ = await connect(listen)
            assert await ended(reader) == b""

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
