"""The endpoint on a real Ray Serve: two models behind one gateway, changed while they are asked."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served_models import publish_image_model, publish_text_model

from orchestrator.errors import PortInUse, ServingFailed
from orchestrator.recipe import Serving
from orchestrator.serving.predictor import Predictor
from orchestrator.storage import Storage

pytestmark = pytest.mark.ray
Answer = tuple[int, dict[str, Any], dict[str, str]]


def ask(url: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.load(answer), {k.lower(): v for k, v in answer.headers.items()}
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), {k.lower(): v for k, v in error.headers.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def settings() -> Serving:
    return Serving(port=free_port(), max_replicas=1, max_body_bytes=50_000, max_instances=64, request_timeout_s=10)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(str(tmp_path_factory.mktemp("served")))


@pytest.fixture(scope="module")
def endpoint(ray_session: object, settings: Serving, storage: Storage, tiny_backbone: Path) -> Iterator[str]:
    from orchestrator.serving.on_ray import Served, deploy, shutdown

    times = [time.monotonic()]
    for name, location in (("reviews", publish_text_model(storage, "reviews", 1, tiny_backbone)), ("shapes", publish_image_model(storage, "shapes", 1))):
        url = deploy(Served(name, 1, storage.url, location, settings))
        times.append(time.monotonic())
    print("deploy seconds", [b - a for a, b in zip(times, times[1:], strict=False)])
    yield url
    started = time.monotonic()
    shutdown()
    print("shutdown seconds", time.monotonic() - started)


def test_x(endpoint):
    print(endpoint)
    t=time.monotonic()
    for i in range(5):
        print(ask(f"{endpoint}/v1/models/reviews:predict", {"instances":["the coffee is great"]}, {"x-request-id":"abc"}), time.monotonic()-t); t=time.monotonic()
    print(ask(f"{endpoint}/v1/models/reviews:predict", {"instances":["the coffee is great"]}, {"x-request-timeout-seconds":"\xff"}))
    print(ask(f"{endpoint}/v1/models/reviews:predict", {"instances":["the coffee is great"]}, {"x-request-id":"\xff"}))
    print(ask(f"{endpoint}/v1/models"))
    print(urllib.request.urlopen(f"{endpoint}/metrics").read().decode()[:1500])
    from orchestrator.serving.on_ray import serving_status
    print(serving_status())
