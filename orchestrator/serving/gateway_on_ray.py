"""What the gateway knows of the models behind it, and how it asks them.

In: Serve's status, once a second, so that models come, change and go without the gateway being deployed again. Out: answers,
of a replica or from memory; what is recorded of them; which rollouts go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import ChainMap, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from orchestrator.serving.access import Keys, Rings
from orchestrator.serving.cache import AnswerCache, remembered
from orchestrator.serving.contract import (
    Answers,
    ApiError,
    Caller,
    Explained,
    ExplainRequest,
    Input,
    ModelInfo,
)
from orchestrator.serving.envelope import Metrics
from orchestrator.serving.feedback import append_feedback
from orchestrator.serving.gateway import overloaded, wrong_version
from orchestrator.serving.plans import read_plan
from orchestrator.serving.recording import Recorders, storage_at
from orchestrator.serving.served import CANDIDATE_APP, MODEL_APP, SHELF_APP, Served
from orchestrator.serving.shelf import Refusal
from orchestrator.serving.trial import Trial
from orchestrator.serving.watching import Complaints, Rounds

PATIENCE_S = 5.0
"""How long a replica may take to say what it is."""
NO_ANSWER = (RayActorError, DeploymentUnavailableError)
_LOOK_EVERY_S = 1.0
_RETRY_S, _LONGEST_RETRY_S = 0.05, 0.5
_MOST_DEATHS = 3
"""Replicas that may die while they have one request."""
_LAST_WRITE_S = 10.0
_OWN_REQUESTS = 100


@dataclass
class _Known:
    handle: Any
    served: Served
    info: ModelInfo
    cache: AnswerCache
    first: tuple[str, ...] = ()
    """Arguments before all others: on the shelf, which model is meant."""


def _cache_of(before: _Known | None, served: Served) -> AnswerCache:
    """The same as long as the same stands there."""
    return before.cache if before and before.served == served else AnswerCache(served.settings.cache_bytes)


@dataclass
class RayModels:
    """The models of this Serve instance, as the gateway sees them: by application, a stable version and, while it is rolled
    out, a candidate."""

    metrics: Metrics
    keyed_only: bool = False
    """Models without keys are left out, unless their own recipe says that all may ask them."""
    known: ChainMap[str, _Known] = field(default_factory=lambda: ChainMap({}, {}))
    """First those that stand on the shelf, under the name that their application would have, then those that have one. A model
    that moves stands in both places for a moment, and is asked where no request is lost when it leaves the other."""
    seen: dict[str, tuple[str, float]] = field(default_factory=dict)
    """By application: status and time of deployment when it was last asked what it is."""
    handles: dict[str, Any] = field(default_factory=dict)
    asking: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    rings: Rings = field(default_factory=Rings)
    trials: dict[str, Trial] = field(default_factory=dict)
    """By model."""
    looking: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    """At the rollout of a model."""
    recorders: Recorders = field(default_factory=Recorders)
    running: dict[str, int] = field(default_factory=dict)
    """Replicas, by application."""
    own_requests: deque[str] = field(default_factory=lambda: deque(maxlen=_OWN_REQUESTS))
    """Ids of requests by which a deployment sees whether the endpoint answers: no user sent them, and none is recorded."""
    complaints: Complaints = field(default_factory=Complaints)

    def __post_init__(self) -> None:
        works = {"which models there are": self._look, "how rollouts go": self._look_at_trials,
                 "which keys there are": self._look_at_keys, "what is recorded": self._write_down}  # fmt: skip
        self.rounds = Rounds(works, _LOOK_EVERY_S)

    @contextlib.asynccontextmanager
    async def watching(self, app: FastAPI) -> AsyncIterator[None]:
        """Runs around the gateway: keeps looking which models there are. The door opens once it has seen them: one that was
        started again must not say that there are none."""
        await self.rounds.once("which models there are")
        if self.asking:
            await asyncio.wait(self.asking.values(), timeout=PATIENCE_S)
        await self.rounds.once("how rollouts go")
        self.rounds.start()
        try:
            yield
        finally:
            self.rounds.stop()
            with contextlib.suppress(TimeoutError):  # a storage that hangs
                await asyncio.wait_for(asyncio.to_thread(self._write_last), _LAST_WRITE_S)

    def _write_last(self) -> None:
        self.rings.refresh()
        self.recorders.write_all()

    async def _look_at_keys(self) -> None:
        await asyncio.to_thread(self.rings.refresh)

    async def _write_down(self) -> None:
        await asyncio.to_thread(self.recorders.write_due, {known.served.storage for known in self.known.values()})

    async def _look(self) -> None:
        """Forget models that are gone; ask what they are those that are new or have changed."""
        apps = (await asyncio.to_thread(serve.status)).applications
        seen = {app: (status.status.value, status.last_deployed_time_s) for app, status in apps.items()
                if app.startswith((MODEL_APP, CANDIDATE_APP)) or app == SHELF_APP
                if status.status != "DELETING"}  # fmt: skip
        shelf, own = self.known.maps
        for app in (self.seen.keys() | self.handles.keys()) - seen.keys():
            own.pop(app, None)
            self.seen.pop(app, None)
            self.handles.pop(app, None)
        if SHELF_APP not in seen:
            shelf.clear()
        self._tell_what_runs(apps)
        for app, state in seen.items():
            # models come to the shelf and go without a new time of deployment
            settled = app != SHELF_APP and state[0] == "RUNNING" and self.seen.get(app) == state
            if not settled and (app not in self.asking or self.asking[app].done()):
                self.asking[app] = asyncio.create_task(self._ask(app, state))

    async def _ask(self, app: str, seen: tuple[str, float]) -> None:
        try:
            if app not in self.handles:
                handle = await asyncio.to_thread(serve.get_app_handle, app)
                self.handles[app] = handle.options(_by_reference=False)  # over gRPC: half the time
            handle = self.handles[app]
            if app == SHELF_APP:
                described = await asyncio.wait_for(handle.describe_all.remote(), PATIENCE_S)
            else:
                described = [await asyncio.wait_for(handle.describe.remote(), PATIENCE_S)]
            self._let_in(app, handle, [each for each in described if await self._is_let_in(each[0])], seen)
        except (*NO_ANSWER, BackPressureError, RayServeException, TimeoutError):
            return
        except Exception as error:  # noqa: BLE001  (it is asked again)
            self.complaints.tell(app, f"cannot see what {app} is: {error!r}", exc_info=True)
        else:
            self.complaints.settle(app)

    def _let_in(
        self, app: str, handle: Any, let_in: Sequence[tuple[Served, ModelInfo]], seen: tuple[str, float]
    ) -> None:
        shelf, own = self.known.maps
        self.running[app] = max(1, self.running.get(app, 0))  # one has just answered
        if app == SHELF_APP:
            fresh = {}
            for served, info in let_in:
                there = handle.options(multiplexed_model_id=served.key)
                fresh[served.app] = _Known(
                    there, served, info, _cache_of(shelf.get(served.app), served), (served.name,)
                )
            shelf.clear()
            shelf.update(fresh)
        elif not let_in:
            return
        else:
            served, info = let_in[0]
            own[app] = _Known(handle, served, info, _cache_of(own.get(app), served))
        self.seen[app] = seen

    async def _is_let_in(self, served: Served) -> bool:
        if served.settings.keys:
            try:
                await asyncio.to_thread(self.rings.learn, served.storage)
            except Exception as error:  # noqa: BLE001  (it is tried again, and keeps no other model out)
                self.complaints.tell(served.key, f"cannot see the keys of {served.app}, which is not let in: {error!r}")
                return False
        elif self.keyed_only and not served.settings.open_to_network:
            self.complaints.tell(served.key, f"{served.app} has neither serving.keys nor serving.open_to_network of its own: "
                                             "it is not let in")  # fmt: skip
            return False
        self.complaints.settle(served.key)
        return True

    def _tell_what_runs(self, apps: Mapping[str, Any]) -> None:
        self.metrics.replicas.clear()
        self.metrics.version_info.clear()
        self.running = {
            app: sum(each.replica_states.get("RUNNING", 0) for each in status.deployments.values())
            for app, status in apps.items()
        }
        for app, known in self.known.items():
            name, arm = known.served.name, "candidate" if app.startswith(CANDIDATE_APP) else "stable"
            self.metrics.replicas.labels(name).inc(self.running.get(SHELF_APP if known.first else app, 0))
            self.metrics.version_info.labels(name, known.info.model_version, arm).set(1)
        for name, written, dropped in self.recorders.news():
            self.metrics.recorded.labels(name).inc(written)
            self.metrics.recorded_dropped.labels(name).inc(dropped)

    # ------------------------------------------------------------------------------------------------------- rollouts

    async def _look_at_trials(self) -> None:
        """Begin those that are planned, judge those that run, take back what did not do: each by itself, so that none waits
        for another's storage, or fails with it."""
        for name in [app.removeprefix(CANDIDATE_APP) for app in self.known if app.startswith(CANDIDATE_APP)]:
            if MODEL_APP + name in self.known and (name not in self.looking or self.looking[name].done()):
                self.looking[name] = asyncio.create_task(self._try_to_look_at_trial(name))
        for name in [name for name in self.trials if CANDIDATE_APP + name not in self.known]:
            del self.trials[name]
        if self.looking:
            await asyncio.wait(self.looking.values(), timeout=PATIENCE_S)

    async def _try_to_look_at_trial(self, name: str) -> None:
        try:
            stable, candidate = self.known[MODEL_APP + name].served, self.known[CANDIDATE_APP + name].served
            await self._look_at_trial(name, stable, candidate)
        except Exception as error:  # noqa: BLE001  (it is looked at again in a second)
            self.complaints.tell(f"the rollout of {name}", f"cannot look at the rollout of {name}: {error!r}")
        else:
            self.complaints.settle(f"the rollout of {name}")

    async def _look_at_trial(self, name: str, stable: Served, candidate: Served) -> None:
        storage, trial = storage_at(stable.storage), self.trials.get(name)
        if trial is not None:
            trial.judge()  # first: a storage that cannot be read must not keep harm going
        plan = await asyncio.to_thread(read_plan, storage, name)
        if plan is None or (plan.stable, plan.candidate) != (stable.version, candidate.version):
            self.trials.pop(name, None)
            return
        if trial is None or trial.plan.id != plan.id:
            trial = self.trials[name] = await asyncio.to_thread(Trial.load, storage, plan)
            trial.on_unseen = partial(self._record, MODEL_APP + name)
        trial.plan = plan
        end = await trial.look(storage)
        if end is not None and end.kind == "rollback":
            await asyncio.to_thread(serve.delete, CANDIDATE_APP + name, False)

    async def rollout(self, name: str) -> dict[str, Any] | None:
        if name in self.trials:
            return self.trials[name].report()
        storage = storage_at(self.known[MODEL_APP + name].served.storage)
        plan = await asyncio.to_thread(read_plan, storage, name)
        return None if plan is None else (await asyncio.to_thread(Trial.load, storage, plan)).report()

    # ------------------------------------------------------------------------------------------------------ answering

    async def names(self) -> list[str]:
        return sorted(app.removeprefix(MODEL_APP) for app in self.known if app.startswith(MODEL_APP))

    async def describe(self, name: str, version: str | None = None) -> ModelInfo | None:
        if MODEL_APP + name not in self.known:  # a candidate alone: whether it asks for keys is not known
            return None
        return self.known[self._candidate(name, version) or MODEL_APP + name].info

    def _candidate(self, name: str, version: str | None) -> str | None:
        """Its application, if that is the version."""
        candidate = self.known.get(CANDIDATE_APP + name)
        return CANDIDATE_APP + name if candidate and candidate.info.model_version == version else None

    async def predict(self, name: str, version: str | None, inputs: Sequence[Input], caller: Caller) -> Answers:
        began, app = time.perf_counter(), MODEL_APP + name
        try:
            answers = await self._answered(name, version, inputs, caller)
        except BaseException as error:
            if not isinstance(error, ApiError) or error.status >= 500:
                self._record(app, caller, inputs, None, 1000 * (time.perf_counter() - began), _code_of(error, caller))
            raise
        self._record(app, caller, inputs, answers, 1000 * (time.perf_counter() - began))
        return answers

    async def _answered(self, name: str, version: str | None, inputs: Sequence[Input], caller: Caller) -> Answers:
        stable, candidate = MODEL_APP + name, CANDIDATE_APP + name
        if version is None and name in self.trials and candidate in self.known:
            # No answers from memory: both versions are measured.
            ask, ask_candidate = partial(self._asked, stable, None), partial(self._asked, candidate, None)
            return await self.trials[name].predict(ask, ask_candidate, inputs, caller)
        chosen = self._candidate(name, version)
        if chosen is None:
            answers = await self._remembered(stable, version, inputs)
        else:
            answers = (await self._asked(chosen, version, inputs)).model_copy(update={"arm": "candidate"})
        if version not in (None, answers.version):
            raise wrong_version(name, version, answers.version)
        return answers

    async def _remembered(self, app: str, version: str | None, inputs: Sequence[Input]) -> Answers:
        """From memory, what is there; the rest is asked for."""
        known = self.known.get(app)
        if known is None or not known.served.settings.cache_bytes or version not in (None, known.info.model_version):
            return await self._asked(app, version, inputs)
        return await remembered(known.cache, known.info.model_version, partial(self._asked, app, version), inputs)

    def _record(
        self,
        app: str,
        caller: Caller,
        inputs: Sequence[Input],
        answers: Answers | None,
        latency_ms: float,
        error: str = "",
    ) -> None:
        known = self.known.get(app)
        if (
            known is None
            or (terms := known.served.settings.recording) is None
            or caller.request_id in self.own_requests
        ):
            return
        recorder = self.recorders.of(known.served.storage, known.served.name, terms)
        version = "" if answers else known.info.model_version
        recorder.record(caller.request_id, inputs, answers, latency_ms=latency_ms, version=version, error=error or None,
                        chance=caller.chance)  # fmt: skip

    async def explain(self, name: str, value: Input, asked: ExplainRequest) -> Explained:
        explained: Explained = await self._call(MODEL_APP + name, "explain", value, asked)
        return explained

    async def _asked(self, app: str, version: str | None, inputs: Sequence[Input]) -> Answers:
        answers: Answers = await self._call(app, "predict", version, inputs)
        return answers

    async def _call(self, app: str, method: str, *arguments: Any) -> Any:
        """Asking changes nothing, so what a dying replica took with it is asked again of another, until there is an answer: how
        long that may take is the caller's business. What several died of kills no more of them."""
        pause_s, died = _RETRY_S, 0
        while app in self.known:
            known = self.known[app]
            try:
                answer = await getattr(known.handle, method).remote(*known.first, *arguments)
            except BackPressureError:
                raise overloaded(f"{app} has more requests waiting than it can answer in time") from None
            except NO_ANSWER as error:
                died += isinstance(error, RayActorError) and not isinstance(error, ActorUnavailableError)
                if died >= _MOST_DEATHS:
                    raise ApiError(503, "replicas_died", f"{died} replicas of {app} died while they had this request",
                                   "if others are answered, send it in parts to see which input does it") from None  # fmt: skip
                self.metrics.retries.labels(known.served.name).inc()
            else:
                if not isinstance(answer, Refusal):
                    return answer
                if not answer.absent:  # else it has just left the shelf: known will say where it is
                    raise ApiError(503, "model_unavailable", answer.message, answer.next_step, retry_after_s=1)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_RETRY_S)
        raise ApiError(503, "unavailable", f"no replica of {app} answers", "try again soon", retry_after_s=1)

    def keys(self, name: str) -> Keys | None:
        known = self.known.get(MODEL_APP + name)
        return self.rings.known[known.served.storage] if known and known.served.settings.keys else None

    def is_ready(self, name: str) -> bool:
        known = self.known.get(MODEL_APP + name)
        if known is None:
            return False
        settings = known.served.settings
        may_sleep = (settings.shelf if known.first else settings).min_replicas == 0
        return may_sleep or self.running.get(SHELF_APP if known.first else known.served.app, 0) > 0

    async def feedback(self, name: str, entry: dict[str, Any]) -> None:
        """The version is the one that answered, as far as that is known while two of them do."""
        if (known := self.known.get(MODEL_APP + name)) is None:
            raise ApiError(503, "unavailable", f"{name} has just been taken away", "try again soon", retry_after_s=1)
        if (trial := self.trials.get(name)) is not None:
            trial.tell(entry["request_id"], entry["index"], entry["label"])
            version = trial.version_of(entry["request_id"])
            entry = {field: value for field, value in entry.items() if field != "model_version"}
            entry |= {} if version is None else {"model_version": str(version)}
        await asyncio.to_thread(_keep_feedback, known.served.storage, name, entry)


def _keep_feedback(storage: str, name: str, entry: dict[str, Any]) -> None:
    append_feedback(storage_at(storage), name, entry)


def _code_of(error: BaseException, caller: Caller) -> str:
    """Why a request has no answer, as records of it say."""
    if isinstance(error, ApiError):
        return error.code
    if isinstance(error, asyncio.CancelledError):
        return "timeout" if asyncio.get_running_loop().time() >= caller.due_s else "cancelled"
    return "internal"
