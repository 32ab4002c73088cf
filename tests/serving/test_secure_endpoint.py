"""An endpoint with keys, over HTTPS, on a real Ray Serve."""

from __future__ import annotations

import json
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import write_certificate
from ports import free_port
from served_models import publish_text_model

from orchestrator.recipe_serving import Serving
from orchestrator.serving.access import create_key, list_keys, revoke
from orchestrator.serving.served import Served
from orchestrator.storage import Storage, version_location

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Storage:
    storage = Storage(str(tmp_path_factory.mktemp("secure")))
    publish_text_model(storage, "reviews", 1, tiny_backbone)
    return storage


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Serving:
    tls = write_certificate(tmp_path_factory.mktemp("certificate"))
    return Serving(port=free_port(), max_replicas=1, keys=True, tls=tls)


@pytest.fixture(scope="module")
def endpoint(ray_session: object, settings: Serving, storage: Storage) -> Iterator[str]:
    from orchestrator.serving.on_ray import deploy, shutdown

    yield deploy(Served("reviews", 1, storage.url, version_location("reviews", 1), settings))
    shutdown()


def ask(url: str, key: str | None, context: ssl.SSLContext, instances: Any = ("fine",)) -> tuple[int, Any]:
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    body = json.dumps({"instances": list(instances)}).encode()
    request = urllib.request.Request(f"{url}/v1/models/reviews:predict", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60, context=context) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def comes(status: int, *asked: Any) -> bool:
    """Within seconds; on a busy machine within a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if ask(*asked)[0] == status:
            return True
        time.sleep(0.2)
    return False


def test_it_answers_who_has_a_key_over_https_alone(endpoint: str, settings: Serving, storage: Storage) -> None:
    assert settings.tls and endpoint.startswith("https://")
    trusting = ssl.create_default_context(cafile=settings.tls.certificate)
    assert list_keys(storage) == [], "that of the deployment is gone"
    assert ask(endpoint, None, trusting)[0] == 401
    key, text = create_key(storage, "shop", per_day=3)
    assert comes(200, endpoint, text, trusting), "a new key is known after a while"
    assert ask(endpoint, text, trusting, ["a", "b", "c"])[0] == 429
    revoke(storage.url, key.id)
    assert comes(401, endpoint, text, trusting), "and a revoked one forgotten"
    used = json.loads(next(storage.path("serve/usage").glob("*/*.json")).read_text())
    assert used[key.id] >= 1


def test_no_other_certificate_and_no_plain_http(endpoint: str, settings: Serving) -> None:
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        ask(endpoint, None, ssl.create_default_context())
    with socket.create_connection(("127.0.0.1", settings.port), timeout=60) as plain:
        plain.sendall(b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\n\r\n")
        assert not plain.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_older_than_1_2_is_refused(endpoint: str, settings: Serving) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", settings.port), timeout=60) as raw, pytest.raises(ssl.SSLError):
        context.wrap_socket(raw)
