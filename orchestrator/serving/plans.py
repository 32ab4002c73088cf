"""Rollouts as files: what was wished, what was counted, how each ended, and the log of it all.

In: a plan, counts, an end. Out: the same, read again by a gateway or by a later command. Commands write plans, gateways count,
each in a file of its own, and whoever is first ends a rollout. Knows neither Ray nor HTTP.
"""

from __future__ import annotations

import getpass
import json
import logging
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
from orchestrator.serving.prediction_files import files_in, read_bytes
from orchestrator.serving.rollout import Arm, Mode, Policy
from orchestrator.storage import Storage, rollout_location, rollouts_log

log = logging.getLogger(__name__)
GATEWAY = "the gateway"
"""By whom a rollout ended that no person ended."""


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
    request_timeout_s: float = Serving().request_timeout_s
    checked: bool = True
    """Whether the candidate has given its known answers; until then no client's request goes there."""
    settled: bool = False
    """Nothing of it runs any more: a version was deployed since it began, or the model was taken off the endpoint."""

    @property
    def policy(self) -> Policy:
        return Policy(self.mode, self.share, self.latency_budget_ms, self.terms)


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
    registry: str | None = None, checked: bool = True,
) -> Plan:  # fmt: skip
    """A new rollout; or other terms for the one that is under way with the same two versions, which stays as ``checked`` as it
    is."""
    before = read_plan(storage, name)
    same = before is not None and (before.stable, before.candidate, before.mode) == (stable, candidate, mode)
    if before is not None and same and read_end(storage, before) is None:
        number, checked = before.id, before.checked
    else:
        number = uuid.uuid4().hex[:12]
    plan = Plan(id=number, name=name, stable=stable, candidate=candidate, mode=mode, share=share,
                latency_budget_ms=goals.latency_budget_ms, terms=goals.rollout, registry=registry,
                started=now(), request_timeout_s=goals.request_timeout_s, checked=checked)  # fmt: skip
    _write(storage, plan)
    told = {"mode": mode, "share": share, "stable": stable, "candidate": candidate}
    log_event(storage, name, "start" if number != getattr(before, "id", None) else "change", _person(), told)
    return plan


def mark_checked(storage: Storage, plan: Plan) -> None:
    """From the gateways' next look on, clients' requests go to the candidate. Nothing if another rollout was started
    meanwhile."""
    there = read_plan(storage, plan.name)
    if there is not None and there.id == plan.id:
        _write(storage, there.model_copy(update={"checked": True}))


def mark_settled(storage: Storage, plan: Plan) -> None:
    _write(storage, plan.model_copy(update={"settled": True}))


def _write(storage: Storage, plan: Plan) -> None:
    storage.write_json(f"{rollout_location(plan.name)}/plan.json", plan.model_dump(mode="json"))


def read_plan(storage: Storage, name: str) -> Plan | None:
    """The rollout that was started last, whether or not it has ended."""
    values = storage.read_json(f"{rollout_location(name)}/plan.json")
    return None if values is None else Plan.model_validate(values)


def write_end(
    storage: Storage, plan: Plan, kind: Literal["rollback", "promote"], reason: str, by: str | None = None
) -> End:
    """End it, unless it has ended: how it ended first is how it ended, but for a rollback, which stands over a promotion too.
    Returns the end that stands. ``by``: None for the person who runs this."""
    earlier = read_end(storage, plan)
    if earlier is not None and (earlier.kind == "rollback" or kind == "promote"):
        return earlier
    end = End(kind=kind, reason=reason, by=by or _person(), time=now())
    storage.write_json(_end_file(plan, kind), end.model_dump())
    log_event(storage, plan.name, kind, end.by, {"stable": plan.stable, "candidate": plan.candidate, "reason": reason})
    return read_end(storage, plan) or end


def _end_file(plan: Plan, kind: str) -> str:
    """A rollback has one of its own, so that it stands whichever of two who end it at a time writes last."""
    return f"{rollout_location(plan.name)}/{plan.id}/{'rollback' if kind == 'rollback' else 'end'}.json"


def read_end(storage: Storage, plan: Plan) -> End | None:
    for kind in ("rollback", "promote"):
        if (values := storage.read_json(_end_file(plan, kind))) is not None:
            return End.model_validate(values)
    return None


def move_champion(storage: Storage, plan: Plan, end: End) -> None:
    """Point the alias at the version that answers after this end, if it points at the other one; once: whoever moves it
    afterwards is heard.

    Raises:
        ConflictError: it points at a third version.
        ModelNotFound: the registry does not know the model, or it has no champion.
        UserError: the registry cannot be opened; a database that is locked is one of those.
    """
    registry = Registry(storage, plan.registry)
    try:
        old, new = plan.stable, plan.candidate
        if end.kind == "rollback":
            old, new = new, old
        reason = f"{end.kind} of rollout {plan.id}: {end.reason}"
        done = any(line.reason == reason for line in registry.audit(plan.name))
        if not done and registry.get(plan.name, CHAMPION).version != new:
            action = "rollback" if end.kind == "rollback" else "alias"
            registry.set_alias(plan.name, CHAMPION, new, reason, expected=old, action=action)
    finally:
        registry.engine.dispose()


def write_counts(storage: Storage, plan: Plan, part: str, stable: dict[str, Any], candidate: dict[str, Any]) -> None:
    """``part``: who counted; it overwrites what the same one wrote before."""
    storage.write_json(f"{_counts(plan)}/{part}.json", {"stable": stable, "candidate": candidate})


def read_counts(storage: Storage, plan: Plan, but: str = "") -> tuple[Arm, Arm]:
    """Of the stable version and of the candidate, by all who counted but one; of a rollout that has just begun, nothing. A file
    that cannot be read is left out, and a warning names it."""
    stable, candidate = Arm(), Arm()
    for file in files_in(storage, _counts(plan), ".json"):
        if file == f"{_counts(plan)}/{but}.json":
            continue
        try:
            values = json.loads(read_bytes(storage, file))
            arms = Arm.from_json(values["stable"]), Arm.from_json(values["candidate"])
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged and left out: %r", storage.place(file), error)
            continue
        stable, candidate = stable.merged(arms[0]), candidate.merged(arms[1])
    return stable, candidate


def _counts(plan: Plan) -> str:
    return f"{rollout_location(plan.name)}/{plan.id}/counts"


def log_event(storage: Storage, name: str, action: str, by: str, told: dict[str, Any]) -> None:
    """One line in the log of rollouts."""
    append_entry(storage, rollouts_log(), {"time": now(), "model": name, "action": action, "by": by} | told)


def _person() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        return f"uid {os.getuid()}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
