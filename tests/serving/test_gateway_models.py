"""What a gateway knows of the models behind it, with Serve's answers made up."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections import ChainMap
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from fastapi import FastAPI
from ray import serve
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from orchestrator.errors import PortInUse, ServingFailed
from orchestrator.recipe_serving import Listen, Serving
from orchestrator.serving import door_on_ray, gateway_on_ray, logs
from orchestrator.serving.access import create_key, used_on
from orchestrator.serving.cache import AnswerCache
from orchestrator.serving.contract import Answers, ApiError, Caller, Input, Limits, ModelInfo
from orchestrator.serving.door_on_ray import Gateway
from orchestrator.serving.envelope import Metrics
from orchestrator.serving.gateway_on_ray import RayModels, _Known
from orchestrator.serving.plans import write_plan
from orchestrator.serving.recorded import read_predictions
from orchestrator.serving.served import Served
from orchestrator.serving.trial import Trial
from orchestrator.storage import Storage

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


def test_a_model_whose_replica_has_just_answered_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    there = SimpleNamespace(applications={"model-reviews": RUNNING})  # Serve says of no replica yet that it runs
    monkeypatch.setattr(serve, "status", lambda: there)
    monkeypatch.setattr(serve, "get_app_handle", lambda app: replica(0.0))

    async def ready() -> bool:
        models = RayModels(Metrics())
        async with models.watching(FastAPI()):
            return models.is_ready("reviews")

    assert asyncio.run(ready())


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


def known(
    name: str = "reviews", version: int = 3, handle: Any = None, storage: str = "/nowhere", **settings: Any
) -> _Known:
    info = ModelInfo(model_name=name, model_version=str(version), task="text_classification", input_kind="text",
                     labels=("bad", "good"), limits=LIMITS)  # fmt: skip
    served = Served(name, version, storage, "m", Serving(**settings))
    return _Known(handle, served, info, AnswerCache(0))


def models(**there: _Known) -> RayModels:
    """By application, with ``_`` for ``-``."""
    return RayModels(Metrics(), known=ChainMap({}, {app.replace("_", "-"): each for app, each in there.items()}))


def test_a_candidate_whose_stable_version_is_not_known_is_no_model_yet() -> None:
    """Whether it asks for keys is the stable one's word."""
    candidate = known(version=4, keys=True)
    alone = models(candidate_reviews=candidate)
    assert asyncio.run(alone.describe("reviews", "4")) is None
    both = models(candidate_reviews=candidate, model_reviews=known())
    assert asyncio.run(both.describe("reviews", "4")) == candidate.info


@pytest.mark.parametrize(
    ("keyed_only", "settings", "is_let_in"),
    [(True, {}, False), (True, {"open_to_network": True}, True), (True, {"keys": True}, True), (False, {}, True)],
)
def test_on_the_network_a_model_needs_keys_or_its_own_word(
    keyed_only: bool, settings: dict[str, Any], is_let_in: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = RayModels(Metrics(), keyed_only)
    served = known(storage=str(tmp_path), **settings).served
    with caplog.at_level(logging.WARNING):
        assert [asyncio.run(there._is_let_in(served)) for _ in range(3)] == [is_let_in] * 3
    assert len(caplog.records) == (not is_let_in), "it is told once"


def asking(error: Exception | None, times: int) -> Any:
    """A handle that fails so often."""
    left = [times]

    async def predict(version: str | None, inputs: Sequence[Input]) -> Answers:
        left[0] -= 1
        if left[0] >= 0:
            assert error is not None
            raise error
        return Answers(version="3", outputs=[{"label": "good", "scores": {"good": 1.0}} for _ in inputs])

    return SimpleNamespace(predict=SimpleNamespace(remote=predict))


@pytest.mark.parametrize(
    ("error", "times", "code"),
    [
        (RayActorError(), 2, None),
        (RayActorError(), 9, "replicas_died"),
        (ActorUnavailableError("for a moment", None), 9, None),
        (DeploymentUnavailableError("reviews"), 9, None),
    ],
)
def test_a_request_that_replicas_die_of_kills_three_at_most(
    error: Exception, times: int, code: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_on_ray, "_LONGEST_RETRY_S", 0.001)
    there = models(model_reviews=known(handle=asking(error, times)))
    try:
        answers = asyncio.run(there.predict("reviews", None, ["a"], Caller("you", "r-1")))
    except ApiError as refused:
        assert (refused.status, refused.code, code) == (503, "replicas_died", "replicas_died")
    else:
        assert code is None and answers.version == "3"


@pytest.mark.parametrize(
    ("behaviour", "due_s", "error"),
    [("hangs", 0.0, "timeout"), ("hangs", math.inf, "cancelled"), ("breaks", math.inf, "internal")],
)
def test_requests_without_an_answer_are_recorded_with_their_reason(
    behaviour: str, due_s: float, error: str, tmp_path: Path
) -> None:
    async def predict(version: str | None, inputs: Sequence[Input]) -> Answers:
        if behaviour == "breaks":
            raise ValueError("of the model's own code")
        await asyncio.sleep(60)
        raise AssertionError

    handle = SimpleNamespace(predict=SimpleNamespace(remote=predict))
    there = models(model_reviews=known(handle=handle, storage=str(tmp_path), recording={"share": 0.5}))

    async def ask() -> None:
        asked = asyncio.create_task(there.predict("reviews", None, ["a"], Caller("you", "r-1", 0.4, due_s)))
        await asyncio.sleep(0)
        if behaviour == "hangs":
            asked.cancel()
        with pytest.raises(asyncio.CancelledError if behaviour == "hangs" else ValueError):
            await asked

    asyncio.run(ask())
    there.recorders.write_all()
    (row,) = read_predictions(Storage(str(tmp_path)), "reviews").to_pylist()
    assert (row["request_id"], row["error"], row["label"], row["model_version"]) == ("r-1", error, None, "3")


def test_a_shadows_answer_is_recorded_if_and_only_if_the_request_is(tmp_path: Path) -> None:
    there = models(model_reviews=known(handle=asking(None, 0), storage=str(tmp_path), recording={"share": 0.5}))
    for number, chance in enumerate((0.4, 0.6)):
        caller = Caller("you", f"r-{number}", chance)
        answers = asyncio.run(there.predict("reviews", None, ["a"], caller))
        there._record("model-reviews", caller, ["a"], answers.model_copy(update={"arm": "shadow"}), 1.0)
    there.recorders.write_all()
    table = read_predictions(Storage(str(tmp_path)), "reviews")
    assert sorted(zip(table["request_id"].to_pylist(), table["arm"].to_pylist(), strict=True)) == [
        ("r-0", "shadow"),
        ("r-0", "stable"),
    ]


def test_a_model_is_ready_if_a_replica_of_it_runs_or_comes_when_it_is_asked() -> None:
    there = models(model_reviews=known(), model_lazy=known("lazy", min_replicas=0))
    assert [there.is_ready(name) for name in ("reviews", "lazy", "none")] == [False, True, False]
    there.running["model-reviews"] = 1
    assert there.is_ready("reviews")


def test_feedback_names_the_version_that_answered(tmp_path: Path) -> None:
    there = models(
        model_reviews=known(storage=str(tmp_path)), candidate_reviews=known(version=4, storage=str(tmp_path))
    )

    def tell(request_id: str) -> None:
        entry = {"model_version": "3", "request_id": request_id, "index": 0, "label": "bad"}
        asyncio.run(there.feedback("reviews", entry))

    tell("before the rollout")
    storage = Storage(str(tmp_path))
    plan = write_plan(storage, "reviews", 3, 4, "canary", 0.5, Serving())
    trial = there.trials["reviews"] = Trial.load(storage, plan)
    answers = Answers(version="?", outputs=[{"label": "bad", "scores": {}}])
    for request_id, arm in (("of the old", trial.stable), ("of the new", trial.candidate)):
        trial._remember(Caller("you", request_id), arm, answers)
    for request_id in ("of the old", "of the new", "of who knows"):
        tell(request_id)
    lines = [json.loads(line) for line in (tmp_path / "serve/feedback/reviews.jsonl").read_text().splitlines()]
    assert {line["request_id"]: line.get("model_version") for line in lines} == {
        "before the rollout": "3", "of the old": "3", "of the new": "4", "of who knows": None,
    }  # fmt: skip


def test_feedback_on_a_model_that_has_just_gone_is_503() -> None:
    with pytest.raises(ApiError) as caught:
        asyncio.run(models().feedback("reviews", {"request_id": "r-1", "index": 0, "label": "bad"}))
    assert (caught.value.status, caught.value.code) == (503, "unavailable")


def test_what_was_used_last_is_written_down_at_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={}))
    monkeypatch.setattr(gateway_on_ray, "_LOOK_EVERY_S", 600.0)
    storage = Storage(str(tmp_path))
    key, _ = create_key(storage, "shop")
    there = RayModels(Metrics())
    there.rings.learn(storage.url)

    async def run() -> None:
        async with there.watching(FastAPI()):
            await asyncio.sleep(0)
            there.rings.known[storage.url].take_inputs(key, 7)

    asyncio.run(run())
    assert used_on(storage, datetime.now(UTC).date().isoformat()) == {key.id: 7}


class FakeDoor:
    """Opens unless its port is 1."""

    open_ones: ClassVar[list[FakeDoor]] = []

    def __init__(self, app: Any, listen: Listen) -> None:
        self.listen = listen

    async def open(self) -> None:
        if self.listen.port == 1:
            raise PortInUse("somebody listens there", "")
        self.open_ones.append(self)

    async def close(self, patience_s: float) -> None:
        if self in self.open_ones:
            self.open_ones.remove(self)

    def check(self) -> None:
        pass


class Undeployed(Gateway):
    def __del__(self) -> None:  # type: ignore[override]
        """Serve would await the other one."""


def test_a_gateway_that_cannot_listen_elsewhere_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(door_on_ray, "Door", FakeDoor)
    monkeypatch.setattr(FakeDoor, "open_ones", [])
    first, second = str(tmp_path / "first.log"), str(tmp_path / "second.log")

    async def run() -> None:
        gateway = Undeployed()
        await gateway.reconfigure({"host": "0.0.0.0", "open_to_network": True, "request_log": first})
        models, door = gateway.models, gateway.door
        assert models.keyed_only, "that something in front does TLS says nothing of keys"
        for cannot in ({"port": 1, "request_log": second}, {"request_log": str(tmp_path)}):
            with pytest.raises((PortInUse, ServingFailed)):
                await gateway.reconfigure(cannot)
            assert gateway.models is models and gateway.door is door
            assert FakeDoor.open_ones == [door] and log_files() == [first]
        await gateway.reconfigure({"request_log": second})
        assert log_files() == [second] and gateway.models.rings is models.rings and not gateway.models.keyed_only
        await gateway.reconfigure({})
        assert log_files() == [] and FakeDoor.open_ones == [gateway.door]

    def log_files() -> list[str]:
        return [str(outlet.stream.name) for outlet in logs.ROOM.handlers if isinstance(outlet, logs.Outlet)]

    asyncio.run(run())
