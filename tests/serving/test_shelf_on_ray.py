"""Six models on one shelf that holds three at a time, on a real Ray Serve: asked, damaged, replaced, moved, killed."""

from __future__ import annotations

import base64
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from served_models import png, publish_image_model
from test_endpoint_faults_on_ray import processes, wait_for
from test_serving_on_ray import Load, ask, free_port, offline, scores, wait_until

from orchestrator.errors import ServingFailed
from orchestrator.recipe_serving import Serving
from orchestrator.serving.plans import read_end
from orchestrator.serving.served import SHELF_APP, Served
from orchestrator.storage import Storage, version_location

pytestmark = pytest.mark.ray
NAMES = [f"shop{number}" for number in range(6)]
IMAGES = [png(seed) for seed in range(2)]
BODY = {"instances": [{"b64": base64.b64encode(image).decode()} for image in IMAGES]}
SHELF = "ray::ServeReplica:shelf:Shelf"


class ImageLoad(Load):
    body = BODY


@pytest.fixture(scope="module")
def settings() -> Serving:
    shelf = {"bytes": 160_000_000, "cpus_per_replica": 0.5}  # three of 45 MB
    return Serving.model_validate({"port": free_port(), "shared": True, "precision": "fp32", "max_batch_size": 4,
                                   "max_replicas": 1, "cpus_per_replica": 0.5, "shelf": shelf})  # fmt: skip


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    storage = Storage(str(tmp_path_factory.mktemp("shelf")))
    for number, name in enumerate(NAMES):
        publish_image_model(storage, name, number + 1)
    publish_image_model(storage, "shop0", 9)
    return storage


def version(name: str) -> int:
    return NAMES.index(name) + 1


def served(storage: Storage, settings: Serving, name: str, number: int | None = None) -> Served:
    number = number or version(name)
    return Served(name, number, storage.url, version_location(name, number), settings)


@pytest.fixture(scope="module")
def endpoint(ray_session: object, settings: Serving, storage: Storage) -> Iterator[str]:
    from orchestrator.serving.on_ray import deploy, shutdown

    for name in NAMES:
        url = deploy(served(storage, settings, name))
    yield url
    shutdown()


def stats() -> dict[str, Any]:
    from orchestrator.serving.applications_on_ray import called

    told: dict[str, Any] = called(SHELF_APP, "stats", 60.0)
    return told


def check_answers(endpoint: str, storage: Storage, name: str, number: int | None = None) -> None:
    answer = ask(f"{endpoint}/v1/models/{name}:predict", BODY)
    number = number or version(name)
    assert scores(answer) == [pytest.approx(row, abs=1e-5) for row in offline(storage, name, number, list(IMAGES))]
    assert answer[1]["model_version"] == str(number)


def test_six_models_answer_where_three_have_room(endpoint: str, storage: Storage) -> None:
    for name in [*NAMES, "shop3"]:
        check_answers(endpoint, storage, name)
        told = stats()
        assert len(told["loaded"]) <= 3 and told["used_bytes"] <= told["budget_bytes"]
    assert told["loaded"] == ["shop4@5", "shop5@6", "shop3@4"], "the least recently used first"
    listed = ask(f"{endpoint}/v1/models")[1]["models"]
    assert [model["model_name"] for model in listed] == NAMES, "also those that are not loaded"
    assert {tuple(model["labels"]) for model in listed} == {("bad", "good", "so-so")}


def test_a_model_on_the_shelf_explains(endpoint: str) -> None:
    status, told, _ = ask(
        f"{endpoint}/v1/models/shop1:explain", {"instance": BODY["instances"][0], "method": "occlusion"}
    )
    assert (status, told["model_version"]) == (200, "2")


def test_the_status_says_which_are_loaded(endpoint: str) -> None:
    from orchestrator.serving.on_ray import serving_status

    ask(f"{endpoint}/v1/models/shop2:predict", BODY)
    status = serving_status()
    assert sorted(status) == NAMES
    assert (status["shop2"]["version"], status["shop2"]["replicas"], status["shop2"]["loaded"]) == (3, 1, True)
    assert sum(model["loaded"] for model in status.values()) == len(stats()["loaded"])


def test_a_damaged_model_is_refused_alone(endpoint: str, storage: Storage) -> None:
    from orchestrator.serving.applications_on_ray import called

    weights = storage.path(version_location("shop5", 6)) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for name in ("shop0", "shop1", "shop2"):  # so that it has to be loaded again
        check_answers(endpoint, storage, name)
    status, told, headers = ask(f"{endpoint}/v1/models/shop5:predict", BODY)
    assert (status, told["error"]["code"], headers["retry-after"]) == (503, "model_unavailable", "1")
    assert "shop5" in told["error"]["message"] and str(weights) not in str(told), "clients learn no paths"
    refused = called(SHELF_APP, "predict", 60.0, "shop5", None, [])
    assert "model.safetensors is not the file" in refused.reason
    check_answers(endpoint, storage, "shop4")
    weights.write_bytes(whole)
    wait_until(lambda: ask(f"{endpoint}/v1/models/shop5:predict", BODY)[0] == 200)
    check_answers(endpoint, storage, "shop5")


def test_a_new_version_replaces_the_old_one_unless_it_answers_wrongly(
    endpoint: str, storage: Storage, settings: Serving
) -> None:
    from orchestrator.serving.on_ray import deploy

    wrong = [{"input": BODY["instances"][0], "scores": {"bad": 0.0, "good": 0.0, "so-so": 0.0, label: 1.0}}
             for label in ("bad", "good", "so-so")]  # fmt: skip
    with ImageLoad(f"{endpoint}/v1/models/shop0:predict") as load:
        with pytest.raises(ServingFailed, match="does not answer as it did when it was evaluated"):
            deploy(served(storage, settings, "shop0", 9), known=wrong)
        before = len(load.answers)
        deploy(served(storage, settings, "shop0", 9))
        load.wait_for_version(9)
    assert load.failed() == []
    versions = [answer[1]["model_version"] for answer in load.answers]
    assert set(versions[:before]) == {"1"}, "nobody saw the one that was refused"
    assert versions[-1] == "9"
    check_answers(endpoint, storage, "shop0", 9)
    deploy(served(storage, settings, "shop0"))


def test_a_canary_beside_the_shelf_has_replicas_of_its_own(endpoint: str, storage: Storage, settings: Serving) -> None:
    from orchestrator.serving.on_ray import deploy, roll_out

    plan = roll_out(served(storage, settings, "shop0", 9), "canary", 0.5)
    assert (plan.stable, plan.candidate) == (1, 9)
    seen = set[str]()

    def both_answer() -> bool:
        answer = ask(f"{endpoint}/v1/models/shop0:predict", BODY, {"x-client-id": str(time.monotonic_ns())})
        seen.add(answer[1]["model_version"])
        return len(seen) == 2

    wait_until(both_answer)
    assert seen == {"1", "9"}
    deploy(served(storage, settings, "shop0"))
    assert read_end(storage, plan) is not None, "the rollout has ended"


def test_a_model_moves_off_the_shelf_and_back_without_a_failed_request(
    endpoint: str, storage: Storage, settings: Serving
) -> None:
    from orchestrator.serving.on_ray import deploy, serving_status

    own = settings.model_copy(update={"shared": False})
    with ImageLoad(f"{endpoint}/v1/models/shop1:predict") as load:
        deploy(served(storage, own, "shop1"))
        assert "loaded" not in serving_status()["shop1"], "it has replicas of its own"
        deploy(served(storage, settings, "shop1"))
        assert "loaded" in serving_status()["shop1"]
        load.wait_for_answers(10)
    assert load.failed() == []
    assert len(load.answers) > 20


def test_a_killed_shelf_costs_no_request(endpoint: str) -> None:
    with (
        ImageLoad(f"{endpoint}/v1/models/shop2:predict") as load,
        ImageLoad(f"{endpoint}/v1/models/shop3:predict") as other,
    ):
        (victim,) = wait_for(SHELF, 1)
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: victim not in processes(SHELF))
        load.wait_for_answers(20)
        other.wait_for_answers(20)
    assert load.failed() == [] and other.failed() == []


def test_a_model_is_taken_off_and_the_last_one_takes_the_shelf_with_it(endpoint: str) -> None:
    from ray import serve

    from orchestrator.serving.on_ray import serving_status, undeploy

    assert undeploy("shop5") and not undeploy("shop5")
    assert sorted(serving_status()) == NAMES[:5]
    wait_until(lambda: ask(f"{endpoint}/v1/models/shop5")[0] == 404)
    for name in NAMES[:5]:
        undeploy(name)
    assert SHELF_APP not in serve.status().applications
