"""Rollouts as files: what was wished, what was counted, how each ended, and the log of it all.

In: a plan, counts, an end. Out: the same, read again by the gateway or by a later command. Commands write plans, the gateway
counts, and whoever is first ends a rollout. Knows neither Ray nor HTTP.
"""

from __future__ import annotations

import getpass
import os
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from orchestrator.errors import UserError
from orchestrator.recipe_serving import Rollout, Serving
from orchestrator.registry.store import CHAMPION, Registry
from orchestrator.serving.feedback import append_entry
from orchestrator.serving.rollout import Arm, Mode, Policy
from orchestrator.storage import Storage, rollout_location, rollouts_log


class Plan(BaseModel):
    """One version beside another. ``id`` stays the same when the share changes, so that callers stay where they are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    name: str
    stable: int
    candidate: int
    mode: Mode
    share: float
    latency_budget_ms: float
    terms: Rollout
    registry: str | None = None
    """SQLAlchemy URL; None: the SQLite file in the storage."""
    started: str

    @property
    def policy(self) -> Policy:
        terms = self.terms
        return Policy(self.mode, self.share, self.latency_budget_ms, terms.max_error_rate_rise, terms.max_slow_rise,
                      terms.min_agreement, terms.promote_after, terms.confidence)  # fmt: skip


class End(BaseModel):
    """How a rollout ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["rollback", "promote"]
    reason: str
    by: str
    time: str


def parse_share(text: str) -> float:
    """``10%`` or ``0.1``. Raises UserError for what is no share above 0 and up to 1."""
    number = text.strip().removesuffix("%")
    with suppress(ValueError):
        share = float(number) / (100 if number != text.strip() else 1)
        if 0.0 < share <= 1.0:
            return share
    raise UserError(f"{text!r} is no share of the requests", "give one such as 10% or 0.1")


def write_plan(
    storage: Storage, name: str, stable: int, candidate: int, mode: Mode, share: float, goals: Serving,
    registry: str | None = None,
) -> Plan:  # fmt: skip
    """A new rollout; or other terms for the one that is under way with the same two versions."""
    before = read_plan(storage, name)
    same = before is not None and (before.stable, before.candidate, before.mode) == (stable, candidate, mode)
    number = before.id if before is not None and same and read_end(storage, before) is None else uuid.uuid4().hex[:12]
    plan = Plan(id=number, name=name, stable=stable, candidate=candidate, mode=mode, share=share,
                latency_budget_ms=goals.latency_budget_ms, terms=goals.rollout, registry=registry,
                started=_now())  # fmt: skip
    storage.write_json(f"{rollout_location(name)}/plan.json", plan.model_dump(mode="json"))
    told = {"mode": mode, "share": share, "stable": stable, "candidate": candidate}
    log_event(storage, name, "start" if number != getattr(before, "id", None) else "change", _person(), told)
    return plan


def read_plan(storage: Storage, name: str) -> Plan | None:
    """The rollout that was started last, whether or not it has ended."""
    values = storage.read_json(f"{rollout_location(name)}/plan.json")
    return None if values is None else Plan.model_validate(values)


def write_end(
    storage: Storage, plan: Plan, kind: Literal["rollback", "promote"], reason: str, by: str | None = None
) -> End:
    """End it, unless it has ended: how it ended first is how it ended. ``by``: None for the person who runs this."""
    earlier = read_end(storage, plan)
    if earlier is not None:
        return earlier
    end = End(kind=kind, reason=reason, by=by or _person(), time=_now())
    storage.write_json(f"{rollout_location(plan.name)}/{plan.id}/end.json", end.model_dump())
    log_event(storage, plan.name, kind, end.by, {"stable": plan.stable, "candidate": plan.candidate, "reason": reason})
    return end


def read_end(storage: Storage, plan: Plan) -> End | None:
    values = storage.read_json(f"{rollout_location(plan.name)}/{plan.id}/end.json")
    return None if values is None else End.model_validate(values)


def make_champion(storage: Storage, plan: Plan, reason: str) -> None:
    """Point the alias at the candidate, if it still points at the stable version. Raises OrchestratorError if it does not, or
    if the registry does not know these versions."""
    registry = Registry(storage, plan.registry)
    if registry.get(plan.name, CHAMPION).version != plan.candidate:
        registry.set_alias(plan.name, CHAMPION, plan.candidate, reason, expected=plan.stable)


def write_counts(storage: Storage, plan: Plan, stable: Arm, candidate: Arm) -> None:
    counts = {"stable": stable.to_json(), "candidate": candidate.to_json()}
    storage.write_json(f"{rollout_location(plan.name)}/{plan.id}/counts.json", counts)


def read_counts(storage: Storage, plan: Plan) -> tuple[Arm, Arm]:
    """Of the stable version and of the candidate; of a rollout that has just begun, nothing."""
    values = storage.read_json(f"{rollout_location(plan.name)}/{plan.id}/counts.json")
    if values is None:
        return Arm(), Arm()
    return Arm.from_json(values["stable"]), Arm.from_json(values["candidate"])


def log_event(storage: Storage, name: str, action: str, by: str, told: dict[str, Any]) -> None:
    """One line in the log of rollouts."""
    append_entry(storage, rollouts_log(), {"time": _now(), "model": name, "action": action, "by": by} | told)


def _person() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        return f"uid {os.getuid()}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
