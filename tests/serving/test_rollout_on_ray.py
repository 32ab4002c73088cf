"""New versions beside the stable one on a real Ray Serve, under load: good ones stay, bad ones take themselves back, and no
request fails."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import free_port
from served_models import publish_text_model
from test_serving_on_ray import TEXTS, Load, ask, offline

from orchestrator.errors import ServingFailed
from orchestrator.models.checkpoint import load_model, save_model
from orchestrator.recipe_serving import Rollout, Serving
from orchestrator.serve import change_models
from orchestrator.serving.plans import Plan, read_end, read_plan, write_end
from orchestrator.serving.served import Served
from orchestrator.storage import Storage, rollouts_log, version_location

pytestmark = pytest.mark.ray
LABELS = ("bad", "good", "so-so")


@pytest.fixture(scope="module")
def settings() -> Serving:
    return Serving(
        port=free_port(), max_replicas=1, cpus_per_replica=0.5, precision="fp32", latency_budget_ms=400, max_batch_size=4,
        rollout=Rollout(compare=0.5),
    )  # fmt: skip


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Storage:
    """Versions 1 and 2 are sound; what 3 answers is no number, and what 4 answers the opposite of 1."""
    storage = Storage(str(tmp_path_factory.mktemp("rollouts")))
    for version in (1, 2):
        publish_text_model(storage, "reviews", version, tiny_backbone)
    for version, source in ((3, 2), (4, 1)):
        model = load_model(storage.path(version_location("reviews", source)))
        with torch.no_grad():
            for weights in list(model.network.parameters())[0 if version == 3 else -2 :]:
                weights.mul_(float("nan") if version == 3 else -1.0)
        with storage.publish(version_location("reviews", version)) as folder:
            save_model(folder, model.network, model.encoder, LABELS, model.task)
    return storage


@pytest.fixture(scope="module")
def serving(ray_session: object) -> Iterator[None]:
    from orchestrator.serving.on_ray import shutdown

    yield
    shutdown()


@pytest.fixture
def endpoint(serving: None, settings: Serving, storage: Storage) -> str:
    """Where version 1 answers alone."""
    from orchestrator.serving.on_ray import deploy

    return deploy(served(storage, settings, 1))


def served(storage: Storage, settings: Serving, version: int) -> Served:
    return Served("reviews", version, storage.url, version_location("reviews", version), settings)


def roll_out(storage: Storage, settings: Serving, version: int, mode: Any, share: float) -> Plan:
    from orchestrator.serving.on_ray import roll_out

    return roll_out(served(storage, settings, version), mode, share)


def until(true: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := true():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come to that")


def applications() -> set[str]:
    from ray import serve

    return {app for app, status in serve.status().applications.items() if status.status != "DELETING"}


class Crowd(Load):
    """Clients with a text of their own for each request, so that a share of them goes each way."""

    def _ask(self) -> None:
        number = 0
        while not self.stopped.is_set():
            number += 1
            try:
                self.answers.append(ask(self.url, {"instances": [f"text {number} of {id(self)}"]}))
            except OSError as error:
                self.answers.append((0, {"error": repr(error)}, {}))
            time.sleep(0.01)

    def versions(self) -> list[str]:
        return [answer[1].get("model_version", "") for answer in self.answers]


def test_a_canary_answers_its_share_and_is_promoted_by_hand(endpoint: str, storage: Storage, settings: Serving) -> None:
    from orchestrator.serving.on_ray import deploy

    with Crowd(f"{endpoint}/v1/models/reviews:predict") as crowd:
        roll_out(storage, settings, 2, "canary", 0.4)
        until(lambda: crowd.versions().count("2") > 20)
        told = ask(f"{endpoint}/v1/models/reviews/rollout")[1]
        before = len(crowd.answers)
        until(lambda: len(crowd.answers) > before + 100)
        share = crowd.versions()[before:].count("2") / len(crowd.versions()[before:])
        wanted = ask(f"{endpoint}/v2/models/reviews/versions/2/infer", infer("a text"))
        deploy(served(storage, settings, 2))
        time.sleep(1.5)
    assert crowd.failed() == []
    assert 0.15 < share < 0.65
    assert (told["candidate_version"], told["mode"], told["end"]) == ("2", "canary", None)
    assert told["candidate"]["requests"] > 0 and told["agreement"]["trials"] > 0
    assert (wanted[0], wanted[1]["model_version"]) == (200, "2"), "a version that is named answers itself"
    assert crowd.versions()[-1] == "2"
    assert applications() == {"gateway", "model-reviews"}
    plan = read_plan(storage, "reviews")
    assert plan is not None and getattr(read_end(storage, plan), "kind", None) == "promote"


def infer(text: str) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [text]}]}


def test_a_bad_version_under_load_takes_itself_back_without_a_failed_request(
    endpoint: str, storage: Storage, settings: Serving
) -> None:
    with Crowd(f"{endpoint}/v1/models/reviews:predict") as crowd:
        roll_out(storage, settings, 3, "canary", 0.5)
        plan = read_plan(storage, "reviews")
        assert plan is not None and plan.candidate == 3
        end = until(lambda: read_end(storage, plan))
        until(lambda: applications() == {"gateway", "model-reviews"})
    assert crowd.failed() == []
    assert set(crowd.versions()) == {"1"}, "and nobody ever saw it"
    assert (end.kind, end.by) == ("rollback", "the gateway")
    assert "the candidate failed" in end.reason
    told = ask(f"{endpoint}/v1/models/reviews/rollout")[1]
    assert told["end"]["kind"] == "rollback" and told["candidate"]["errors"]["hits"] > 5
    log = [json.loads(line) for line in storage.path(f"{rollouts_log()}.jsonl").read_text().splitlines()]
    assert [(line["action"], line["by"]) for line in log[-2:]][1] == ("rollback", "the gateway")


def test_a_version_that_does_not_answer_as_evaluated_gets_no_request(
    endpoint: str, storage: Storage, settings: Serving
) -> None:
    from orchestrator.serving.on_ray import roll_out

    known = [{"input": f"text {n}", "scores": {"bad": 1.0, "good": 0.0, "so-so": 0.0}} for n in range(8)]
    told = pytest.raises(ServingFailed, match="are no predictions of reviews")
    with Crowd(f"{endpoint}/v1/models/reviews:predict") as crowd, told:
        roll_out(served(storage, settings, 3), "canary", 0.5, known=known)
    assert crowd.failed() == [] and set(crowd.versions()) == {"1"}
    until(lambda: applications() == {"gateway", "model-reviews"})


def test_a_person_takes_a_shadow_back(endpoint: str, storage: Storage, settings: Serving) -> None:
    with Crowd(f"{endpoint}/v1/models/reviews:predict") as crowd:
        roll_out(storage, settings, 2, "shadow", 1.0)
        until(lambda: ask(f"{endpoint}/v1/models/reviews/rollout")[1].get("agreement", {}).get("trials", 0) > 10)
        _, text = change_models(storage.url, None, ["rollback", "reviews"], "champion")
        until(lambda: applications() == {"gateway", "model-reviews"})
    assert text == "version 2 of reviews is taken back: an endpoint that runs asks version 1 alone within seconds"
    assert crowd.failed() == [] and set(crowd.versions()) == {"1"}


def test_the_way_back_from_a_promoted_version(endpoint: str, storage: Storage, settings: Serving) -> None:
    """It answers everybody, and does not answer for the version that is served again."""
    from orchestrator.serving.on_ray import deploy

    labels = {number: [max(zip(row, LABELS, strict=True))[1] for row in offline(storage, "reviews", number, TEXTS)]
              for number in (1, 4)}  # fmt: skip
    known = [{"input": text, "scores": {each: float(each == label) for each in LABELS}}
             for text, label, other in zip(TEXTS, *labels.values(), strict=True) if label != other]  # fmt: skip
    assert len(known) >= 5, "the versions differ"
    with Crowd(f"{endpoint}/v1/models/reviews:predict") as crowd:
        plan = roll_out(storage, settings, 4, "canary", 0.1)
        write_end(storage, plan, "promote", "by hand")
        until(lambda: crowd.versions()[-10:] == ["4"] * 10)
        with pytest.raises(ServingFailed, match="version 4 of reviews was promoted and answers everybody"):
            roll_out(storage, settings, 3, "canary", 0.1)
        deploy(served(storage, settings, 1), known=known)
        until(lambda: crowd.versions()[-10:] == ["1"] * 10)
    assert crowd.failed() == []
    assert applications() == {"gateway", "model-reviews"}


def test_commands_for_one_model_take_turns(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.serving import applications_on_ray
    from orchestrator.serving.applications_on_ray import one_at_a_time

    monkeypatch.setattr(applications_on_ray, "_TURN_S", 0.3)
    with one_at_a_time("model-reviews"):
        told = pytest.raises(ServingFailed, match="another command is changing model-reviews")
        with told, one_at_a_time("model-reviews"):
            raise AssertionError("two at a time")
        with one_at_a_time("model-shapes"):
            pass
    monkeypatch.undo()
    with one_at_a_time("model-reviews"):
        pass


@pytest.mark.parametrize(("version", "told"), [(1, "version 1 of reviews already answers")])
def test_what_cannot_be_rolled_out(endpoint: str, storage: Storage, settings: Serving, version: int, told: str) -> None:
    with pytest.raises(ServingFailed, match=told):
        roll_out(storage, settings, version, "canary", 0.5)
