"""Which replica gets a request: Serve's own router with replicas that are only names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ray.serve._private.common import DeploymentHandleSource, DeploymentID
from ray.serve._private.request_router.common import PendingRequest

from orchestrator.serving.routing_on_ray import ROUTING, FewestUnderWay

NAMES = ("a", "b", "c", "d", "e")


def replica(name: str) -> Any:
    async def queue_length(*, deadline_s: float) -> int:
        return 0

    return SimpleNamespace(replica_id=name, node_id="", availability_zone=None, max_ongoing_requests=5,
                           multiplexed_model_ids=(), get_queue_len=queue_length)  # fmt: skip


def order(prepare: Callable[[FewestUnderWay], object] = lambda router: None) -> list[str]:
    """Of the replicas, after what ``prepare`` did; each must be asked alone."""

    async def scenario() -> list[str]:
        model = DeploymentID(name="Model", app_name="model-reviews")
        router = FewestUnderWay(deployment_id=model, handle_source=DeploymentHandleSource.REPLICA)
        router.initialize_state()
        router.update_replicas([replica(name) for name in NAMES])
        prepare(router)
        asked = PendingRequest([], {}, SimpleNamespace(multiplexed_model_id=""))
        ranks = await router.choose_replicas(router._replicas_list, asked)
        assert asked.routing_context.should_backoff, "or Serve asks busy ones without a pause"
        return [one.replica_id for (one,) in ranks]

    return asyncio.run(scenario())


def busy(router: FewestUnderWay, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        for _ in range(count):
            router.on_send_request(name)


def test_of_many_the_idle_one_is_always_asked_first() -> None:
    for idle in NAMES * 4:
        under_way = {name: number for number, name in enumerate(NAMES, start=1)} | {idle: 0}
        assert order(lambda router, counts=under_way: busy(router, counts)) == sorted(NAMES, key=under_way.__getitem__)


def test_between_equals_chance_decides() -> None:
    assert len({order()[0] for _ in range(60)}) > 1


def test_an_answer_makes_room() -> None:
    def prepare(router: FewestUnderWay) -> None:
        busy(router, dict.fromkeys(NAMES, 2))
        router.on_request_completed("d", "1")

    assert order(prepare)[0] == "d"


def test_a_count_never_falls_below_nothing() -> None:
    def prepare(router: FewestUnderWay) -> None:
        router.on_request_completed("a", "1")
        router.on_send_request("a")

    assert order(prepare)[-1] == "a"


def test_who_died_is_asked_no_more_and_forgotten() -> None:
    def prepare(router: FewestUnderWay) -> None:
        router.on_send_request("a")
        router.on_replica_actor_died("a")
        assert router.under_way["a"] == 0

    assert sorted(order(prepare)) == ["b", "c", "d", "e"]


def test_serve_finds_the_class_by_its_name() -> None:
    assert ROUTING.get_request_router_class() is FewestUnderWay
