"""Where an endpoint listens, and asking it as any client would.

In: host, port, certificate. Out: a URL, answers. Knows no Ray.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
import urllib.request
import uuid
from dataclasses import dataclass, field
from http.client import HTTPResponse

from orchestrator.errors import PortInUse, ServingFailed
from orchestrator.recipe_serving import Serving, Tls, is_loopback

_PATIENCE_S, _ANSWER_S, _POLL_S = 30.0, 5.0, 0.1


def url_of(host: str, port: int, secure: bool) -> str:
    return f"{'https' if secure else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def check_port(host: str, port: int) -> None:
    """Raises PortInUse if this machine cannot listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUse(
                f"cannot listen on {host} port {port} ({error.strerror})",
                "stop what listens there, or choose another: --set serving.port=8001",
            ) from None


def check_certificate(tls: Tls) -> None:
    """Raises ServingFailed if these files are no certificate and the key that belongs to it."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certificate, tls.key, password=lambda: b"")
    except (OSError, ValueError) as error:  # ssl's own are among them
        raise ServingFailed(
            f"serving.tls: {tls.certificate} and {tls.key} are no certificate and its key in PEM ({error})",
            "give paths on the machine that listens; a key with a password cannot be used",
        ) from None


def check_joining(host: str, settings: Serving) -> None:
    """Raises ServingFailed if a model would come to an endpoint that listens on the network, and be open to all there."""
    if not is_loopback(host) and not settings.keys and not settings.open_to_network:
        raise ServingFailed(
            f"the endpoint that runs here listens on {host or 'every interface'}, and this model has no serving.keys",
            "set serving.keys: true, or say with serving.open_to_network: true that all may ask it",
        )


@dataclass(frozen=True)
class Endpoint:
    """One that was started from here: it is not asked who it is."""

    url: str
    key: str | None = None
    request_id: str = field(default_factory=lambda: f"known-answers-{uuid.uuid4().hex}")
    """Of all requests: none of them is a user's, and who expects this id can tell."""

    def open(self, path: str, body: bytes | None = None, timeout_s: float = _ANSWER_S) -> HTTPResponse:
        """Raises what urllib does."""
        headers = {"content-type": "application/json", "x-request-id": self.request_id}
        if self.key is not None:
            headers["authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.url}{path}", body, headers)
        # its certificate is made out to the name that clients know, which is not the address that is asked here
        context = ssl._create_unverified_context() if self.url.startswith("https") else None
        answer: HTTPResponse = urllib.request.urlopen(request, timeout=timeout_s, context=context)
        return answer

    def version_of(self, name: str) -> str | None:
        try:
            with self.open(f"/v1/models/{name}") as answer:
                version: str = json.load(answer)["model_version"]
        except (OSError, ValueError):
            return None
        return version

    def wait_for(self, name: str, version: str) -> None:
        """The gateway looks once a second. Raises ServingFailed."""
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            if self.version_of(name) == version:
                return
            time.sleep(_POLL_S)
        raise ServingFailed(f"{self.url} does not answer with {name} version {version}", "see Serve's logs")
