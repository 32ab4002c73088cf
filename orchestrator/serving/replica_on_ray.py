"""One copy of a model in a process of its own, kept alive by Ray Serve.

In: what to serve, from where. Out: answers, in batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig

from orchestrator.serving.contract import Answers, Explained, ExplainRequest, Input, ModelInfo
from orchestrator.serving.routing_on_ray import ROUTING
from orchestrator.serving.served import Served

IN_ONE_LOOP = {
    "env_vars": {
        # A request crosses no thread on its way: ours compute in a thread of their own.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    }
}
"""Runtime environment of replicas and gateway; measured, it takes a third of a hop's time."""
QUIET = {"encoding": "JSON", "log_level": "WARNING", "enable_access_log": False}
"""Serve's own logs: a line for each request takes longer than all the rest of a hop."""
_MODEL = "Model"
_STARTS = 2
"""How often a replica may fail to start before its version is given up."""


class ModelReplica:
    """One copy of a model in a process of its own."""

    def __init__(self, served: Served, device: str) -> None:
        # The gateway imports this file too, and starts sooner without torch.
        import torch

        from orchestrator.serving.loaded import LoadedModel

        torch.set_num_threads(max(1, int(served.settings.cpus_per_replica)))
        self.served, self.model = served, LoadedModel(served, device)

    def describe(self) -> tuple[Served, ModelInfo]:
        return self.served, self.model.describe()

    async def predict(self, version: str | None, inputs: Sequence[Input]) -> Answers:
        """Answers nothing if ``version`` is another than this one's."""
        return await self.model.predict(version, inputs)

    async def explain(self, value: Input, asked: ExplainRequest) -> Explained:
        return await self.model.explain(value, asked)

    async def check_health(self) -> None:
        """Serve starts another replica if this one can no longer predict."""
        await self.model.check()


def model_app(served: Served) -> Any:
    """The Serve application of one model."""
    scale, settings = served.scale, served.settings
    gpus = ray.cluster_resources().get("GPU", 0.0)
    # Replicas share the GPUs there are, one share kept free for the next version.
    share = math.floor(100 * min(1.0, gpus / (settings.max_replicas + 1))) / 100
    return serve.deployment(
        ModelReplica,
        name=_MODEL,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": share, "runtime_env": IN_ONE_LOOP},
        logging_config=QUIET,
        request_router_config=ROUTING,
        autoscaling_config=AutoscalingConfig(**scale.autoscaling()),
        max_ongoing_requests=scale.max_ongoing_requests,
        max_queued_requests=scale.max_queued_requests,
        max_constructor_retry_count=_STARTS,
        # The new replica starts beside the old one where there is room; else requests wait while it takes its place.
        max_surge_percent=100 if has_room(served) else 0,
        health_check_period_s=10.0,
        health_check_timeout_s=max(30.0, settings.request_timeout_s),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.request_timeout_s + 5.0,
    ).bind(served, "cuda" if gpus else "cpu")


def has_room(served: Served) -> bool:
    """Whether another replica can start beside those that run."""
    return bool(ray.available_resources().get("CPU", 0.0) >= served.settings.cpus_per_replica)
