"""Which version is tried beside the one that answers, and what `orchestrator models` does to a rollout: promoted, taken back,
taken back after it was promoted."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import ServingFailed
from orchestrator.recipe_serving import Serving
from orchestrator.records import VersionRecord
from orchestrator.registry.store import CHALLENGER, CHAMPION, Registry
from orchestrator.serve import change_models, choose_candidate, end_rollout
from orchestrator.serving.plans import Plan, mark_settled, read_end, read_plan, write_end, write_plan
from orchestrator.storage import Storage

BY_HAND = "orchestrator serve RECIPE brings it to the endpoint"


def record(version: int, *aliases: str) -> VersionRecord:
    return VersionRecord(name="reviews", version=version, location="", model=f"m{version}", dataset="d", evaluation="e",
                         metrics={}, code_version="1", created_at="now", manifest_sha256="", aliases=aliases)  # fmt: skip


@pytest.mark.parametrize(
    ("aliases", "stable", "chosen"),
    [
        ({3: CHALLENGER, 2: CHAMPION}, 2, 3),
        ({1: CHALLENGER, 3: CHAMPION}, 2, 3),  # held back long ago, and never cleared
        ({1: CHALLENGER, 2: CHAMPION}, 2, 4),
        ({2: CHALLENGER, 4: CHAMPION}, 2, 4),
        ({1: CHAMPION}, 4, 1),  # taken back in the registry, not yet on the endpoint
        ({}, 3, 4),
    ],
)
def test_the_candidate_is_a_newer_challenger_or_the_champion_or_the_newest(
    aliases: dict[int, str], stable: int, chosen: int
) -> None:
    versions = [record(number, *([aliases[number]] if number in aliases else [])) for number in (1, 2, 3, 4)]
    assert choose_candidate(versions, stable).version == chosen


def test_without_another_version_the_next_step_is_said() -> None:
    with pytest.raises(
        ServingFailed, match="version 2 answers already.*--version N, or train and `orchestrator promote"
    ):
        choose_candidate([record(1, CHALLENGER), record(2, CHAMPION)], 2)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Four versions of reviews; the second is champion, the first was it before."""
    storage, weights = Storage(str(tmp_path / "runs")), tmp_path / "weights"
    registry = Registry(storage)
    for number in (1, 2, 3, 4):
        weights.write_text(str(number))
        registry.register(record(number).model_copy(update={"version": 0}), {"weights": weights})
    for number in (1, 2):
        registry.set_alias("reviews", CHAMPION, number, "better")
    return storage


def rolled_out(storage: Storage) -> Plan:
    return write_plan(storage, "reviews", 2, 4, "canary", 0.1, Serving())


def said(storage: Storage, *words: str) -> str:
    return change_models(storage.url, None, words, CHAMPION)[1]


def champion(storage: Storage) -> int:
    return Registry(storage).get("reviews", CHAMPION).version


def end_of(storage: Storage, plan: Plan) -> str | None:
    return getattr(read_end(storage, plan), "kind", None)


def test_without_a_rollout_nothing_is_said_to_move_by_itself(storage: Storage) -> None:
    assert said(storage, "promote", "reviews", "4") == f"reviews version 4 is champion now; {BY_HAND}"
    assert said(storage, "rollback", "reviews") == f"reviews is back at version 2; {BY_HAND}"
    assert champion(storage) == 2


def test_the_candidate_is_promoted_and_taken_back_again(storage: Storage) -> None:
    plan = rolled_out(storage)
    text = said(storage, "promote", "reviews", "4")
    assert text.startswith("reviews version 4 is champion now; an endpoint that runs sends everybody to it")
    assert (champion(storage), end_of(storage, plan)) == (4, "promote")
    text = said(storage, "rollback", "reviews")
    assert text == (
        "reviews is back at version 2; version 4 of reviews is taken back: an endpoint that runs asks version 2 alone "
        "within seconds"
    )
    assert (champion(storage), end_of(storage, plan)) == (2, "rollback"), "the endpoint hears of it, too"
    assert said(storage, "rollback", "reviews") == f"reviews is back at version 1; {BY_HAND}"


def test_an_open_rollout_is_taken_back_and_the_alias_stays(storage: Storage) -> None:
    plan = rolled_out(storage)
    assert said(storage, "rollback", "reviews").startswith("version 4 of reviews is taken back")
    assert (champion(storage), end_of(storage, plan)) == (2, "rollback")
    text = said(storage, "promote", "reviews", "4")
    assert text == f"reviews version 4 is champion now; its rollout was taken back (by hand), so {BY_HAND}"


def test_another_version_than_the_candidate_is_promoted_by_hand_alone(storage: Storage) -> None:
    plan = rolled_out(storage)
    assert said(storage, "promote", "reviews", "3") == f"reviews version 3 is champion now; {BY_HAND}"
    assert end_of(storage, plan) is None


def test_a_rollout_that_is_over_is_left_alone(storage: Storage) -> None:
    """The candidate became the stable version: going back moves the alias, and the endpoint when it is served again."""
    plan = rolled_out(storage)
    said(storage, "promote", "reviews", "4")
    mark_settled(storage, plan)
    assert said(storage, "rollback", "reviews") == f"reviews is back at version 2; {BY_HAND}"
    assert end_of(storage, plan) == "promote"


def test_another_alias_ends_no_rollout(storage: Storage) -> None:
    plan = rolled_out(storage)
    assert change_models(storage.url, None, ["promote", "reviews", "4"], "spare")[1] == "reviews version 4 is spare now"
    assert end_of(storage, plan) is None


@pytest.mark.parametrize("kind", [None, "promote"])
def test_a_model_that_leaves_the_endpoint_ends_its_rollout(storage: Storage, kind: str | None) -> None:
    plan = rolled_out(storage)
    if kind == "promote":
        write_end(storage, plan, "promote", "by hand")
    end_rollout(storage, "reviews")
    assert end_of(storage, plan) == (kind or "rollback")
    there = read_plan(storage, "reviews")
    assert there is not None and there.settled
    end_rollout(storage, "none was rolled out")
