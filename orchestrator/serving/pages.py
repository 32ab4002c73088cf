"""Pages for people: HTML files of this folder.

In: a file. Out: what answers with it, and the headers that keep everything else out. Knows no models.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from starlette.responses import Response


def page(file: Path) -> Callable[[], Awaitable[Response]]:
    """A self-contained HTML file. Its own scripts and styles are allowed by their hashes, and nothing else is."""
    html = file.read_text(encoding="utf-8")
    allowed = {f"{tag}-src": _hashes(re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)) for tag in ("script", "style")}
    policy = {"default-src": "'none'", **allowed, "img-src": "'self' blob: data:", "connect-src": "'self'",
              "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'"}  # fmt: skip
    headers = {
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    async def answer() -> Response:
        return Response(html, headers=headers, media_type="text/html; charset=utf-8")

    return answer


def _hashes(texts: Sequence[str]) -> str:
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
