"""The endpoint on a real Ray Serve while its processes are killed, more is asked than it can do, and replicas come and go."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest
from ports import free_port
from served_models import publish_text_model
from test_serving_on_ray import Load, ask, wait_until

from orchestrator.client import Client
from orchestrator.recipe_serving import Serving
from orchestrator.serving.scaling import Latency
from orchestrator.serving.served import Served
from orchestrator.storage import Storage, version_location

pytestmark = pytest.mark.ray
GATEWAY, REPLICA = "ray::ServeReplica:gateway:Gateway", "ray::ServeReplica:model-reviews:Model"


LONG = {"instances": ["a text that is long enough to take a while " * 20] * 64}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Served:
    storage = Storage(str(tmp_path_factory.mktemp("faults")))
    publish_text_model(storage, "reviews", 1, tiny_backbone)
    settings = Serving(port=free_port(), min_replicas=2, max_replicas=2, cpus_per_replica=0.5, precision="fp32",
                       latency_budget_ms=400, max_batch_size=4, request_timeout_s=60.0)  # fmt: skip
    slow = Latency(single_ms=500.0, per_row_ms=500.0)  # as if measured, so that few may wait
    return Served("reviews", 1, storage.url, version_location("reviews", 1), settings, slow)


@pytest.fixture(scope="module")
def endpoint(ray_session: object, served: Served) -> Iterator[str]:
    from orchestrator.serving.on_ray import deploy, shutdown

    yield deploy(served)
    shutdown()


def processes(title: str) -> list[psutil.Process]:
    """Of this test's own Ray: others may run on this machine."""
    import ray

    session = ray._private.worker._global_node.get_session_dir_path()
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if (process.info["cmdline"] or [""])[0].startswith(title) and session in " ".join(
                file.path for file in process.open_files()
            ):
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found


def wait_for(title: str, number: int, seconds: float = 90.0) -> list[psutil.Process]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if len(found := processes(title)) == number:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{title}: {len(found)} processes, not {number}")


def memory_bytes() -> int:
    return sum(process.memory_info().rss for process in processes(GATEWAY) + processes(REPLICA))


def replicas_that_run(model: str = "reviews") -> int:
    from orchestrator.serving.on_ray import serving_status

    return int(serving_status()[model]["replicas"])


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_replicas_cost_no_request(endpoint: str, kills: int) -> None:
    killed = set()
    with Load(f"{endpoint}/v1/models/reviews:predict") as load:
        for _ in range(kills):
            victim = wait_for(REPLICA, 2)[0]
            os.kill(victim.pid, signal.SIGKILL)
            killed.add(victim.pid)
            wait_until(lambda victim=victim: victim not in processes(REPLICA) and replicas_that_run() == 2)
    assert len(killed) == kills, "the faults fired"
    assert load.failed()[:3] == []
    assert len(load.answers) > 20 * kills


def test_a_killed_gateway_is_back_within_seconds_and_clients_that_repeat_lose_nothing(endpoint: str) -> None:
    (victim,) = wait_for(GATEWAY, 1)
    with Client(endpoint, retries=30) as client:
        client.predict("reviews", ["fine"])
        os.kill(victim.pid, signal.SIGKILL)
        killed = time.monotonic()
        answers = [client.predict("reviews", [f"text {n}"]) for n in range(20)]
        away_s = time.monotonic() - killed
    assert victim not in processes(GATEWAY), "the fault fired"
    assert len(answers) == 20
    assert away_s < 60, f"away for {away_s:.1f} s"


@pytest.mark.parametrize("seconds", [4.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_more_than_it_can_do_is_turned_away_at_once_and_leaves_no_trace(endpoint: str, seconds: float) -> None:
    url = f"{endpoint}/v1/models/reviews:predict"
    wait_for(REPLICA, 2)
    before_s = typical_s(url)

    async def crowd(seconds: float) -> tuple[Counter[int], set[tuple[str, bool]]]:
        seen, hints = Counter[int](), set[tuple[str, bool]]()
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=400, max_keepalive_connections=400)
        async with httpx.AsyncClient(limits=limits, timeout=60) as client:

            async def one() -> None:
                while time.monotonic() < end:
                    answer = await client.post(url, json=LONG)
                    seen[answer.status_code] += 1
                    if answer.status_code == 503:
                        hints.add((answer.json()["error"]["code"], "retry-after" in answer.headers))

            await asyncio.gather(*(one() for _ in range(400)))
        return seen, hints

    asyncio.run(crowd(2.0))  # after which each process has the buffers that it needs
    rises = []
    while len(rises) < 3 and min(rises, default=math.inf) > 150e6:  # buffers grow once, what is kept grows each time
        before = memory_bytes()
        seen, hints = asyncio.run(crowd(seconds))
        assert set(seen) == {200, 503}, f"the overload fired, and nothing else came of it: {seen}"
        assert hints == {("overloaded", True)}, "at once, and not once its time is over"
        rises.append(memory_bytes() - before)
    assert min(rises) < 150e6, f"memory rose by {[round(rise / 1e6) for rise in rises]} MB"
    assert typical_s(url) < max(20 * before_s, 1.0), "as quick as before"


def typical_s(url: str) -> float:
    """Median of some short requests, one after the other."""
    taken = []
    for _ in range(11):
        began = time.monotonic()
        assert ask(url, {"instances": ["fine"]})[0] == 200
        taken.append(time.monotonic() - began)
    return sorted(taken)[5]


def test_a_step_of_load_brings_replicas_and_its_end_takes_all_of_them(endpoint: str, served: Served) -> None:
    """The last test of this file: the model of the others makes room for one that nobody has asked anything yet."""
    from orchestrator.serving.on_ray import deploy, undeploy

    settings = served.settings.model_copy(update={"min_replicas": 0, "idle_s": 2.0})
    undeploy("reviews")
    deploy(replace(served, name="more", settings=settings, latency=None))
    url, over = f"{endpoint}/v1/models/more:predict", threading.Event()
    statuses: list[int] = []

    def client() -> None:
        while not over.is_set():
            statuses.append(ask(url, LONG)[0])

    with ThreadPoolExecutor(8) as clients:
        for _ in range(8):
            clients.submit(client)
        try:
            wait_until(lambda: replicas_that_run("more") == 2)
            alone = len(statuses)
            wait_until(lambda: len(statuses) > alone)
        finally:
            over.set()
    assert set(statuses) == {200}
    wait_until(lambda: replicas_that_run("more") == 0)
    assert ask(url, {"instances": ["is anybody there"]})[0] == 200, "the first one afterwards waits"
    assert replicas_that_run("more") == 1
