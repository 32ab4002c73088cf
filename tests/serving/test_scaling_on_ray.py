"""A step of load on a real Ray Serve: replicas come, go, and the last one goes as well where that is allowed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ports import free_port
from served_models import publish_text_model
from test_serving_on_ray import ask

from orchestrator.recipe_serving import Serving
from orchestrator.serving.served import Served
from orchestrator.storage import Storage, version_location

pytestmark = pytest.mark.ray
BODY = {"instances": ["a text that is long enough to take a while " * 20] * 64}


@pytest.fixture(scope="module")
def endpoint(ray_session: object, tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Iterator[str]:
    from orchestrator.serving.on_ray import deploy, shutdown

    storage = Storage(str(tmp_path_factory.mktemp("scaling")))
    publish_text_model(storage, "reviews", 1, tiny_backbone)
    settings = Serving(port=free_port(), min_replicas=0, max_replicas=2, idle_s=2.0, cpus_per_replica=0.5, precision="fp32",
                       latency_budget_ms=400, max_batch_size=4)  # fmt: skip
    yield deploy(Served("reviews", 1, storage.url, version_location("reviews", 1), settings))
    shutdown()


def replicas() -> int:
    from orchestrator.serving.on_ray import serving_status

    return int(serving_status()["reviews"]["replicas"])


def until_there_are(number: int, seconds: float = 60.0) -> float:
    """How long it took."""
    began = time.monotonic()
    while replicas() != number:
        assert time.monotonic() - began < seconds, f"{replicas()} replicas, not {number}"
        time.sleep(0.2)
    return time.monotonic() - began


def test_a_step_of_load_brings_replicas_and_its_end_takes_all_of_them(endpoint: str) -> None:
    url, over = f"{endpoint}/v1/models/reviews:predict", threading.Event()
    taken: list[tuple[int, float]] = []

    def client() -> None:
        while not over.is_set():
            began = time.monotonic()
            taken.append((ask(url, BODY)[0], time.monotonic() - began))

    with ThreadPoolExecutor(8) as clients:
        for _ in range(8):
            clients.submit(client)
        try:
            up_s = until_there_are(2)
            alone = len(taken)
            time.sleep(3.0)
        finally:
            over.set()
    assert {status for status, _ in taken} == {200}
    assert len(taken) > alone
    down_s = until_there_are(0)
    began = time.monotonic()
    assert ask(url, {"instances": ["is anybody there"]})[0] == 200, "the first one afterwards waits"
    woken_s = time.monotonic() - began
    assert replicas() == 1
    p99 = sorted(seconds for _, seconds in taken)[int(0.99 * len(taken))]
    print(f"up {up_s:.1f} s, down {down_s:.1f} s, woken {woken_s:.1f} s, p99 {p99:.2f} s of {len(taken)}")
