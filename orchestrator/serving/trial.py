"""A rollout under way, as one gateway sees it: which version answers a request, and what is counted of both.

In: a plan, and two functions that ask the stable version and the candidate. Out: answers, counts, a verdict. A client never
gets a failure of the candidate: the stable version is asked instead. Knows neither Ray nor HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import ConflictError, ModelNotFound
from orchestrator.serving.contract import Answers, ApiError, Caller, Input, Role
from orchestrator.serving.plans import (
    GATEWAY,
    End,
    Plan,
    move_champion,
    now,
    read_counts,
    read_end,
    write_counts,
    write_end,
)
from orchestrator.serving.rollout import Arm, goes_to_candidate, judge, report, sticky
from orchestrator.storage import Storage

log = logging.getLogger(__name__)
Ask = Callable[[Sequence[Input]], Awaitable[Answers]]
Tell = Callable[[Caller, Sequence[Input], Answers, float], None]
"""Of an answer, and the milliseconds that it took."""
_PATIENCE_BUDGETS, _LEAST_PATIENCE_S = 20, 1.0
"""A candidate gets so many times the latency budget to answer, and then the stable version is asked: while there is time."""
_REMEMBERED = 20_000
"""Requests for which feedback may come."""
_IN_BACKGROUND = 32
"""Comparisons under way at most; what comes on top is not compared."""


@dataclass
class _Answered:
    """An answer that feedback may come for."""

    arm: Arm
    labels: list[str | None]
    told: dict[int, bool] = field(default_factory=dict)
    """By index: whether feedback agreed."""


class Trial:
    """One rollout. Belongs to the gateway's event loop; files are read and written in threads, which touch nothing of it."""

    def __init__(self, plan: Plan, others: tuple[Arm, Arm] | None = None, end: End | None = None) -> None:
        self.on_unseen: Tell = lambda *_: None
        """Hears of answers that nobody is given, since they are for comparison."""
        self.plan, self.end = plan, end
        self.stable, self.candidate = Arm(), Arm()
        self.others = others or (Arm(), Arm())
        """The same two, as counted by other gateways, and by this one before it was started again."""
        self.answered: OrderedDict[str, _Answered] = OrderedDict()
        self.background: set[asyncio.Task[None]] = set()
        self._part = uuid.uuid4().hex[:12]
        """Names the file of what is counted here, which nobody else writes."""
        self._saved = self._counts()
        self._champion_is_settled = False

    @classmethod
    def load(cls, storage: Storage, plan: Plan) -> Trial:
        """With what was counted by others, and before this process."""
        return cls(plan, read_counts(storage, plan), read_end(storage, plan))

    async def look(self, storage: Storage) -> End | None:
        """Judge, tell the storage, and hear from it what others counted and how they ended it. Returns the end, once all that
        follows from it is written down.

        Raises what the storage or the registry raises. A verdict holds nevertheless, and the next look tries again.
        """
        self.judge()
        self.end = await asyncio.to_thread(_standing, storage, self.plan, self.end)
        if self.end is not None and self.end.by == GATEWAY and not self._champion_is_settled:
            await asyncio.to_thread(_settle_champion, storage, self.plan, self.end)
            self._champion_is_settled = True
        await self._save(storage)
        self.others = await asyncio.to_thread(read_counts, storage, self.plan, self._part)
        return self.end

    def judge(self) -> None:
        """End it, if what was counted says so: who answers goes by that at once, whatever the storage does."""
        if self.end is not None:
            return
        verdict = judge(self.plan.policy, *self._all())
        if verdict.kind != "wait":
            self.end = End(kind=verdict.kind, reason=verdict.reason, by=GATEWAY, time=now())
            log.warning("%s: %s of version %d: %s", self.plan.name, verdict.kind, self.plan.candidate, verdict.reason)

    async def _save(self, storage: Storage) -> None:
        if (counts := self._counts()) != self._saved:
            await asyncio.to_thread(write_counts, storage, self.plan, self._part, *counts)
            self._saved = counts

    def _counts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.stable.to_json(), self.candidate.to_json()

    def _all(self) -> tuple[Arm, Arm]:
        return self.stable.merged(self.others[0]), self.candidate.merged(self.others[1])

    def report(self) -> dict[str, Any]:
        told = report(self.plan.policy, *self._all())
        ended = self.end.model_dump() if self.end else None
        return {
            "stable_version": str(self.plan.stable),
            "candidate_version": str(self.plan.candidate),
            "end": ended,
        } | told

    # ------------------------------------------------------------------------------------------------------ answering

    async def predict(self, stable: Ask, candidate: Ask, inputs: Sequence[Input], caller: Caller) -> Answers:
        """Of the version whose turn it is. Raises what the stable version raises."""
        if not self.plan.checked:
            return await stable(inputs)
        chosen = self._is_chosen(caller)
        if not chosen or (self.plan.mode == "shadow" and self.end is None):
            answers = await self._from_stable(stable, inputs)
            self._remember(caller, self.stable, answers)
            if chosen:
                self._later(self._show(candidate, inputs, answers, caller))
            return answers
        found = await self._from_candidate(candidate, inputs)
        if found is None:
            return await stable(inputs)  # counted as the candidate's, and not for what this one makes of it
        if found.unreadable:
            other = await stable(inputs)
            if self._is_at_a_loss(found, other):
                return other
        self._remember(caller, self.candidate, found)
        if self.end is None and sticky(caller.request_id, "compare") < self.plan.terms.compare:
            self._later(self._compare(stable, inputs, found, caller))
        return _as(found, "candidate")

    def tell(self, request_id: str, index: int, label: str) -> None:
        """Feedback on an answer that was given a while ago at most. What is said last of it counts, once."""
        answer = self.answered.get(request_id)
        if answer is None or index >= len(answer.labels):
            return
        right, before = answer.labels[index] == label, answer.told.get(index)
        if before is None:
            answer.arm.tell(right)
        else:
            answer.arm.right += right - before
        answer.told[index] = right

    def version_of(self, request_id: str) -> int | None:
        """That answered a while ago at most; None: it is not known (any more)."""
        if request_id not in self.answered:
            return None
        return self.plan.candidate if self.answered[request_id].arm is self.candidate else self.plan.stable

    def _is_chosen(self, caller: Caller) -> bool:
        if self.end is not None:
            return self.end.kind == "promote"
        return goes_to_candidate(self.plan.policy, caller.identity, self.plan.id)

    async def _from_stable(self, ask: Ask, inputs: Sequence[Input]) -> Answers:
        began = time.perf_counter()
        try:
            answers = await ask(inputs)
        except asyncio.CancelledError:
            self._given_up(self.stable, began)
            raise
        except Exception as error:
            self._count(self.stable, began, failed=not isinstance(error, ApiError) or error.status >= 500)
            raise
        self._count(self.stable, began, failed=False)
        return answers

    async def _from_candidate(self, ask: Ask, inputs: Sequence[Input]) -> Answers | None:
        """None: it failed, in whatever way."""
        began = time.perf_counter()
        patience_s = max(_LEAST_PATIENCE_S, _PATIENCE_BUDGETS * self.plan.latency_budget_ms / 1000)
        try:
            async with asyncio.timeout(min(patience_s, self.plan.request_timeout_s / 2)):
                answers = await ask(inputs)
            if len(answers.outputs) != len(inputs):
                raise ValueError(f"{len(answers.outputs)} answers to {len(inputs)} inputs")
        except asyncio.CancelledError:
            self._given_up(self.candidate, began)
            raise
        except Exception as error:  # noqa: BLE001  (a new version may fail in any way, and no client is to see it)
            self._count(self.candidate, began, failed=True)
            log.info("%s version %d failed: %r", self.plan.name, self.plan.candidate, error)
            return None
        self._count(self.candidate, began, failed=False)
        return answers

    def _is_at_a_loss(self, found: Answers, other: Answers) -> bool:
        """Whether the candidate calls unreadable what the stable version reads, which is a failure."""
        lost = bool(found.unreadable) and found.unreadable.keys() != other.unreadable.keys()
        self.candidate.errors += lost
        return lost

    def _given_up(self, arm: Arm, began: float) -> None:
        """A client that went away before the budget was spent says nothing about the version."""
        if 1000 * (time.perf_counter() - began) > self.plan.latency_budget_ms:
            self._count(arm, began, failed=True)

    def _count(self, arm: Arm, began: float, *, failed: bool) -> None:
        arm.record(1000 * (time.perf_counter() - began), failed, self.plan.latency_budget_ms)

    def _remember(self, caller: Caller, arm: Arm, answers: Answers) -> None:
        self.answered[caller.request_id] = _Answered(arm, [output.get("label") for output in answers.outputs])
        while len(self.answered) > _REMEMBERED:
            self.answered.popitem(last=False)

    # -------------------------------------------------------------------------------------------------- in background

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        if len(self.background) >= _IN_BACKGROUND:
            work.close()
            return
        task = asyncio.create_task(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)

    async def _show(self, candidate: Ask, inputs: Sequence[Input], answers: Answers, caller: Caller) -> None:
        """A shadow is asked what the stable version has answered already."""
        began = time.perf_counter()
        found = await self._from_candidate(candidate, inputs)
        if found is not None and not self._is_at_a_loss(found, answers):
            self._compared(answers, found)
            self.on_unseen(caller, inputs, _as(found, "shadow"), 1000 * (time.perf_counter() - began))

    async def _compare(self, stable: Ask, inputs: Sequence[Input], found: Answers, caller: Caller) -> None:
        began = time.perf_counter()
        try:
            answers = await stable(inputs)
        except ApiError:  # it has enough to do
            return
        self._compared(answers, found)
        self.on_unseen(caller, inputs, _as(answers, "shadow"), 1000 * (time.perf_counter() - began))

    def _compared(self, old: Answers, new: Answers) -> None:
        for index, (before, after) in enumerate(zip(old.outputs, new.outputs, strict=True)):
            if index not in old.unreadable:
                self.candidate.compare(before.get("label") == after.get("label"))


def _standing(storage: Storage, plan: Plan, end: End | None) -> End | None:
    """The end that stands, of which ``end`` may not have been written yet."""
    return read_end(storage, plan) if end is None else write_end(storage, plan, end.kind, end.reason, end.by)


def _settle_champion(storage: Storage, plan: Plan, end: End) -> None:
    """By it ``orchestrator serve`` knows what to start next. Raises what may pass."""
    try:
        move_champion(storage, plan, end)
    except (ConflictError, ModelNotFound) as error:
        log.warning("the champion of %s stays what it is: %s", plan.name, error)


def _as(answers: Answers, role: Role) -> Answers:
    return answers.model_copy(update={"arm": role})
