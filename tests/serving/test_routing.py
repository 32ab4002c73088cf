"""Which replica gets a request, with replicas that are only names."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.request_router import PowerOfTwoChoicesRequestRouter

from orchestrator.serving.routing_on_ray import ROUTING, FewestUnderWay

REPLICAS = [SimpleNamespace(replica_id=name) for name in ("a", "b", "c")]


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> FewestUnderWay:
    """Without Serve around it: what it inherits draws all replicas and counts nothing."""

    async def draw(self: Any, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        return [list(candidate_replicas)]

    monkeypatch.setattr(PowerOfTwoChoicesRequestRouter, "choose_replicas", draw)
    for name in ("on_send_request", "on_request_completed", "on_replica_actor_died"):
        monkeypatch.setattr(PowerOfTwoChoicesRequestRouter, name, lambda *_: None)
    router = FewestUnderWay.__new__(FewestUnderWay)
    router.initialize_state()
    return router


def order(router: FewestUnderWay, model: str = "") -> list[list[str]]:
    asked = SimpleNamespace(metadata=SimpleNamespace(multiplexed_model_id=model))
    ranks = asyncio.run(router.choose_replicas(REPLICAS, asked))
    return [[replica.replica_id for replica in rank] for rank in ranks]


def test_who_has_fewest_is_asked_first(router: FewestUnderWay) -> None:
    for name in ("a", "a", "b"):
        router.on_send_request(name)
    assert order(router) == [["c"], ["b"], ["a"]]
    router.on_request_completed("a", "1")
    router.on_request_completed("a", "2")
    assert order(router) == [["a"], ["c"], ["b"]]


def test_a_count_never_falls_below_nothing(router: FewestUnderWay) -> None:
    router.on_request_completed("a", "1")
    router.on_send_request("a")
    assert order(router)[-1] == ["a"]


def test_who_died_is_forgotten(router: FewestUnderWay) -> None:
    router.on_send_request("a")
    router.on_replica_actor_died("a")
    assert order(router) == [["a"], ["b"], ["c"]]


def test_a_model_on_the_shelf_stays_with_the_replicas_that_hold_it(router: FewestUnderWay) -> None:
    router.on_send_request("a")
    assert order(router, model="reviews") == [["a", "b", "c"]]


def test_serve_finds_the_class_by_its_name() -> None:
    assert ROUTING.get_request_router_class() is FewestUnderWay
