"""What a gateway knows of the models behind it, with Serve's answers made up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from ray import serve

from orchestrator.recipe_serving import Serving
from orchestrator.serving import gateway_on_ray
from orchestrator.serving.contract import Limits, ModelInfo
from orchestrator.serving.envelope import Metrics
from orchestrator.serving.gateway_on_ray import RayModels
from orchestrator.serving.served import Served

LIMITS = Limits(max_instances=9, max_body_bytes=10_000, request_timeout_s=5.0)
RUNNING = SimpleNamespace(status=serve.schema.ApplicationStatus.RUNNING, last_deployed_time_s=1.0, deployments={})


def replica(pause_s: float) -> Any:
    """Says after a while that it is version 3 of reviews."""

    async def describe() -> tuple[Served, ModelInfo]:
        await asyncio.sleep(pause_s)
        info = ModelInfo(model_name="reviews", model_version="3", task="text_classification", input_kind="text",
                         labels=("bad", "good"), limits=LIMITS)  # fmt: skip
        return Served("reviews", 3, "/nowhere", "m", Serving()), info

    handle = SimpleNamespace(describe=SimpleNamespace(remote=describe))
    handle.options = lambda **_: handle
    return handle


def seen_when_the_door_opens(monkeypatch: pytest.MonkeyPatch, status: Callable[[], Any], pause_s: float) -> list[str]:
    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(serve, "get_app_handle", lambda app: replica(pause_s))

    async def names() -> list[str]:
        models = RayModels(Metrics())
        async with models.watching(FastAPI()):
            return await models.names()

    return asyncio.run(names())


def test_a_gateway_knows_its_models_before_it_is_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    there = SimpleNamespace(applications={"model-reviews": RUNNING, "other": RUNNING})
    assert seen_when_the_door_opens(monkeypatch, lambda: there, 0.3) == ["reviews"]


def test_a_replica_that_hangs_keeps_no_door_shut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_on_ray, "PATIENCE_S", 0.2)
    there = SimpleNamespace(applications={"model-reviews": RUNNING})
    assert seen_when_the_door_opens(monkeypatch, lambda: there, 30.0) == []


def test_nor_does_a_controller_that_is_away(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)

    def away() -> None:
        raise ConnectionError("no controller")

    assert seen_when_the_door_opens(monkeypatch, away, 0.0) == []
    assert "cannot see which models there are" in caplog.text
