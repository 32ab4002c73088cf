"""The shelf as a Ray Serve deployment: replicas that hold many models, each loaded when it is first asked.

In: which models stand there, as the deployment's ``user_config``, so that models come and go without a restart. Out: answers.
Requests say which model they are for, and Serve sends them where it is loaded. Computes on processors alone.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from ray import serve
from ray.serve._private.common import RequestRoutingInfo
from ray.serve.config import AutoscalingConfig
from ray.serve.context import _get_global_client

import orchestrator
from orchestrator.errors import IntegrityError
from orchestrator.recipe_serving import Serving
from orchestrator.recipe_serving import Shelf as Terms
from orchestrator.serving.contract import Answers, Explained, ExplainRequest, Input, ModelInfo
from orchestrator.serving.memory import give_back, measured
from orchestrator.serving.replica_on_ray import IN_ONE_LOOP, QUIET
from orchestrator.serving.scaling import plan_scale
from orchestrator.serving.served import Served, from_values, to_values
from orchestrator.serving.shelf import CannotLoad, Refusal, Shelf
from orchestrator.storage import Storage, folder_bytes

if TYPE_CHECKING:
    from orchestrator.serving.loaded import LoadedModel

log = logging.getLogger(__name__)
R = TypeVar("R")
_ONGOING = 256
"""Requests that a replica takes at a time: those that wait for one model must not keep out those for another."""
_LONGEST_LOAD_S = 600.0
_STARTS = 2


class ShelfReplica:
    """Many models in a process of their own, which compute in one thread, one batch after the other."""

    def __init__(self, cpus: float) -> None:
        # The gateway's process imports this file too, and starts sooner without torch.
        import torch

        torch.set_num_threads(max(1, int(cpus)))
        self.compute = ThreadPoolExecutor(1, thread_name_prefix="predict")
        self.terms = Terms()
        self.models: dict[str, Served] = {}
        self.infos: dict[Served, ModelInfo] = {}
        self.kinds: set[frozenset[type]] = set()
        self.leaving: set[asyncio.Task[None]] = set()
        self.shelf: Shelf[Served, LoadedModel] = Shelf(
            self.terms.bytes, _fetch, self._load, give_back, _tell_controller, lambda served: served.key
        )

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Called by Serve after the start, and again when models came or went. Loads nothing; what is gone is unloaded once
        its requests are answered."""
        self.terms = Terms.model_validate(config["terms"])
        before = set(self.models.values())
        self.models = {served.name: served for served in map(from_values, config["models"])}
        for served in before - set(self.models.values()):
            self._in_background(self.shelf.drop(served))
            self.infos.pop(served, None)
        if self.terms.bytes != self.shelf.budget_bytes:
            self._in_background(self.shelf.resize(self.terms.bytes))

    async def listed(self) -> tuple[Terms, list[Served]]:
        return self.terms, list(self.models.values())

    async def describe_all(self) -> list[tuple[Served, ModelInfo]]:
        """What each model is, without loading it. One whose files cannot be read is left out, and the log says why."""
        for served in [served for served in self.models.values() if served not in self.infos]:
            try:
                from orchestrator.serving.loaded import described

                self.infos[served] = await asyncio.to_thread(described, served)
            except IntegrityError as error:
                log.warning("%s is left out: %s", served.key, error)
        return [(served, self.infos[served]) for served in self.models.values() if served in self.infos]

    async def predict(self, name: str, version: str | None, inputs: Sequence[Input]) -> Answers | Refusal:
        """Answers nothing if ``version`` is another than the one that stands here."""
        return await self._ask(self.models.get(name), lambda model: model.predict(version, inputs))

    async def explain(self, name: str, value: Input, asked: ExplainRequest) -> Explained | Refusal:
        return await self._ask(self.models.get(name), lambda model: model.explain(value, asked))

    async def answer(self, served: Served, inputs: Sequence[Input]) -> Answers | Refusal:
        """As a version answers that does not stand here yet."""
        return await self._ask(served, lambda model: model.predict(None, inputs))

    async def forget(self, served: Served) -> None:
        """Of one that was asked to ``answer`` and is not going to stand here."""
        if served not in self.models.values():
            await self.shelf.drop(served)

    async def loaded(self, name: str) -> bool:
        return name in self.models and self.shelf.holds(self.models[name])

    async def stats(self) -> dict[str, Any]:
        """Of this replica: models that are loaded, bytes, loads, unloads, failures."""
        return self.shelf.stats().to_json()

    async def check_health(self) -> None:
        """Serve starts another replica if this one no longer computes, or if a load hangs."""
        await asyncio.get_running_loop().run_in_executor(self.compute, int)
        if self.shelf.busy_s() > _LONGEST_LOAD_S:
            raise RuntimeError(f"a model has been loading for {self.shelf.busy_s():.0f} s")
        _tell_controller(self.shelf.known())  # a controller that was started again has forgotten it

    async def _ask(self, served: Served | None, question: Callable[[LoadedModel], Awaitable[R]]) -> R | Refusal:
        if served is None:
            return Refusal("the model does not stand on the shelf any more", "try again soon", absent=True)
        try:
            async with self.shelf.using(served) as model:
                return await question(model)
        except CannotLoad as error:
            return Refusal(f"{served.name}: {error.message}", error.next_step, error.reason)

    def _load(self, served: Served, at_least: int) -> tuple[LoadedModel, int]:
        """With the bytes it takes. What comes with the first of a kind, libraries above all, stays in the process when the
        model goes, and is not the model's: it is loaded once more, and measured then."""
        from orchestrator.serving.loaded import LoadedModel

        make = partial(LoadedModel, served, "cpu", self.compute)
        model, size_bytes = measured(make, at_least)
        kind = frozenset(map(type, [model.predictor.model.encoder, *model.predictor.model.network.modules()]))
        if kind not in self.kinds:
            self.kinds.add(kind)
            del model
            give_back()
            gc.freeze()  # the libraries' objects are not looked through again: a collection then stops the process for 10 ms
            model, size_bytes = measured(make, at_least)
        return model, size_bytes

    def _in_background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.leaving.add(task)
        task.add_done_callback(self.leaving.discard)


def _fetch(served: Served) -> int:
    return folder_bytes(Storage(served.storage).fetch(served.location, verify=False))


def _tell_controller(models: Sequence[Served]) -> None:
    """Which models are asked best in this replica. This is the call that ``@serve.multiplexed`` makes; the decorator itself
    keeps models by their number, whatever they weigh, and has no way to let go of one."""
    info = RequestRoutingInfo(
        replica_id=serve.get_replica_context().replica_id, multiplexed_model_ids=[served.key for served in models]
    )
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        client.record_request_routing_info(info)


def shelf_app(terms: Terms, models: Sequence[Served]) -> Any:
    """The Serve application of the shelf. With the same terms, other models make no replica start again."""
    scale = plan_scale(Serving(min_replicas=terms.min_replicas, max_replicas=terms.max_replicas))
    slowest_s = max((served.settings.request_timeout_s for served in models), default=30.0)
    deployment = serve.deployment(
        ShelfReplica,
        name="Shelf",
        user_config={"terms": terms.model_dump(), "models": [to_values(served) for served in models]},
        ray_actor_options={"num_cpus": terms.cpus_per_replica, "runtime_env": IN_ONE_LOOP},
        logging_config=QUIET,
        autoscaling_config=AutoscalingConfig(**scale.autoscaling()),
        max_ongoing_requests=_ONGOING,
        max_queued_requests=scale.max_queued_requests,
        max_constructor_retry_count=_STARTS,
        health_check_period_s=10.0,
        health_check_timeout_s=max(30.0, slowest_s),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=slowest_s + 5.0,
    )
    # Serve takes each submission for new code, and starts all replicas again, unless it is given a version of the code.
    return deployment.options(_internal=True, version=f"shelf-{orchestrator.__version__}").bind(terms.cpus_per_replica)
