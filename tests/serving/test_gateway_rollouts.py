"""What a gateway does of rollouts: each by itself, and before anybody asks."""

from __future__ import annotations

import asyncio
import logging
from collections import ChainMap
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from ray import serve

from orchestrator.errors import DiskFull
from orchestrator.recipe_serving import Serving
from orchestrator.serving import gateway_on_ray
from orchestrator.serving.cache import AnswerCache
from orchestrator.serving.contract import Answers, Caller, Input, Limits, ModelInfo
from orchestrator.serving.envelope import Metrics
from orchestrator.serving.gateway_on_ray import RayModels, _Known
from orchestrator.serving.plans import read_end, write_end, write_plan
from orchestrator.serving.served import Served
from orchestrator.storage import Storage, rollout_location

LIMITS = Limits(max_instances=9, max_body_bytes=10_000, request_timeout_s=5.0)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def deleted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Applications that Serve was told to delete."""
    names: list[str] = []
    monkeypatch.setattr(serve, "delete", lambda name, blocking: names.append(name))
    return names


def known(storage: Storage, name: str, version: int, fails: bool = False) -> _Known:
    async def predict(wanted: str | None, inputs: Sequence[Input]) -> Answers:
        if fails:
            raise RuntimeError("no such layer")
        return Answers(version=str(version), outputs=[{"label": "good", "scores": {}} for _ in inputs])

    info = ModelInfo(model_name=name, model_version=str(version), task="text_classification", input_kind="text",
                     labels=("bad", "good"), limits=LIMITS)  # fmt: skip
    handle: Any = SimpleNamespace(predict=SimpleNamespace(remote=predict))
    return _Known(handle, Served(name, version, storage.url, "m", Serving()), info, AnswerCache(0))


def gateway(storage: Storage, *names: str, fails: bool = False) -> RayModels:
    """Of each model version 1 stands there and version 2 beside it, which answers everybody."""
    there = {f"model-{name}": known(storage, name, 1) for name in names}
    there |= {f"candidate-{name}": known(storage, name, 2, fails) for name in names}
    for name in names:
        write_plan(storage, name, 1, 2, "canary", 1.0, Serving())
    return RayModels(Metrics(), known=ChainMap({}, there))


async def asked(models: RayModels, name: str, version: str | None = None, times: int = 1) -> list[str]:
    callers = [Caller(str(number), f"r-{number}") for number in range(times)]
    return [(await models.predict(name, version, ["a text"], caller)).version for caller in callers]


def test_a_plan_that_cannot_be_read_keeps_no_other_rollout_from_being_looked_at(
    storage: Storage, deleted: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        models = gateway(storage, "a", "b", "c", fails=True)
        await models._look_at_trials()
        assert sorted(models.trials) == ["a", "b", "c"]
        for name in models.trials:
            assert set(await asked(models, name, times=50)) == {"1"}
        storage.path(f"{rollout_location('b')}/plan.json").write_text("{")
        await models._look_at_trials()
        asked_before = models.trials["b"].candidate.requests
        assert set(await asked(models, "b", times=50)) == {"1"}
        assert models.trials["b"].candidate.requests == asked_before, "and does no harm itself"

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert sorted(deleted) == ["candidate-a", "candidate-c"] and "cannot look at the rollout of b" in caplog.text


def test_nor_does_a_storage_that_hangs(storage: Storage, deleted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_on_ray, "PATIENCE_S", 0.2)

    async def scenario() -> None:
        models = gateway(storage, "a", "b")
        look, going_on = models._look_at_trial, asyncio.Event()

        async def hanging(name: str, *versions: Served) -> None:
            if name == "a":
                await going_on.wait()
            await look(name, *versions)

        models._look_at_trial = hanging  # type: ignore[assignment,method-assign]
        await models._look_at_trials()
        assert list(models.trials) == ["b"]
        await models._look_at_trials()
        going_on.set()
        await models.looking["a"]
        assert sorted(models.trials) == ["a", "b"]

    asyncio.run(scenario())


def test_a_candidate_is_kept_until_its_rollback_is_written(
    storage: Storage, deleted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise DiskFull("no room", "free some")

    async def scenario() -> None:
        models = gateway(storage, "a", fails=True)
        await models._look_at_trials()
        await asked(models, "a", times=50)
        with monkeypatch.context() as patch:
            patch.setattr(Storage, "write_json", full)
            await models._look_at_trials()
        assert deleted == [] and models.trials["a"].end is not None
        await models._look_at_trials()
        assert deleted == ["candidate-a"] and read_end(storage, models.trials["a"].plan) == models.trials["a"].end

    asyncio.run(scenario())


def test_a_rollback_after_a_promotion_is_heard(storage: Storage, deleted: list[str]) -> None:
    async def scenario() -> None:
        models = gateway(storage, "a")
        await models._look_at_trials()
        plan = models.trials["a"].plan
        write_end(storage, plan, "promote", "it does well", "ann")
        await models._look_at_trials()
        assert (await asked(models, "a"), deleted) == (["2"], [])
        write_end(storage, plan, "rollback", "it does not", "ann")
        await models._look_at_trials()
        assert (await asked(models, "a"), deleted) == (["1"], ["candidate-a"])

    asyncio.run(scenario())


def test_who_names_a_version_is_no_part_of_the_rollout(storage: Storage) -> None:
    async def scenario() -> None:
        models = gateway(storage, "a")
        await models._look_at_trials()
        assert await asked(models, "a", "1") == ["1"] and await asked(models, "a", "2") == ["2"]
        assert models.trials["a"].stable.requests == models.trials["a"].candidate.requests == 0
        assert await asked(models, "a") == ["2"]

    asyncio.run(scenario())


def test_a_gateway_that_is_started_again_knows_its_rollouts_before_its_door_opens(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = SimpleNamespace(status=serve.schema.ApplicationStatus.RUNNING, last_deployed_time_s=1.0, deployments={})
    there = SimpleNamespace(applications={"model-a": running, "candidate-a": running})
    monkeypatch.setattr(serve, "status", lambda: there)
    stand = {"model-a": known(storage, "a", 1), "candidate-a": known(storage, "a", 2)}

    def handle(app: str) -> Any:
        async def describe() -> tuple[Served, ModelInfo]:
            return stand[app].served, stand[app].info

        return SimpleNamespace(options=lambda **_: SimpleNamespace(describe=SimpleNamespace(remote=describe)))

    monkeypatch.setattr(serve, "get_app_handle", handle)
    plan = write_plan(storage, "a", 1, 2, "canary", 1.0, Serving())

    async def trials() -> dict[str, str]:
        models = RayModels(Metrics())
        async with models.watching(FastAPI()):
            return {name: trial.plan.id for name, trial in models.trials.items()}

    assert asyncio.run(trials()) == {"a": plan.id}
