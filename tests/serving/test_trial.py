"""A rollout at one gateway: who answers, what is counted, and that no client ever gets a failure of the candidate."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import UserError
from orchestrator.recipe_serving import Rollout, Serving
from orchestrator.records import VersionRecord
from orchestrator.registry.store import CHAMPION, Registry
from orchestrator.serving import trial as trial_module
from orchestrator.serving.contract import Answers, ApiError, Caller, Input
from orchestrator.serving.gateway import overloaded
from orchestrator.serving.plans import (
    Plan,
    parse_share,
    read_counts,
    read_end,
    read_plan,
    write_end,
    write_plan,
)
from orchestrator.serving.trial import Ask, Trial
from orchestrator.storage import Storage, rollouts_log

EVERYBODY = [Caller(f"client {n}", f"request-{n}") for n in range(200)]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def planned(storage: Storage, mode: Any = "canary", share: float = 0.5, **terms: Any) -> Plan:
    goals = Serving(latency_budget_ms=50, rollout=Rollout(**terms))
    return write_plan(storage, "reviews", 1, 2, mode, share, goals)


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
    end = trial.look(storage)
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
    assert trial.look(storage) is None, "it does no harm"
    told = trial.report()
    assert told["agreement"]["rate"] == 0.0 and "would be rolled back" in told["verdict"]["reason"]


def test_a_canary_that_disagrees_too_often_is_taken_back(storage: Storage) -> None:
    trial = Trial.load(storage, planned(storage, min_agreement=0.9, compare=1.0))
    versions(trial, answering("1"), answering("2", label="bad"))
    end = trial.look(storage)
    assert end is not None and end.kind == "rollback" and "agreed with the stable version on 0 of" in end.reason


def test_a_canary_that_nothing_speaks_against_answers_everybody(storage: Storage) -> None:
    trial = Trial.load(storage, planned(storage, promote_after=50))
    versions(trial, answering("1"), answering("2"))
    end = trial.look(storage)
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
    trial.look(storage)
    assert registry.get("reviews", CHAMPION).version == 2
    line = registry.audit("reviews")[-1]
    assert (line.version, line.previous) == (2, 1) and "nothing speaks against" in line.reason
    trial.look(storage)
    assert registry.audit("reviews")[-1] == line, "once"


def test_a_champion_that_somebody_chose_meanwhile_stays(
    storage: Storage, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    trial = Trial.load(storage, planned(storage, promote_after=50))
    registry.set_alias("reviews", CHAMPION, 3, "by hand")
    versions(trial, answering("1"), answering("2"))
    end = trial.look(storage)
    assert end is not None and end.kind == "promote"
    assert registry.get("reviews", CHAMPION).version == 3 and "cannot make version 2 of reviews champion" in caplog.text


def test_feedback_decides_between_two_versions(storage: Storage) -> None:
    trial = Trial.load(storage, planned(storage, "ab", compare=0.0))
    got = versions(trial, answering("1", label="bad"), answering("2", label="good"))
    for caller in EVERYBODY:
        trial.tell(caller.request_id, 0, "good")
    trial.tell("never-seen", 0, "good")
    trial.tell(EVERYBODY[0].request_id, 7, "good")
    assert (trial.candidate.told, trial.candidate.right) == (got.count("2"),) * 2
    assert (trial.stable.told, trial.stable.right) == (got.count("1"), 0)
    end = trial.look(storage)
    assert end is not None and end.kind == "promote"


def test_counts_outlive_the_gateway(storage: Storage) -> None:
    plan = planned(storage, compare=0.0)
    trial = Trial.load(storage, plan)
    versions(trial, answering("1"), answering("2"))
    trial.save(storage)
    again = Trial.load(storage, plan)
    assert (again.stable, again.candidate, again.end) == (trial.stable, trial.candidate, None)
    assert read_counts(storage, plan)[1].requests == trial.candidate.requests > 0


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


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("0.25", 0.25), ("100%", 1.0), (" 5% ", 0.05)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["0", "101%", "1.5", "-3%", "ten", "", "%", "nan"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(UserError, match="is no share of the requests"):
        parse_share(text)
