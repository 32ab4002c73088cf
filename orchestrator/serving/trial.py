"""A rollout under way, as one gateway sees it: which version answers a request, and what is counted of both.

In: a plan, and two functions that ask the stable version and the candidate. Out: answers, counts, a verdict. A client never
gets a failure of the candidate: the stable version is asked instead. Knows neither Ray nor HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from orchestrator.serving.contract import Answers, ApiError, Caller, Input, Role
from orchestrator.serving.plans import End, Plan, make_champion, read_counts, read_end, write_counts, write_end
from orchestrator.serving.rollout import Arm, goes_to_candidate, judge, report, sticky
from orchestrator.storage import Storage

log = logging.getLogger(__name__)
Ask = Callable[[Sequence[Input]], Awaitable[Answers]]
Tell = Callable[[Caller, Sequence[Input], Answers, float], None]
"""Of an answer, and the milliseconds that it took."""
_PATIENCE_BUDGETS, _LEAST_PATIENCE_S = 20, 1.0
"""A candidate gets so many times the latency budget to answer, and then the stable version is asked."""
_REMEMBERED = 20_000
"""Requests for which feedback may come."""
_IN_BACKGROUND = 32
"""Comparisons under way at most; what comes on top is not compared."""


class Trial:
    """One rollout. All methods but ``load`` and ``save`` belong to the gateway's event loop."""

    def __init__(self, plan: Plan, stable: Arm, candidate: Arm, end: End | None) -> None:
        self.on_unseen: Tell = lambda *_: None
        """Hears of answers that nobody is given, since they are for comparison."""
        self.plan, self.stable, self.candidate, self.end = plan, stable, candidate, end
        self.answered: OrderedDict[str, tuple[Arm, list[str | None]]] = OrderedDict()
        self.background: set[asyncio.Task[None]] = set()
        self.changed = False

    @classmethod
    def load(cls, storage: Storage, plan: Plan) -> Trial:
        """With what was counted before this process."""
        return cls(plan, *read_counts(storage, plan), read_end(storage, plan))

    def save(self, storage: Storage) -> None:
        if self.changed:
            self.changed = False
            write_counts(storage, self.plan, self.stable, self.candidate)

    def look(self, storage: Storage) -> End | None:
        """The end, if it has one now: by somebody else, or by what was counted."""
        if self.end is None:
            self.end = read_end(storage, self.plan)
        if self.end is None:
            verdict = judge(self.plan.policy, self.stable, self.candidate)
            if verdict.kind != "wait":
                self.end = write_end(storage, self.plan, verdict.kind, verdict.reason, "the gateway")
                log.warning(
                    "%s: %s of version %d: %s", self.plan.name, verdict.kind, self.plan.candidate, verdict.reason
                )
                if self.end.kind == "promote":
                    self._promote(storage, self.end)
        return self.end

    def _promote(self, storage: Storage, end: End) -> None:
        """It answers everybody in any case; what ``orchestrator serve`` starts next is the alias's business."""
        try:
            make_champion(storage, self.plan, f"rolled out: {end.reason}")
        except Exception:
            log.warning("cannot make version %d of %s champion", self.plan.candidate, self.plan.name, exc_info=True)

    def report(self) -> dict[str, Any]:
        told = report(self.plan.policy, self.stable, self.candidate)
        ended = self.end.model_dump() if self.end else None
        return {
            "stable_version": str(self.plan.stable),
            "candidate_version": str(self.plan.candidate),
            "end": ended,
        } | told

    # ------------------------------------------------------------------------------------------------------ answering

    async def predict(self, stable: Ask, candidate: Ask, inputs: Sequence[Input], caller: Caller) -> Answers:
        """Of the version whose turn it is. Raises what the stable version raises."""
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
        if found.unreadable:  # or it calls unreadable what it cannot answer
            other = await stable(inputs)
            if other.unreadable.keys() != found.unreadable.keys():
                self.candidate.errors += 1
                return other
        self._remember(caller, self.candidate, found)
        if self.end is None and sticky(caller.request_id, "compare") < self.plan.terms.compare:
            self._later(self._compare(stable, inputs, found, caller))
        return _as(found, "candidate")

    def tell(self, request_id: str, index: int, label: str) -> None:
        """Feedback on an answer that was given a while ago at most."""
        arm, labels = self.answered.get(request_id, (None, []))
        if arm is not None and index < len(labels):
            arm.tell(labels[index] == label)
            self.changed = True

    def _is_chosen(self, caller: Caller) -> bool:
        if self.end is not None:
            return self.end.kind == "promote"
        return goes_to_candidate(self.plan.policy, caller.identity, self.plan.id)

    async def _from_stable(self, ask: Ask, inputs: Sequence[Input]) -> Answers:
        began = time.perf_counter()
        try:
            answers = await ask(inputs)
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
            async with asyncio.timeout(patience_s):
                answers = await ask(inputs)
            if len(answers.outputs) != len(inputs):
                raise ValueError(f"{len(answers.outputs)} answers to {len(inputs)} inputs")
        except Exception as error:  # noqa: BLE001  (a new version may fail in any way, and no client is to see it)
            self._count(self.candidate, began, failed=True)
            log.info("%s version %d failed: %r", self.plan.name, self.plan.candidate, error)
            return None
        self._count(self.candidate, began, failed=False)
        return answers

    def _count(self, arm: Arm, began: float, *, failed: bool) -> None:
        arm.record(1000 * (time.perf_counter() - began), failed, self.plan.latency_budget_ms)
        self.changed = True

    def _remember(self, caller: Caller, arm: Arm, answers: Answers) -> None:
        self.answered[caller.request_id] = arm, [output.get("label") for output in answers.outputs]
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
        if found is not None:
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
        self.changed = True


def _as(answers: Answers, role: Role) -> Answers:
    return answers.model_copy(update={"arm": role})
