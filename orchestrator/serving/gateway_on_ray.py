"""The gateway as a Ray Serve deployment that listens for itself, and what it knows of the models behind it.

In: where to listen. Out: HTTP answers. The gateway finds models by asking Serve once a second, so models come, change and go
without it being deployed again. Serve starts it again when its process dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import ChainMap
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from orchestrator.errors import ServingFailed
from orchestrator.recipe_serving import Listen
from orchestrator.serving import logs
from orchestrator.serving.access import Keys, Rings
from orchestrator.serving.cache import AnswerCache
from orchestrator.serving.contract import (
    OWN_REQUEST_ID,
    Answers,
    ApiError,
    Caller,
    Explained,
    ExplainRequest,
    Input,
    ModelInfo,
)
from orchestrator.serving.door import Door
from orchestrator.serving.envelope import Metrics
from orchestrator.serving.feedback import append_feedback
from orchestrator.serving.gateway import build_app, overloaded, wrong_version
from orchestrator.serving.plans import read_plan
from orchestrator.serving.recording import Recorders
from orchestrator.serving.replica_on_ray import IN_ONE_LOOP, QUIET
from orchestrator.serving.served import CANDIDATE_APP, MODEL_APP, SHELF_APP, Served
from orchestrator.serving.shelf import Refusal
from orchestrator.serving.traces import NoTracer, Tracer, tracer
from orchestrator.serving.trial import Trial
from orchestrator.storage import Storage

log = logging.getLogger(__name__)
GATEWAY = "gateway"
"""Name of the gateway's application in Serve."""
PATIENCE_S = 5.0
"""How long a replica may take to say what it is."""
NO_ANSWER = (RayActorError, DeploymentUnavailableError)
_LOOK_EVERY_S = 1.0
_RETRY_S, _LONGEST_RETRY_S = 0.05, 0.5
_CLOSING_S = 60.0
_HEALTH_S = 1.0
_HEAD = "node:__internal_head__"


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
    """Models that are open to all are left out, unless they say that they mean it."""
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
    recorders: Recorders = field(default_factory=Recorders)

    @contextlib.asynccontextmanager
    async def watching(self, app: FastAPI) -> AsyncIterator[None]:
        """Runs around the gateway: keeps looking which models there are. The door opens once it has seen them: one that was
        started again must not say that there are none."""
        await self._look_around((self._look,))
        if self.asking:
            await asyncio.wait(self.asking.values(), timeout=PATIENCE_S)
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.to_thread(self.recorders.write_all)

    async def _watch(self) -> None:
        while True:
            await self._look_around((self._look, self._look_at_trials))
            await asyncio.to_thread(self.rings.refresh)
            await asyncio.to_thread(self.recorders.write_due)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _look_around(self, looks: Sequence[Callable[[], Awaitable[None]]]) -> None:
        for look in looks:
            try:
                await look()
            except Exception:  # without Serve's controller, the models known so far go on being asked
                log.warning("cannot see which models there are", exc_info=True)

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
        except (*NO_ANSWER, BackPressureError, RayServeException, TimeoutError):
            return
        let_in = [(served, info) for served, info in described if await self._is_let_in(served)]
        shelf, own = self.known.maps
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
            await asyncio.to_thread(self.rings.learn, served.storage)
        elif self.keyed_only and not served.settings.open_to_network:
            log.warning("%s has neither serving.keys nor serving.open_to_network: it is not let in", served.app)
            return False
        return True

    def _tell_what_runs(self, apps: Mapping[str, Any]) -> None:
        self.metrics.replicas.clear()
        self.metrics.version_info.clear()
        for app, known in self.known.items():
            name, arm = known.served.name, "candidate" if app.startswith(CANDIDATE_APP) else "stable"
            place = apps[SHELF_APP if known.first else app]
            running = sum(each.replica_states.get("RUNNING", 0) for each in place.deployments.values())
            self.metrics.replicas.labels(name).inc(running)
            self.metrics.version_info.labels(name, known.info.model_version, arm).set(1)

    # ------------------------------------------------------------------------------------------------------- rollouts

    async def _look_at_trials(self) -> None:
        """Begin those that are planned, judge those that run, take back what did not do."""
        for app in [app for app in self.known if app.startswith(CANDIDATE_APP)]:
            name = app.removeprefix(CANDIDATE_APP)
            if (stable := self.known.get(MODEL_APP + name)) is not None:
                await self._look_at_trial(name, stable.served, self.known[app].served)
        for name in [name for name in self.trials if CANDIDATE_APP + name not in self.known]:
            del self.trials[name]

    async def _look_at_trial(self, name: str, stable: Served, candidate: Served) -> None:
        storage = Storage(stable.storage)
        plan = await asyncio.to_thread(read_plan, storage, name)
        if plan is None or (plan.stable, plan.candidate) != (stable.version, candidate.version):
            self.trials.pop(name, None)
            return
        trial = self.trials.get(name)
        if trial is None or trial.plan.id != plan.id:
            trial = self.trials[name] = await asyncio.to_thread(Trial.load, storage, plan)
            trial.on_unseen = partial(self._record, MODEL_APP + name)
        trial.plan = plan
        end = await asyncio.to_thread(trial.look, storage)
        await asyncio.to_thread(trial.save, storage)
        if end is not None and end.kind == "rollback":
            await asyncio.to_thread(serve.delete, CANDIDATE_APP + name, False)

    async def rollout(self, name: str) -> dict[str, Any] | None:
        if name in self.trials:
            return self.trials[name].report()
        storage = Storage(self.known[MODEL_APP + name].served.storage)
        plan = await asyncio.to_thread(read_plan, storage, name)
        return None if plan is None else (await asyncio.to_thread(Trial.load, storage, plan)).report()

    # ------------------------------------------------------------------------------------------------------ answering

    async def names(self) -> list[str]:
        return sorted(app.removeprefix(MODEL_APP) for app in self.known if app.startswith(MODEL_APP))

    async def describe(self, name: str, version: str | None = None) -> ModelInfo | None:
        app = self._candidate(name, version) or MODEL_APP + name
        return self.known[app].info if app in self.known else None

    def _candidate(self, name: str, version: str | None) -> str | None:
        """Its application, if that is the version."""
        candidate = self.known.get(CANDIDATE_APP + name)
        return CANDIDATE_APP + name if candidate and candidate.info.model_version == version else None

    async def predict(self, name: str, version: str | None, inputs: Sequence[Input], caller: Caller) -> Answers:
        began, app = time.perf_counter(), MODEL_APP + name
        try:
            answers = await self._answered(name, version, inputs, caller)
        except ApiError as error:
            if error.status >= 500:
                self._record(app, caller, inputs, None, 1000 * (time.perf_counter() - began), error.code)
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
        is_kept = (
            known is not None and known.served.settings.cache_bytes and version in (None, known.info.model_version)
        )
        if known is None or not is_kept:
            return await self._asked(app, version, inputs)
        found = known.cache.known(inputs)
        missing = [index for index in range(len(inputs)) if index not in found]
        if not missing:
            return Answers(version=known.info.model_version, outputs=list(found.values()), cached=len(found))
        answers = await self._asked(app, version, [inputs[index] for index in missing])
        if answers.version != known.info.model_version:  # a new version has just come: one request, one version
            return await self._asked(app, version, inputs) if found else answers
        for place, index in enumerate(missing):
            found[index] = answers.outputs[place]
            if place not in answers.unreadable:
                known.cache.keep(inputs[index], answers.outputs[place])
        unreadable = {missing[place]: reason for place, reason in answers.unreadable.items()}
        outputs, cached = [found[index] for index in range(len(inputs))], len(inputs) - len(missing)
        return answers.model_copy(update={"outputs": outputs, "unreadable": unreadable, "cached": cached})

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
        if known is None or (terms := known.served.settings.recording) is None or caller.request_id == OWN_REQUEST_ID:
            return
        recorder = self.recorders.of(known.served.storage, known.served.name, terms)
        version = "" if answers else known.info.model_version
        kept = recorder.record(
            caller.request_id, inputs, answers, latency_ms=latency_ms, version=version, error=error or None
        )
        self.metrics.recorded.labels(known.served.name).inc(kept)

    async def explain(self, name: str, value: Input, asked: ExplainRequest) -> Explained:
        explained: Explained = await self._call(MODEL_APP + name, "explain", value, asked)
        return explained

    async def _asked(self, app: str, version: str | None, inputs: Sequence[Input]) -> Answers:
        answers: Answers = await self._call(app, "predict", version, inputs)
        return answers

    async def _call(self, app: str, method: str, *arguments: Any) -> Any:
        """Asking changes nothing, so what a dying replica took with it is asked again of another, until there is an answer: how
        long that may take is the caller's business."""
        pause_s = _RETRY_S
        while app in self.known:
            known = self.known[app]
            try:
                answer = await getattr(known.handle, method).remote(*known.first, *arguments)
            except BackPressureError:
                raise overloaded(f"{app} has more requests waiting than it can answer in time") from None
            except NO_ANSWER:
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

    async def feedback(self, name: str, entry: dict[str, Any]) -> None:
        if name in self.trials:
            self.trials[name].tell(entry["request_id"], entry["index"], entry["label"])
        await asyncio.to_thread(append_feedback, Storage(self.known[MODEL_APP + name].served.storage), name, entry)


class Gateway:
    """The deployment. Serve's own proxy is not in front of it: requests come straight to its door."""

    def __init__(self) -> None:
        self.door: Door | None = None
        self.models = RayModels(Metrics())
        self.traces: Tracer = NoTracer()
        self.outlet: logs.Outlet | None = None

    async def reconfigure(self, listen: Mapping[str, Any]) -> None:
        """Called by Serve after the start, and again when the address or the certificate changed."""
        wanted = Listen.model_validate(listen)
        self.models = models = RayModels(Metrics(), keyed_only=wanted.is_open and not wanted.open_to_network)
        traces = tracer(wanted.traces.endpoint, wanted.traces.share) if wanted.traces else NoTracer()
        self.outlet = _outlet(wanted.request_log)
        app = build_app(models, lifespan=models.watching, metrics=models.metrics, tracer=traces,
                        is_logged=wanted.request_log is not None)  # fmt: skip
        door = Door(app, wanted)
        await door.open()
        await self._close()
        self.door, self.traces = door, traces

    async def _close(self) -> None:
        if self.door is not None:
            await self.door.close(_CLOSING_S)
        await asyncio.to_thread(self.traces.close)

    async def listens(self) -> Listen:
        assert self.door is not None
        return self.door.listen

    async def places(self, name: str) -> list[str]:
        """Where it could ask the model; the first is where it does."""
        app = MODEL_APP + name
        return [place for place, known in zip((SHELF_APP, app), self.models.known.maps, strict=True) if app in known]

    async def check_health(self) -> None:
        assert self.door is not None
        self.door.check()

    async def __del__(self) -> None:
        """Called and awaited by Serve at the end."""
        await self._close()
        if self.outlet is not None:
            logs.stop(self.outlet)


def _outlet(file: str | None) -> logs.Outlet | None:
    try:
        return None if file is None else logs.configure("INFO", file)
    except OSError as error:
        raise ServingFailed(f"cannot write {file} ({error.strerror})", "see serving.request_log") from None


def gateway_app(listen: Listen, doors: int = 1, resource: str | None = None) -> Any:
    """It computes nothing, so it reserves no CPU: a 2-core machine keeps room for a model's old and new version.

    ``doors``: how many, each on a node of its own that has this ``resource``; one has one known address, the head node's.
    """
    needed = resource or (_HEAD if doors == 1 else None)
    return serve.deployment(
        Gateway,
        name="Gateway",
        user_config=listen.model_dump(),
        num_replicas=doors,
        max_replicas_per_node=1 if doors > 1 else None,
        ray_actor_options={"num_cpus": 0, "runtime_env": IN_ONE_LOOP, "resources": {needed: 0.001} if needed else {}},
        logging_config=QUIET,
        health_check_period_s=_HEALTH_S,
        health_check_timeout_s=30.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=_CLOSING_S + 5.0,
    ).bind()
