"""What Ray Serve's own HTTP proxy must not be told by clients.

The proxy obeys request headers that switch its time limit off, ignore a disconnect or choose a replica, and fails with
500 when one of them is not UTF-8. This middleware stands before it and takes them away. Knows only headers.
"""

from __future__ import annotations

import re

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.serving.contract import REQUEST_ID_PATTERN

_OBEYED = re.compile(rb"x-request-timeout-seconds|x-request-disconnect-disabled|serve[-_]multiplexed[-_]model[-_]id|"
                     rb"x[-_]session[-_]id|x[-_]serve[-_].*|ray[-_]serve[-_].*")  # fmt: skip
_SANE_ID = re.compile(REQUEST_ID_PATTERN.encode())


class StripServeHeaders:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if _passes(name, value)]}
        await self.app(scope, receive, send)


def _passes(name: bytes, value: bytes) -> bool:
    if not name.isascii() or _OBEYED.fullmatch(name.lower()):
        return False
    return name.lower() != b"x-request-id" or _SANE_ID.fullmatch(value) is not None


def proxy_middlewares() -> list[Middleware]:
    """What ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names."""
    return [Middleware(StripServeHeaders)]
