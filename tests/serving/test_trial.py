"""A rollout at one gateway: who answers, what is counted, and that no client ever gets a failure of the candidate."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import DiskFull, UserError
from orchestrator.recipe_serving import Rollout, Serving
from orchestrator.records import VersionRecord
from orchestrator.registry.store import CHAMPION, Registry
from orchestrator.serving import plans
from orchestrator.serving import trial as trial_module
from orchestrator.serving.contract import Answers, ApiError, Caller, Input
from orchestrator.serving.gateway import overloaded
from orchestrator.serving.plans import (
    End,
    Plan,
    mark_checked,
    parse_share,
    read_counts,
    read_end,
    read_plan,
    write_end,
    write_plan,
)
from orchestrator.serving.rollout import Arm
from orchestrator.serving.trial import Ask, Trial
from orchestrator.storage import Storage, rollout_location, rollouts_log

EVERYBODY = [Caller(f"client {n}", f"request-{n}") for n in range(200)]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def planned(
    storage: Storage, mode: Any = "canary", share: float = 0.5, checked: bool = True, timeout_s: float = 30.0,
    **terms: Any,
) -> Plan:  # fmt: skip
    goals = Serving(latency_budget_ms=50, request_timeout_s=timeout_s, rollout=Rollout(**terms))
    return write_plan(storage, "reviews", 1, 2, mode, share, goals, checked=checked)


def answering(version: str, label: str = "good", unreadable: dict[int, str] | None = None) -> Ask:
    async def ask(inputs: Sequence[Input]) -> Answers:
        outputs = [{"label": label, "scores": {}} for _ in inputs]
        return Answers(version=version, outputs=outputs, unreadable=unreadable or {})

    return ask


def failing(how: Callable[[], Awaitable[Any]]) -> Ask:
    async def ask(inputs: Sequence[Input]) -> Answers:
        await how()
        raise AssertionError

    return ask


def versions(trial: Trial, stable: Ask, candidate: Ask, callers: Sequence[Caller] = EVERYBODY) -> list[str]:
    async def scenario() -> list[str]:
        answers = [await trial.predict(stable, candidate, ["a"], caller) for caller in callers]
        await asyncio.gather(*trial.background)
        return [answer.version for answer in answers]

    return asyncio.run(scenario())


def look(trial: Trial, storage: Storage) -> End | None:
    return asyncio.run(trial.look(storage))


async def crash() -> None:
    raise RuntimeError("no such layer")


async def refuse() -> None:
    raise overloaded("busy")


async def hang() -> None:
    await asyncio.sleep(60)


def test_a_share_of_the_clients_gets_the_candidate_and_stays_with_it(storage: Storage) -> None:
    trial = Trial.load(storage, planned(storage, share=0.3, compare=0.0))
    first = versions(trial, answering("1"), answering("2"))
    assert 30 < first.count("2") < 90
    assert versions(trial, answering("1"), answering("2")) == first
    trial.plan = planned(storage, share=0.6, compare=0.0)
    more = versions(trial, answering("1"), answering("2"))
    assert more.count("2") > first.count("2")
    assert all(after == "2" for before, after in zip(first, more, strict=True) if before == "2")


@pytest.mark.parametrize("how", [crash, refuse, hang])
def test_whoever_the_candidate_fails_gets_the_stable_version(
    storage: Storage, how: Callable[[], Awaitable[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_module, "_LEAST_PATIENCE_S", 0.0)
    monkeypatch.setattr(trial_module, "_PATIENCE_BUDGETS", 0.1)
    trial = Trial.load(storage, planned(storage))
    assert set(versions(trial, answering("1"), failing(how))) == {"1"}
    assert trial.candidate.errors == trial.candidate.requests > 50
    assert trial.stable.errors == 0
    end = look(trial, storage)
    assert end is not None and (end.kind, end.by) == ("rollback", "the gateway")
    asked_before = trial.candidate.requests
    versions(trial, answering("1"), failing(how))
    assert trial.candidate.requests == asked_before, "it is asked no more"


def test_numbers_that_are_not_finite_are_the_candidates_fault_and_unreadable_inputs_are_not(storage: Storage) -> None:
    trial = Trial.load(storage, planned(storage, share=1.0, compare=0.0))
    assert set(versions(trial, answering("1"), answering("2", unreadable={0: "is not finite"}))) == {"1"}
    assert trial.candidate.errors == len(EVERYBODY)
    trial = Trial.load(storage, planned(storage, share=1.0, compare=0.0))
    both = (answering("1", unreadable={0: "is no image"}), answering("2", unreadable={0: "is no image"}))
    assert set(versions(trial, *both)) == {"2"}
    assert trial.candidate.errors == 0


def test_answers_that_are_too_few_are_a_failure(storage: Storage) -> None:
    async def short(inputs: Sequence[Input]) -> Answers:
        return Answers(version="2", outputs=[])

    trial = Trial.load(storage, planned(storage))
    assert set(versions(trial, answering("1"), short)) == {"1"}
    assert trial.candidate.errors > 0


def test_failures_of_the_stable_version_are_counted_and_raised(storage: Storage) -> None:
    trial = Trial.load(storage, planned(storage, share=0.01))
    with pytest.raises(ApiError):
        versions(trial, failing(refuse), answering("2"), EVERYBODY[:1])
    with pytest.raises(RuntimeError):
        versions(trial, failing(crash), answering("2"), EVERYBODY[:1])
    assert (trial.stable.requests, trial.stable.errors) == (2, 2)


def test_a_shadow_answers_nobody_and_is_compared(storage: Storage) -> None:
    trial = Trial.load(storage, planned(storage, "shadow", share=1.0, min_agreement=0.9))
    assert set(versions(trial, answering("1"), answering("2", label="bad"))) == {"1"}
    assert trial.candidate.compared == trial.candidate.disagreed > 0
    assert look(trial, storage) is None, "it does no harm"
    told = trial.report()
    assert told["agreement"]["rate"] == 0.0 and "would be rolled back" in told["verdict"]["reason"]


def test_a_canary_that_disagrees_too_often_is_taken_back(storage: Storage) -> None:
    trial = Trial.load(storage, planned(storage, min_agreement=0.9, compare=1.0))
    versions(trial, answering("1"), answering("2", label="bad"))
    end = look(trial, storage)
    assert end is not None and end.kind == "rollback" and "agreed with the stable version on 0 of" in end.reason


def test_a_canary_that_nothing_speaks_against_answers_everybody(storage: Storage) -> None:
    trial = Trial.load(storage, planned(storage, promote_after=50))
    versions(trial, answering("1"), answering("2"))
    end = look(trial, storage)
    assert end is not None and end.kind == "promote"
    assert set(versions(trial, answering("1"), answering("2"))) == {"2"}
    assert set(versions(trial, answering("1"), failing(crash))) == {"1"}, "and has the stable version behind it"


@pytest.fixture
def registry(storage: Storage, tmp_path: Path) -> Registry:
    """Versions 1, which is champion, 2 and 3."""
    registry = Registry(storage)
    for model in "abc":
        (tmp_path / model).mkdir()
        draft = VersionRecord(name="reviews", version=0, location="", model=model, dataset="d", evaluation="e", metrics={},
                              code_version="1", created_at="now", manifest_sha256="")  # fmt: skip
        registry.register(draft, {"model": tmp_path / model})
    registry.set_alias("reviews", CHAMPION, 1, "first")
    return registry


def test_whom_the_gateway_promotes_is_champion_for_whatever_is_served_next(
    storage: Storage, registry: Registry
) -> None:
    trial = Trial.load(storage, planned(storage, promote_after=50))
    versions(trial, answering("1"), answering("2"))
    look(trial, storage)
    assert registry.get("reviews", CHAMPION).version == 2
    line = registry.audit("reviews")[-1]
    assert (line.version, line.previous) == (2, 1) and "nothing speaks against" in line.reason
    look(trial, storage)
    assert registry.audit("reviews")[-1] == line, "once"


def test_the_alias_is_moved_as_soon_as_the_registry_lets_it(
    storage: Storage, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = Trial.load(storage, planned(storage, promote_after=50))
    versions(trial, answering("1"), answering("2"))
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "set_alias", locked)
        with pytest.raises(UserError, match="locked"):
            look(trial, storage)
    assert read_end(storage, trial.plan) is not None and registry.get("reviews", CHAMPION).version == 1
    again = Trial.load(storage, trial.plan)  # a gateway that was started again
    look(again, storage)
    assert registry.get("reviews", CHAMPION).version == 2
    registry.set_alias("reviews", CHAMPION, 1, "by hand")
    look(again, storage)
    look(Trial.load(storage, trial.plan), storage)
    assert registry.get("reviews", CHAMPION).version == 1, "once: whoever moves it afterwards is heard"


def locked(*_: Any, **__: Any) -> None:
    raise UserError("the registry's database cannot be opened (database is locked)", "see whether it runs")


def test_a_champion_whose_canary_is_taken_back_is_champion_no_more(
    storage: Storage, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.set_alias("reviews", CHAMPION, 2, "orchestrator promote")
    trial = Trial.load(storage, planned(storage))
    versions(trial, answering("1"), failing(crash))
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "set_alias", locked)
        with pytest.raises(UserError, match="locked"):
            look(trial, storage)
    end = look(trial, storage)
    assert end is not None and end.kind == "rollback" and registry.get("reviews", CHAMPION).version == 1
    registry.set_alias("reviews", CHAMPION, 3, "the next one")
    assert registry.rollback("reviews").version == 1, "the way back leads past the one that did harm"


def test_nor_does_a_rollback_by_hand_move_it_for_whoever_does_that(storage: Storage, registry: Registry) -> None:
    registry.set_alias("reviews", CHAMPION, 2, "by hand")
    plan = planned(storage)
    write_end(storage, plan, "rollback", "by hand", "ann")
    look(Trial.load(storage, plan), storage)
    assert registry.get("reviews", CHAMPION).version == 2


def test_a_champion_that_somebody_chose_meanwhile_stays(
    storage: Storage, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    trial = Trial.load(storage, planned(storage, promote_after=50))
    registry.set_alias("reviews", CHAMPION, 3, "by hand")
    versions(trial, answering("1"), answering("2"))
    end = look(trial, storage)
    assert end is not None and end.kind == "promote"
    assert registry.get("reviews", CHAMPION).version == 3 and "the champion of reviews stays what it is" in caplog.text


def test_feedback_decides_between_two_versions(storage: Storage) -> None:
    trial = Trial.load(storage, planned(storage, "ab", compare=0.0))
    got = versions(trial, answering("1", label="bad"), answering("2", label="good"))
    for caller in EVERYBODY:
        trial.tell(caller.request_id, 0, "good")
    trial.tell("never-seen", 0, "good")
    trial.tell(EVERYBODY[0].request_id, 7, "good")
    assert (trial.candidate.told, trial.candidate.right) == (got.count("2"),) * 2
    assert (trial.stable.told, trial.stable.right) == (got.count("1"), 0)
    end = look(trial, storage)
    assert end is not None and end.kind == "promote"


def test_what_is_said_again_of_an_answer_replaces_what_was_said_and_counts_once(storage: Storage) -> None:
    trial = Trial.load(storage, planned(storage, "ab", share=1.0, compare=0.0))
    versions(trial, answering("1"), answering("2", label="good"), EVERYBODY[:2])
    for _ in range(1000):
        trial.tell("request-0", 0, "good")
    trial.tell("request-1", 0, "good")
    assert (trial.candidate.told, trial.candidate.right) == (2, 2) and look(trial, storage) is None
    trial.tell("request-0", 0, "bad")
    assert (trial.candidate.told, trial.candidate.right) == (2, 1)


def test_counts_outlive_the_gateway(storage: Storage) -> None:
    plan = planned(storage, compare=0.0)
    before, asked = Arm(), 0
    for _ in range(3):
        trial = Trial.load(storage, plan)
        versions(trial, answering("1"), answering("2"))
        assert look(trial, storage) is None
        asked += trial.candidate.requests
        before = before.merged(trial.candidate)
        assert trial.report()["candidate"]["requests"] == asked > 50 * trial.candidate.errors
    assert read_counts(storage, plan)[1] == before and before.requests == asked


def test_gateways_judge_what_all_of_them_counted(storage: Storage) -> None:
    plan = planned(storage, compare=0.0, promote_after=120)
    doors = [Trial.load(storage, plan) for _ in range(2)]
    for door in doors:
        versions(door, answering("1"), answering("2"))
        assert door.candidate.requests < 120
        assert look(door, storage) is None
    assert {door.report()["candidate"]["requests"] for door in doors[1:]} == {2 * doors[0].candidate.requests}
    assert {look(doors[0], storage), look(doors[0], storage)} != {None}, "it has heard of the other's by now"
    end = look(doors[1], storage)
    assert end is not None and end.kind == "promote" and end == doors[0].end


def test_a_file_of_counts_that_is_damaged_is_left_out(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    plan = planned(storage, compare=0.0)
    trial = Trial.load(storage, plan)
    versions(trial, answering("1"), answering("2"))
    look(trial, storage)
    (kept,) = (storage.path(rollout_location("reviews")) / plan.id / "counts").iterdir()
    kept.with_name("other.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert read_counts(storage, plan)[1] == trial.candidate
    assert "other.json is damaged" in caplog.text


def test_a_plan_keeps_its_number_while_only_its_share_changes(storage: Storage) -> None:
    first = planned(storage, share=0.1)
    assert planned(storage, share=0.5).id == first.id
    write_end(storage, first, "rollback", "by hand")
    second = planned(storage, share=0.1)
    assert second.id != first.id and read_end(storage, second) is None
    assert read_plan(storage, "reviews") == second
    log = storage.path(f"{rollouts_log()}.jsonl").read_text().splitlines()
    assert [word for line in log for word in ("start", "change", "rollback") if f'"action": "{word}"' in line] == [
        "start", "change", "rollback", "start",
    ]  # fmt: skip


def test_how_it_ended_first_is_how_it_ended(storage: Storage) -> None:
    plan = planned(storage)
    first = write_end(storage, plan, "rollback", "it fails", "the gateway")
    assert write_end(storage, plan, "promote", "by hand") == first
    trial = Trial.load(storage, plan)
    assert trial.end == first and set(versions(trial, answering("1"), answering("2"))) == {"1"}


def test_a_rollback_stands_over_a_promotion_and_nothing_else_replaces_an_end(storage: Storage) -> None:
    plan = planned(storage, promote_after=50)
    trial = Trial.load(storage, plan)
    versions(trial, answering("1"), answering("2"))
    look(trial, storage)
    assert set(versions(trial, answering("1"), answering("2"))) == {"2"}
    end = write_end(storage, plan, "rollback", "by hand", "ann")
    assert (end.kind, end.by) == ("rollback", "ann")
    assert look(trial, storage) == end and set(versions(trial, answering("1"), answering("2"))) == {"1"}
    for kind in ("promote", "rollback"):
        assert write_end(storage, plan, kind, "again", "bob") == end  # type: ignore[arg-type]


def test_of_a_rollback_and_a_promotion_at_once_the_rollback_stands(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(storage)
    unknowing = iter([None])  # the gateway sees no end before it writes its own
    monkeypatch.setattr(plans, "read_end", lambda *_: next(unknowing, None) or read_end(storage, plan))
    by_hand = write_end(storage, plan, "rollback", "by hand", "ann")
    unknowing = iter([None])
    assert by_hand.kind == "rollback" == write_end(storage, plan, "promote", "it does well", "the gateway").kind
    assert read_end(storage, plan) == by_hand


class Full(Storage):
    """Whose disk takes nothing."""

    def write_json(self, location: str, value: Any) -> None:
        raise DiskFull(f"no room to write {location}", "free some")


def test_a_full_disk_keeps_no_bad_version(storage: Storage) -> None:
    plan, full = planned(storage), Full(storage.url)
    trial = Trial.load(storage, plan)
    versions(trial, answering("1"), failing(crash))
    for _ in range(2):
        with pytest.raises(DiskFull):
            look(trial, full)
        asked = trial.candidate.requests
        versions(trial, answering("1"), failing(crash))
        assert trial.candidate.requests == asked, "it is asked no more, though nobody could write why"
    end = look(trial, storage)
    assert end is not None and end.kind == "rollback" and read_end(storage, plan) == end
    assert read_counts(storage, plan)[1] == trial.candidate


@pytest.mark.parametrize("mode", ["canary", "shadow", "ab"])
def test_nobody_is_sent_to_a_candidate_that_was_not_checked(storage: Storage, mode: Any) -> None:
    plan = planned(storage, mode, share=1.0, compare=1.0, checked=False)
    trial = Trial.load(storage, plan)
    assert set(versions(trial, answering("1"), failing(crash))) == {"1"}
    assert (trial.stable, trial.candidate, trial.answered) == (Arm(), Arm(), {})
    assert not planned(storage, mode, share=0.9, checked=True).checked, "another share is no check"
    mark_checked(storage, plan)
    now = read_plan(storage, "reviews")
    assert now is not None and (now.id, now.share, now.checked) == (plan.id, 0.9, True)
    trial.plan = now
    versions(trial, answering("1"), answering("2"))
    assert trial.candidate.requests > 0
    other = planned(storage, "ab" if mode == "canary" else "canary", checked=False)
    mark_checked(storage, plan)
    assert read_plan(storage, "reviews") == other


def test_plans_of_before_are_checked(storage: Storage) -> None:
    values = planned(storage).model_dump(mode="json", exclude={"checked", "request_timeout_s"})
    storage.write_json(f"{rollout_location('reviews')}/plan.json", values)
    plan = read_plan(storage, "reviews")
    assert plan is not None and plan.checked


def test_a_candidate_that_hangs_is_found_before_the_clients_time_is_over(storage: Storage) -> None:
    trial = Trial.load(storage, planned(storage, share=1.0, compare=0.0, timeout_s=0.4))

    async def scenario() -> str:
        async with asyncio.timeout(0.4):
            return (await trial.predict(answering("1"), failing(hang), ["a"], EVERYBODY[0])).version

    assert asyncio.run(scenario()) == "1" and trial.candidate.errors == 1


@pytest.mark.parametrize("share", [1.0, 0.01])
def test_who_hangs_up_after_the_budget_tells_a_failure_and_before_it_nothing(storage: Storage, share: float) -> None:
    trial = Trial.load(storage, planned(storage, share=share, compare=0.0))
    arm = trial.candidate if share == 1.0 else trial.stable

    async def scenario(seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await trial.predict(failing(hang), failing(hang), ["a"], EVERYBODY[0])

    asyncio.run(scenario(0.001))
    assert arm.requests == 0
    asyncio.run(scenario(0.1))
    assert (arm.requests, arm.errors) == (1, 1)


def test_a_shadow_whose_answers_are_no_numbers_fails(storage: Storage) -> None:
    trial = Trial.load(storage, planned(storage, "shadow", share=1.0))
    assert set(versions(trial, answering("1"), answering("2", unreadable={0: "is not finite"}))) == {"1"}
    assert trial.candidate.errors == trial.candidate.requests > 0 == trial.candidate.compared
    assert "would be rolled back" in trial.report()["verdict"]["reason"]


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("0.25", 0.25), ("100%", 1.0), (" 5% ", 0.05)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0", "101%", "1.5", "-3%", "ten", "", "%", "nan"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(UserError, match="is no share of the requests"):
        parse_share(text)
