"""The gateway as a Ray Serve deployment that listens for itself.

In: where to listen. Out: HTTP answers. Serve starts it again when its process dies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ray import serve

from orchestrator.errors import ServingFailed
from orchestrator.recipe_serving import Listen
from orchestrator.serving import logs
from orchestrator.serving.door import Door
from orchestrator.serving.envelope import Metrics
from orchestrator.serving.gateway import build_app
from orchestrator.serving.gateway_on_ray import RayModels
from orchestrator.serving.replica_on_ray import IN_ONE_LOOP, QUIET
from orchestrator.serving.served import MODEL_APP, SHELF_APP
from orchestrator.serving.traces import NoTracer, Tracer, tracer

GATEWAY = "gateway"
"""Name of the gateway's application in Serve."""
_CLOSING_S = 60.0
_HEALTH_S = 1.0
_HEAD = "node:__internal_head__"


class Gateway:
    """The deployment. Serve's own proxy is not in front of it: requests come straight to its door."""

    def __init__(self) -> None:
        self.door: Door | None = None
        self.models = RayModels(Metrics())
        self.traces: Tracer = NoTracer()
        self.outlet: logs.Outlet | None = None

    async def reconfigure(self, listen: Mapping[str, Any]) -> None:
        """Called by Serve after the start, and again when the address or the certificate changed."""
        wanted, before = Listen.model_validate(listen), self.models
        models = RayModels(Metrics(), wanted.is_open, rings=before.rings, own_requests=before.own_requests)
        traces = tracer(wanted.traces.endpoint, wanted.traces.share) if wanted.traces else NoTracer()
        app = build_app(models, lifespan=models.watching, metrics=models.metrics, tracer=traces,
                        is_logged=wanted.request_log is not None)  # fmt: skip
        door = Door(app, wanted)
        try:
            await door.open()
            self._set_outlet(wanted.request_log)
        except BaseException:
            await door.close(0.0)
            await asyncio.to_thread(traces.close)
            raise
        old_door, old_traces = self.door, self.traces
        self.door, self.models, self.traces = door, models, traces
        await _close(old_door, old_traces)

    def _set_outlet(self, file: str | None) -> None:
        """Raises ServingFailed, and what was logged to goes on being."""
        outlet = _outlet(file)
        if self.outlet is not None and outlet is None:
            logs.stop(self.outlet)
        self.outlet = outlet

    async def listens(self) -> Listen:
        assert self.door is not None
        return self.door.listen

    async def places(self, name: str) -> list[str]:
        """Where it could ask the model; the first is where it does."""
        app = MODEL_APP + name
        return [place for place, known in zip((SHELF_APP, app), self.models.known.maps, strict=True) if app in known]

    async def expect(self, request_id: str) -> None:
        """A deployment is going to ask with this id."""
        self.models.own_requests.append(request_id)

    async def check_health(self) -> None:
        assert self.door is not None
        self.door.check()
        self.models.rounds.check()

    async def __del__(self) -> None:
        """Called and awaited by Serve at the end."""
        await _close(self.door, self.traces)
        if self.outlet is not None:
            logs.stop(self.outlet)


async def _close(door: Door | None, traces: Tracer) -> None:
    if door is not None:
        await door.close(_CLOSING_S)
    await asyncio.to_thread(traces.close)


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
