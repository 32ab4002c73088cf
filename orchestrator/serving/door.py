"""The endpoint's own listener: uvicorn, and limits for clients that are silent, slow or too many.

In: an ASGI app and where to listen. Out: a door that opens, and closes once open requests are answered. Knows neither Ray nor
models. Ray Serve's own proxy would be one more process on a request's way, and obeys headers that any client can send.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
from asyncio.events import TimerHandle
from collections.abc import Iterator
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from orchestrator.errors import PortInUse, ServingFailed
from orchestrator.recipe_serving import Listen

_HEAD_S = 20.0
"""Within which TLS has to be agreed on, and a request's head has to be there, also the first of a new connection."""
_HEAD_BYTES = 65_536
_PIECE_BYTES = 16_384
"""Are parsed at once: nothing is looked at in between."""
_MAX_QUEUED = 16
"""Requests that one connection may send ahead of the answers."""
_UNREAD_S = 30
"""Of an answer that its client takes no further byte of."""
_KEEP_ALIVE_S = 75
"""Longer than load balancers keep a connection that nobody uses (60 s), so that they close it and not we."""
_MAX_CONNECTIONS = 8192
_BACKLOG = 2048
_SILENT_S, _PROBE_S, _PROBES = 60, 15, 4
"""TCP keep-alive: a client that is gone without a word is noticed after two minutes."""


class Door:
    """One listener. All methods belong to one event loop."""

    def __init__(self, app: Any, listen: Listen) -> None:
        self.listen = listen
        self.server = _Server(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # nobody is believed about whom a request comes from
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_S,
                ssl_certfile=listen.tls.certificate if listen.tls else None,
                ssl_keyfile=listen.tls.key if listen.tls else None,
                ssl_context_factory=_tls_context if listen.tls else None,
            )
        )
        self.serving: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Returns once it listens. A door on the same address may still be open: the new one gets the new connections.

        Raises:
            PortInUse: somebody else listens there.
            ServingFailed: the certificate's files cannot be used.
        """
        try:
            self.server.config.load()
        except (OSError, ValueError) as error:
            raise ServingFailed(f"cannot speak HTTPS ({error})", "see serving.tls") from None
        listener = _listener(self.listen.host, self.listen.port)
        self.serving = asyncio.create_task(self.server.serve(sockets=[listener]))
        while not self.server.started:
            await asyncio.sleep(0.01)
            self.check()

    def check(self) -> None:
        """Raises ServingFailed if it no longer listens."""
        if self.serving is None or self.serving.done():
            raise ServingFailed("the endpoint no longer listens", "see Serve's logs")

    async def close(self, patience_s: float) -> None:
        """Take no new connections, answer what has come, and cut off what is left after ``patience_s``."""
        if self.serving is None:
            return
        self.server.config.timeout_graceful_shutdown = int(patience_s)
        self.server.should_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await self.serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the business of the process that this one is a part of."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's own has no limit for who agrees on no encryption: asyncio's is a minute."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise ServingFailed("the endpoint does not start", "see Serve's logs")
        loop, tls = asyncio.get_running_loop(), self.config.ssl

        def protocol() -> _Protocol:
            return _Protocol(self.config, self.server_state, self.lifespan.state, loop)

        self.servers = [
            await loop.create_server(protocol, sock=listener, backlog=self.config.backlog, ssl=tls,
                                     ssl_handshake_timeout=_HEAD_S if tls else None)
            for listener in sockets or ()
        ]  # fmt: skip
        self.started = True


class _Protocol(HttpToolsProtocol):
    """One connection. What uvicorn leaves open: who sends no head, or an endless one, or dozens before the first is answered,
    is cut off; so is who is too many."""

    full: ClassVar[bytes] = (
        b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    )
    too_long: ClassVar[bytes] = (
        b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    )
    head_due: TimerHandle | None = None
    head_bytes: int | None = None
    """Of a head that has begun, and is not there."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _connections():
            self._end(self.full)
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), _PIECE_BYTES):
            if self.transport.is_closing():
                return
            self._piece_received(data[start : start + _PIECE_BYTES])
        if self.cycle is None or self.cycle.response_complete:
            self._expect_head()  # any byte ends uvicorn's own limit, also those that begin no request

    def _piece_received(self, piece: bytes) -> None:
        super().data_received(piece)
        if self.head_bytes is not None:
            self.head_bytes += len(piece)
            if self.head_bytes > _HEAD_BYTES:
                self._end(self.too_long)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.head_bytes = 0
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._head_is_there()
        if len(self.pipeline) >= _MAX_QUEUED:
            raise ValueError("too many requests at once")  # stops the parser; uvicorn answers 400 and closes
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline:
            self.flow.pause_reading()  # which uvicorn resumes, however many wait

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_there()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        """No later than it already has to be there."""
        if self.head_due is None and not self.transport.is_closing():
            self.head_due = self.loop.call_later(_HEAD_S, self.transport.close)

    def _head_is_there(self) -> None:
        self.head_bytes = None
        if self.head_due is not None:
            self.head_due.cancel()
            self.head_due = None

    def _end(self, words: bytes) -> None:
        self._head_is_there()
        if not self.transport.is_closing():
            self.transport.write(words)
            self.transport.close()


def _connections() -> int:
    """As many as there may be: a fifth of the process's files stay for the models and the disk."""
    return min(_MAX_CONNECTIONS, int(0.8 * resource.getrlimit(resource.RLIMIT_NOFILE)[0]))


def _listener(host: str, port: int) -> socket.socket:
    """A socket whose address a successor may take while it is still open."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named TCP, or asyncio would not switch Nagle's algorithm off: answers would wait 40 ms for an acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    for level, name, value in (
        (socket.SOL_SOCKET, "SO_REUSEADDR", 1),
        (socket.SOL_SOCKET, "SO_REUSEPORT", 1),
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", _SILENT_S),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", _PROBE_S),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", _PROBES),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 1000 * _UNREAD_S),
    ):
        if hasattr(socket, name):
            listener.setsockopt(level, getattr(socket, name), value)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise PortInUse(
            f"cannot listen on {host} port {port} ({error.strerror})", "stop what listens there, or choose another port"
        ) from None
    listener.setblocking(False)
    return listener


def _tls_context(config: uvicorn.Config, default: Any) -> ssl.SSLContext:
    context: ssl.SSLContext = default()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
