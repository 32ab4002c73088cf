"""Bringing versions to an endpoint whose Serve is made up: what stays when something fails, and who is asked meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import ServingFailed
from orchestrator.progress import Event
from orchestrator.recipe_serving import Listen, Serving, Shelf
from orchestrator.serving import on_ray, shelving_on_ray
from orchestrator.serving.plans import Plan, read_end, read_plan, write_end, write_plan
from orchestrator.serving.served import Served
from orchestrator.storage import Storage


class FakeServe:
    """Applications by name, each with the version that it is made from. Versions in ``broken`` do not start."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.apps: dict[str, Served] = {}
        self.broken: set[int] = set()
        self.locked: list[str] = []
        self.on_check: Callable[[], None] = lambda: None
        for name in ("submit", "wait_running", "delete", "applications", "described_model", "one_at_a_time"):
            monkeypatch.setattr(on_ray, name, getattr(self, name))
        monkeypatch.setattr(on_ray, "on_shelf", dict)
        monkeypatch.setattr(on_ray, "take_off_shelf", lambda name: False)
        monkeypatch.setattr(on_ray, "has_room", lambda served: True)
        monkeypatch.setattr(on_ray, "model_app", lambda served: served)
        monkeypatch.setattr(on_ray, "_start", lambda settings, report: "http://127.0.0.1:1")
        monkeypatch.setattr(on_ray, "_check_endpoint", lambda served, url, known: self.on_check())
        monkeypatch.setattr(on_ray, "asked_directly", lambda *_: None)
        monkeypatch.setattr(on_ray, "check_known_answers", lambda *_: self.on_check())

    def submit(self, app: str, target: Served) -> None:
        self.apps[app] = target

    def wait_running(self, app: str) -> None:
        if app in self.apps and self.apps[app].version in self.broken:
            raise ServingFailed(f"{app} did not start")

    def delete(self, *apps: str) -> bool:
        return len([self.apps.pop(app) for app in apps if app in self.apps]) > 0

    def applications(self) -> dict[str, Any]:
        return dict(self.apps)

    def described_model(self, app: str) -> Served | None:
        return self.apps.get(app)

    @contextlib.contextmanager
    def one_at_a_time(self, what: str) -> Iterator[None]:
        self.locked.append(what)
        yield


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    return FakeServe(monkeypatch)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def version(storage: Storage) -> Callable[[int], Served]:
    return lambda number: Served("reviews", number, storage.url, f"m/{number}", Serving(min_replicas=0))


Version = Callable[[int], Served]


def planned(storage: Storage, stable: int, candidate: int) -> Plan:
    return write_plan(storage, "reviews", stable, candidate, "canary", 0.1, Serving())


def test_what_fails_is_taken_away_and_a_canary_beside_it_stays(there: FakeServe, version: Version) -> None:
    there.apps["candidate-reviews"] = version(4)
    there.broken = {3}
    with pytest.raises(ServingFailed, match="did not start"):
        on_ray.deploy(version(3))
    assert there.apps == {"candidate-reviews": version(4)}
    assert there.locked == ["model-reviews"]


def test_what_answered_before_goes_on_answering_and_that_is_said_once_it_is_so(
    there: FakeServe, version: Version
) -> None:
    there.apps["model-reviews"] = version(2)
    there.broken, told = {3}, list[tuple[str, int]]()

    def report(event: Event) -> None:
        told.append((event.message or "", there.apps["model-reviews"].version))

    with pytest.raises(ServingFailed, match="did not start"):
        on_ray.deploy(version(3), report)
    assert told[-1] == ("reviews version 2 goes on answering", 2)
    there.broken = {2, 3}
    with pytest.raises(ServingFailed, match="did not start"):
        on_ray.deploy(version(3), report)
    assert told[-1][0].startswith("what answered before could not be put back: model-reviews did not start")


def test_a_version_that_does_not_say_what_it_is_is_not_replaced(
    there: FakeServe, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(app: str) -> None:
        raise ServingFailed(f"{app} runs here and does not say which version it is")

    there.apps["model-reviews"] = version(2)
    monkeypatch.setattr(on_ray, "described_model", silent)
    with pytest.raises(ServingFailed, match="does not say which version"):
        on_ray.deploy(version(3))
    assert there.apps == {"model-reviews": version(2)}


def test_no_client_is_sent_to_a_candidate_before_it_has_given_its_known_answers(
    there: FakeServe, version: Version, storage: Storage
) -> None:
    there.apps["model-reviews"] = version(2)
    seen = list[tuple[bool, int]]()

    def look() -> None:
        plan = read_plan(storage, "reviews")
        assert plan is not None
        seen.append((plan.checked, there.apps["candidate-reviews"].settings.min_replicas))

    there.on_check = look
    plan = on_ray.roll_out(version(4), "canary", 0.1)
    assert seen == [(False, 1)], "and it is awake, although the recipe lets replicas go"
    assert read_plan(storage, "reviews") == plan and plan.checked
    assert on_ray.roll_out(version(4), "canary", 0.5).id == plan.id, "another share"
    assert len(seen) == 1 and there.locked == ["model-reviews"] * 2


def test_a_candidate_that_answers_wrongly_goes_and_the_stable_version_stays(
    there: FakeServe, version: Version, storage: Storage
) -> None:
    def wrong() -> None:
        raise ServingFailed("reviews does not answer as it did")

    there.apps["model-reviews"], there.on_check = version(2), wrong
    with pytest.raises(ServingFailed, match="does not answer as it did"):
        on_ray.roll_out(version(4), "canary", 0.1)
    assert there.apps == {"model-reviews": version(2)}
    plan = read_plan(storage, "reviews")
    assert plan is not None and not plan.checked
    assert getattr(read_end(storage, plan), "kind", None) == "rollback"


def test_nobody_is_sent_back_by_a_rollout_after_a_promotion(
    there: FakeServe, version: Version, storage: Storage
) -> None:
    there.apps |= {"model-reviews": version(2), "candidate-reviews": version(4)}
    plan = planned(storage, 2, 4)
    write_end(storage, plan, "promote", "by hand")
    for number in (4, 5):
        told = pytest.raises(ServingFailed, match="version 4 .* was promoted and answers everybody.*orchestrator serve")
        with told:
            on_ray.roll_out(version(number), "canary", 0.1)
    assert there.apps["candidate-reviews"] == version(4) and read_plan(storage, "reviews") == plan
    on_ray.deploy(version(4))
    assert there.apps == {"model-reviews": version(4)}
    assert on_ray.roll_out(version(5), "canary", 0.1).stable == 4


def test_another_candidate_ends_the_rollout_before_it(there: FakeServe, version: Version, storage: Storage) -> None:
    there.apps["model-reviews"] = version(2)
    before = on_ray.roll_out(version(4), "canary", 0.1)
    assert on_ray.roll_out(version(5), "canary", 0.1).candidate == 5
    assert getattr(read_end(storage, before), "reason", "") == "version 5 is started anew"


def test_a_rollout_that_was_taken_back_while_it_was_checked_stays_so(
    there: FakeServe, version: Version, storage: Storage
) -> None:
    def by_hand() -> None:
        plan = read_plan(storage, "reviews")
        assert plan is not None
        write_end(storage, plan, "rollback", "by hand")

    there.apps["model-reviews"], there.on_check = version(2), by_hand
    on_ray.roll_out(version(4), "canary", 0.1)
    plan = read_plan(storage, "reviews")
    assert plan is not None and read_end(storage, plan) is not None


def test_what_cannot_be_rolled_out_says_what_to_do(
    there: FakeServe, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ServingFailed, match="no version of reviews answers here: serve one first"):
        on_ray.roll_out(version(4), "canary", 0.1)
    there.apps["model-reviews"] = version(4)
    told = "version 4 of reviews already answers: name another with --version N, or train and `orchestrator promote"
    with pytest.raises(ServingFailed, match=told):
        on_ray.roll_out(version(4), "canary", 0.1)
    monkeypatch.setattr(on_ray, "has_room", lambda served: False)
    with pytest.raises(ServingFailed, match=r"lower serving\.max_replicas and serve again"):
        on_ray.roll_out(version(5), "canary", 0.1)


@pytest.mark.parametrize(("stable", "kind"), [(2, "rollback"), (4, "promote"), (5, "rollback")])
def test_a_deployment_settles_what_was_rolled_out(
    there: FakeServe, version: Version, storage: Storage, stable: int, kind: str
) -> None:
    """Going back to the version before after a promotion overrules it; the same end is not written twice."""
    there.apps |= {"model-reviews": version(2), "candidate-reviews": version(4)}
    plan = planned(storage, 2, 4)
    write_end(storage, plan, "promote", "by hand")
    on_ray.deploy(version(stable))
    there_now = read_plan(storage, "reviews")
    assert there_now is not None and there_now.settled
    assert getattr(read_end(storage, plan), "kind", None) == kind
    assert there.apps == {"model-reviews": version(stable)}


def test_what_a_running_endpoint_does_not_take_over_is_named() -> None:
    there = Listen(port=8000)
    assert on_ray._ignored(Listen(port=8000), there) == ""
    told = on_ray._ignored(Listen(port=8000, request_log="/var/log/a", open_to_network=True), there)
    assert "serving.open_to_network, serving.request_log stay as they are" in told and "serving.port" not in told


# ---------------------------------------------------------------------------------------------------------- the shelf


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What stands there, with its terms; the key ``apps`` is missing when there is no shelf."""
    there: dict[str, Any] = {}

    def fill(terms: Shelf, models: dict[str, Served]) -> None:
        there["shelf"] = terms, list(models.values())

    def load(served: Served, before: Served | None, known: object) -> None:
        if served.version == 3:
            raise ServingFailed("it takes 9 MB", "raise serving.shelf.bytes")

    monkeypatch.setattr(shelving_on_ray, "one_at_a_time", lambda what: contextlib.nullcontext())
    monkeypatch.setattr(shelving_on_ray, "applications", lambda: there)
    monkeypatch.setattr(shelving_on_ray, "described", lambda app, method: there.get(app))
    monkeypatch.setattr(shelving_on_ray, "called", lambda app, method, *_: there[app])
    monkeypatch.setattr(shelving_on_ray, "delete", lambda *apps: [there.pop(app, None) for app in apps])
    monkeypatch.setattr(shelving_on_ray, "_fill_shelf", fill)
    monkeypatch.setattr(shelving_on_ray, "_load_on_shelf", load)
    monkeypatch.setattr(shelving_on_ray, "wait_running", lambda app: None)
    monkeypatch.setattr(shelving_on_ray, "wait_places", lambda name, right: None)
    return there


def shared(name: str, number: int, **terms: int) -> Served:
    return Served(name, number, "/nowhere", "m", Serving.model_validate({"shared": True, "shelf": terms}))


def nothing(event: object) -> None:
    pass


def test_a_shelf_that_stands_empty_goes(shelf: dict[str, Any]) -> None:
    with pytest.raises(ServingFailed, match="it takes 9 MB"):
        shelving_on_ray.put_on_shelf(shared("a", 3), nothing, ())
    assert shelf == {}, "its CPUs are free again"
    shelving_on_ray.put_on_shelf(shared("a", 1), nothing, ())
    shelving_on_ray.put_on_shelf(shared("b", 1), nothing, ())
    with pytest.raises(ServingFailed, match="it takes 9 MB"):
        shelving_on_ray.put_on_shelf(shared("c", 3), nothing, ())
    assert sorted(shelving_on_ray.on_shelf()) == ["a", "b"]
    assert shelving_on_ray.take_off_shelf("a") and not shelving_on_ray.take_off_shelf("a")
    assert shelving_on_ray.take_off_shelf("b") and shelf == {}


def test_a_shelf_takes_the_terms_that_a_recipe_names(shelf: dict[str, Any]) -> None:
    shelving_on_ray.put_on_shelf(shared("a", 1, bytes=5_000_000, max_replicas=2), nothing, ())
    shelving_on_ray.put_on_shelf(shared("b", 1), nothing, ())
    assert shelf["shelf"][0] == Shelf(bytes=5_000_000, max_replicas=2), "it keeps what is not named"
    shelving_on_ray.put_on_shelf(shared("c", 1, bytes=9_000_000), nothing, ())
    assert shelf["shelf"][0] == Shelf(bytes=9_000_000, max_replicas=2)
    with pytest.raises(ServingFailed, match=r"serving\.shelf does not go with .*min_replicas \(3\) must not exceed"):
        shelving_on_ray._merged(Shelf(max_replicas=2), shared("d", 1, min_replicas=3, max_replicas=3).settings.shelf
                                .model_copy(update={"max_replicas": 2}))  # fmt: skip


# --------------------------------------------------------------------------------------------------- one application


class Controller:
    """Says of one application what it is told to say, time after time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *states: tuple[str, int] | None) -> None:
        from orchestrator.serving import applications_on_ray

        self.module, self.states = applications_on_ray, list(states)
        self.deleted: list[tuple[str, bool]] = []
        monkeypatch.setattr(applications_on_ray.serve, "status", self.status)
        monkeypatch.setattr(
            applications_on_ray.serve, "delete", lambda app, _blocking: self.deleted.append((app, _blocking))
        )
        monkeypatch.setattr(applications_on_ray, "_POLL_S", 0.001)
        monkeypatch.setattr(applications_on_ray, "_WAKING_S", 0.2)

    def status(self) -> Any:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if state is None:
            return SimpleNamespace(applications={})
        deployment = SimpleNamespace(replica_states={"RUNNING": state[1]}, message="")
        status = SimpleNamespace(status=state[0], message="", deployments={"Model": deployment})
        return SimpleNamespace(applications={"model-reviews": status})

    def replica(self, monkeypatch: pytest.MonkeyPatch, *answers: Any) -> None:
        left = list(answers)

        def result(timeout_s: float) -> Any:
            answer = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(answer, Exception):
                raise answer
            return answer

        handle = SimpleNamespace(remote=lambda *_: SimpleNamespace(result=result), shutdown=lambda: None)
        handle.options = lambda **_: handle
        monkeypatch.setattr(self.module.serve, "get_app_handle", lambda app: handle)


def test_absent_is_told_from_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import RayActorError

    absent = Controller(monkeypatch, None)
    assert absent.module.described("model-reviews", "describe") is None
    asleep = Controller(monkeypatch, ("RUNNING", 0))
    asleep.replica(monkeypatch, RayActorError(), TimeoutError(), "version 2")
    assert asleep.module.described("model-reviews", "describe") == "version 2", "it was woken"
    silent = Controller(monkeypatch, ("RUNNING", 1))
    silent.replica(monkeypatch, TimeoutError("too late"))
    with pytest.raises(ServingFailed, match="does not say which version it is .*too late.*--stop"):
        silent.module.described("model-reviews", "describe")
    never_came_up = Controller(monkeypatch, ("DEPLOYING", 0))
    assert never_came_up.module.described("model-reviews", "describe") is None
    leaving = Controller(monkeypatch, ("DELETING", 1))
    assert leaving.module.described("model-reviews", "describe") is None


def test_an_application_that_goes_while_it_is_waited_for_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    going = Controller(monkeypatch, ("DEPLOYING", 0), None)
    with pytest.raises(ServingFailed, match="was taken away while it started"):
        going.module.wait_running("model-reviews")


@pytest.mark.parametrize("error", ["RayActorError", "GetTimeoutError", "TimeoutError", "BackPressureError"])
def test_what_ray_raises_comes_out_as_a_failure_with_a_next_step(monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    from ray import exceptions
    from ray.serve.exceptions import BackPressureError

    raised = {"BackPressureError": BackPressureError(1, 1), "TimeoutError": TimeoutError()}
    there = Controller(monkeypatch, ("RUNNING", 1))
    there.replica(monkeypatch, raised[error] if error in raised else getattr(exceptions, error)())
    with pytest.raises(ServingFailed, match="model-reviews fails to answer .*: see `ray status`"):
        there.module.called("model-reviews", "describe", 1.0)


def test_a_deletion_waits_as_long_as_requests_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Controller(monkeypatch, *[("DELETING", 1)] * 5, None)
    assert there.module.delete("model-reviews") and there.states == [None]
    assert there.deleted == [("model-reviews", False)], "Serve itself would give up after a minute"
    assert not there.module.delete("model-reviews")
