"""Ray Serve: one gateway application, and one application per model behind it.

In: where a version's folder is, and the recipe's goals. Out: a URL that answers with that version. Every function
expects Ray to be connected already. The gateway finds models by asking Serve once a second, so models come, change and
go without it being deployed again. A new version replaces the old one only once it has loaded, verified and warmed up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import re
import socket
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from orchestrator.errors import PortInUse, ServingFailed
from orchestrator.progress import Event, Report, ignore
from orchestrator.recipe import Serving
from orchestrator.serving.contract import Answers, ApiError, Input, Limits, ModelInfo
from orchestrator.serving.feedback import append_feedback
from orchestrator.serving.gateway import build_app, overloaded, wrong_version
from orchestrator.serving.known_answers import check_known_answers
from orchestrator.serving.served import MODEL_APP, ModelArguments, Served
from orchestrator.storage import Storage

log = logging.getLogger(__name__)
_GATEWAY, _MODEL = "gateway", "Model"
_LOOK_EVERY_S = 1.0
_PATIENCE_S = 5.0
"""How long the gateway waits for a replica to say what it is."""
_ATTEMPTS, _RETRY_DELAY_S = 4, 0.1
_READY_TIMEOUT_S = 300.0
_STARTS = 2
"""How often a replica may fail to start before its version is given up."""
_GATEWAY_REQUESTS = 2000
_CONTROLLER = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "orchestrator.serving.front.proxy_middlewares",
    # On a laptop that is busy, starting the proxy takes longer than Serve's five seconds.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
}
_NO_ANSWER = (RayActorError, DeploymentUnavailableError)


# ----------------------------------------------------------------------------------------------------------- replicas


class ModelReplica:
    """One copy of a model in a process of its own."""

    def __init__(self, served: Served, device: str) -> None:
        # The gateway imports this file too, and starts sooner without torch.
        import torch

        from orchestrator.serving.batching import Batcher
        from orchestrator.serving.predictor import Prediction, Predictor

        torch.set_num_threads(max(1, int(served.settings.cpus_per_replica)))
        scale = served.scale
        folder = Storage(served.storage).fetch(served.location, verify=False)  # loading verifies
        self.served, self.predictor = served, Predictor.from_folder(folder, device, scale.max_batch_size)
        self.predictor.warm_up()
        self.batcher: Batcher[Input, Prediction] = Batcher(
            self.predictor.predict, scale.max_batch_size, scale.batch_wait_timeout_s
        )

    def describe(self) -> tuple[Served, ModelInfo]:
        settings, model = self.served.settings, self.predictor.model
        limits = Limits(max_instances=settings.max_instances, max_body_bytes=settings.max_body_bytes,
                        request_timeout_s=settings.request_timeout_s)  # fmt: skip
        return self.served, ModelInfo(
            model_name=self.served.name, model_version=str(self.served.version), task=model.task,
            input_kind=model.encoder.kind, labels=model.labels, limits=limits,
        )  # fmt: skip

    async def predict(self, version: str | None, inputs: Sequence[Input]) -> Answers:
        """Answers nothing if ``version`` is another than this one's."""
        if version not in (None, str(self.served.version)):
            return Answers(version=str(self.served.version), outputs=[])
        predictions, batch_size = await self.batcher.submit(inputs)
        return Answers(
            version=str(self.served.version),
            outputs=[{} if p.error else self.predictor.answer(p) for p in predictions],
            unreadable={index: p.error for index, p in enumerate(predictions) if p.error},
            batch_size=batch_size,
        )

    async def check_health(self) -> None:
        """Serve starts another replica if this one can no longer predict."""
        await self.batcher.submit([self.predictor.sample()])


# ------------------------------------------------------------------------------------------------------------ gateway


@dataclass
class _Known:
    handle: Any
    served: Served
    info: ModelInfo
    seen: tuple[str, float]
    """Status and time of deployment when it was last asked what it is."""


@dataclass
class RayModels:
    """The models of this Serve instance, as the gateway sees them."""

    known: dict[str, _Known] = field(default_factory=dict)
    handles: dict[str, Any] = field(default_factory=dict)
    asking: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def watching(self, app: FastAPI) -> AsyncIterator[None]:
        """Runs around the gateway: keeps looking which models there are."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()

    async def _watch(self) -> None:
        while True:
            try:
                await self._look()
            except Exception:  # without Serve's controller, the models known so far go on being asked
                log.warning("cannot see which models there are", exc_info=True)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _look(self) -> None:
        """Forget models that are gone; ask what they are those that are new or have changed."""
        apps = (await asyncio.to_thread(serve.status)).applications
        seen = {app.removeprefix(MODEL_APP): (status.status.value, status.last_deployed_time_s)
                for app, status in apps.items()
                if app.startswith(MODEL_APP) and status.status != "DELETING"}  # fmt: skip
        for name in (self.known.keys() | self.handles.keys()) - seen.keys():
            self.known.pop(name, None)
            self.handles.pop(name, None)
        for name, state in seen.items():
            settled = state[0] == "RUNNING" and name in self.known and self.known[name].seen == state
            if not settled and (name not in self.asking or self.asking[name].done()):
                self.asking[name] = asyncio.create_task(self._ask(name, state))

    async def _ask(self, name: str, seen: tuple[str, float]) -> None:
        try:
            if name not in self.handles:
                self.handles[name] = await asyncio.to_thread(serve.get_app_handle, MODEL_APP + name)
            handle = self.handles[name]
            served, info = await asyncio.wait_for(handle.describe.remote(), _PATIENCE_S)
        except (*_NO_ANSWER, BackPressureError, RayServeException, TimeoutError):
            return
        self.known[name] = _Known(handle, served, info, seen)

    async def names(self) -> list[str]:
        return sorted(self.known)

    async def describe(self, name: str) -> ModelInfo | None:
        return self.known[name].info if name in self.known else None

    async def predict(self, name: str, version: str | None, inputs: Sequence[Input]) -> Answers:
        """Predicting changes nothing, so what a dying replica took with it is asked again of another."""
        answers: Answers = await self._asked(name, version, inputs)
        if version not in (None, answers.version):
            raise wrong_version(name, version, answers.version)
        return answers

    async def _asked(self, name: str, version: str | None, inputs: Sequence[Input]) -> Any:
        for attempt in range(_ATTEMPTS):
            try:
                return await self.known[name].handle.predict.remote(version, inputs)
            except BackPressureError:
                raise overloaded(f"{name} has more requests waiting than it can answer in time") from None
            except _NO_ANSWER:
                await asyncio.sleep(_RETRY_DELAY_S * 2**attempt)
            except KeyError:
                break
        raise ApiError(503, "unavailable", f"no replica of {name} answers", "try again soon", retry_after_s=1)

    async def feedback(self, name: str, entry: dict[str, Any]) -> None:
        await asyncio.to_thread(append_feedback, Storage(self.known[name].served.storage), name, entry)


def build_gateway() -> FastAPI:
    """Called in the gateway's own process. Serve's proxy puts the request id on answers."""
    models = RayModels()
    return build_app(models, answers_request_id=False, lifespan=models.watching)


# ------------------------------------------------------------------------------------------------------------- doors


def deploy(served: Served, report: Report = ignore, known: Sequence[Mapping[str, Any]] = ()) -> str:
    """Bring this version to the endpoint, starting Serve if need be; returns the endpoint's URL once it answers, and answers
    as it should. ``known``: rows with the answers that were evaluated (``known_answers.py``).

    If the new version cannot start, the one that answered before goes on answering.

    Raises:
        PortInUse: something else listens on the address.
        ServingFailed: the version did not start, with the reason its replica gave, or does not answer as it did.
    """
    url = _start(served.settings, report)
    before = _running(served.name)
    report(Event("serve", message=f"{served.name} version {served.version} starts"))
    if before and not _has_room(served):
        report(Event("serve", message="no CPU is free to start it beside the old one: requests wait meanwhile"))
    try:
        _submit(served.app, _model_app(served), None)
        for app in (_GATEWAY, served.app):
            _wait_running(app)
        _wait_until_known(url, served)
        check_known_answers(url, served.name, known, min(served.scale.max_batch_size, served.settings.max_instances))
    except ServingFailed:
        _restore(served, before, report)
        raise
    return url


def serving_status() -> dict[str, dict[str, Any]]:
    """Model -> version, status, running replicas and message."""
    apps = serve.status().applications
    result = {}
    for app, status in apps.items():
        if app.startswith(MODEL_APP):
            name = app.removeprefix(MODEL_APP)
            replicas = sum(d.replica_states.get("RUNNING", 0) for d in status.deployments.values())
            running = _running(name) if replicas else None
            result[name] = {"version": running.version if running else None, "status": status.status.value,
                            "replicas": replicas, "message": status.message}  # fmt: skip
    return result


def undeploy(name: str) -> bool:
    """Take a model off the endpoint, once its open requests are answered; False if it was not there."""
    if MODEL_APP + name not in serve.status().applications:
        return False
    serve.delete(MODEL_APP + name)
    return True


def shutdown() -> None:
    """End the endpoint and all its models, once the open requests are answered."""
    serve.shutdown()


def check_port(host: str, port: int) -> None:
    """Raises PortInUse if this machine cannot listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUse(
                f"cannot listen on {host} port {port} ({error.strerror})",
                "stop what listens there, or choose another: --set serving.port=8001",
            ) from None


def gateway_application(arguments: dict[str, Any]) -> Any:
    """For a Serve config file: the application at ``/`` that answers for all models. It has no arguments."""
    if arguments:
        raise ServingFailed(f"the gateway has no arguments, but got {', '.join(arguments)}", "give them to a model")
    return _gateway_app()


def model_application(arguments: dict[str, Any]) -> Any:
    """For a Serve config file: one model's application, which must be named ``model-NAME`` and have no route.

    ``arguments``: as ``ModelArguments`` says. Raises pydantic's ValidationError that names the wrong one.
    """
    return _model_app(ModelArguments.model_validate(arguments).resolve())


# ---------------------------------------------------------------------------------------------------------- starting


def _start(settings: Serving, report: Report) -> str:
    """Serve and the gateway, if they are not there yet; returns the URL at which the gateway is going to answer."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    address = _serve_address()
    if address is None:
        check_port(settings.host, settings.port)
        address = (settings.host, settings.port)
        # Serve's controller replaces a proxy that is late; one that has to wait on a busy machine is killed meanwhile,
        # but a new one comes, and whether it answers is asked below.
        with contextlib.suppress(RayActorError, TimeoutError):
            serve.start(
                # One door with one known address; nodes that share a machine do not fight over the port.
                proxy_location="HeadOnly",
                http_options={"host": settings.host, "port": settings.port},
                logging_config={"log_level": "WARNING", "enable_access_log": False},
                controller_options={"runtime_env": {"env_vars": _CONTROLLER}},
            )
    elif address != (settings.host, settings.port):
        report(
            Event("serve", message=f"Serve already listens on {address[0]} port {address[1]}; the model joins there")
        )
    if serve.status().applications.get(_GATEWAY) is None:
        _submit(_GATEWAY, _gateway_app(), "/")
    return _url(*address)


def _serve_address() -> tuple[str, int] | None:
    """Where this cluster's Serve listens, if it runs."""
    from ray.serve.context import _get_global_client

    try:
        options = _get_global_client().http_config
    except RayServeException:
        return None
    return options.host, options.port


def _url(host: str, port: int) -> str:
    """An address to connect to; one that means every interface becomes the head node's own."""
    if host in {"0.0.0.0", "::", ""}:
        heads = [n["NodeManagerAddress"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]]
        host = heads[0] if heads and heads[0] != ray.util.get_node_ip_address() else "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _gateway_app() -> Any:
    """It computes nothing, so it reserves no CPU: a 2-core machine keeps room for a model's old and new version."""
    return serve.deployment(
        serve.ingress(build_gateway)(),
        name="Gateway",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_GATEWAY_REQUESTS,
        max_surge_percent=100,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=60.0,
    ).bind()


def _model_app(served: Served) -> Any:
    scale, settings = served.scale, served.settings
    gpus = ray.cluster_resources().get("GPU", 0.0)
    # Replicas share the GPUs there are, one share kept free for the next version.
    share = math.floor(100 * min(1.0, gpus / (settings.max_replicas + 1))) / 100
    return serve.deployment(
        ModelReplica,
        name=_MODEL,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": share},
        autoscaling_config=AutoscalingConfig(**scale.autoscaling()),
        max_ongoing_requests=scale.max_ongoing_requests,
        max_queued_requests=scale.max_queued_requests,
        max_constructor_retry_count=_STARTS,
        # The new replica starts beside the old one where there is room; else requests wait while it takes its place.
        max_surge_percent=100 if _has_room(served) else 0,
        health_check_period_s=10.0,
        health_check_timeout_s=max(30.0, settings.request_timeout_s),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.request_timeout_s + 5.0,
    ).bind(served, "cuda" if gpus else "cpu")


def _has_room(served: Served) -> bool:
    return bool(ray.available_resources().get("CPU", 0.0) >= served.settings.cpus_per_replica)


def _submit(app: str, target: Any, route_prefix: str | None) -> None:
    """Hand it to Serve. Raises ServingFailed if that refuses."""
    try:
        serve.run_many([serve.RunTarget(target, app, route_prefix)], wait_for_applications_running=False)
    except (RayServeException, RuntimeError, ValueError) as error:
        raise ServingFailed(f"Serve refused {app} ({error})", "see `ray status` and Serve's logs") from None


def _wait_running(app: str) -> None:
    """Until it runs. Raises ServingFailed with the replica's own reason."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline:
        status = serve.status().applications[app]
        if status.status == "RUNNING":
            return
        if status.status in {"DEPLOY_FAILED", "UNHEALTHY"}:
            raise ServingFailed(f"{app} did not start ({_reason(status)})", "repair it, then serve again")
        time.sleep(0.1)
    raise ServingFailed(
        f"{app} was not ready within {_READY_TIMEOUT_S:.0f} s ({_reason(status)})",
        "free some CPUs, lower serving.cpus_per_replica, or add a node",
    )


def _reason(status: Any) -> str:
    """The last line of the replica's traceback, or what Serve says."""
    messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines()]
    raised = [
        line for line in lines if re.match(r"([\w.]+\.)?\w*(Error|Exception|Failed|Full|InUse|NotFound)\b.*: ", line)
    ]
    return (raised or [line for line in lines if line] or ["no reason given"])[-1]


def _running(name: str) -> Served | None:
    """What the replicas that answer now are made from."""
    if MODEL_APP + name not in serve.status().applications:
        return None
    try:
        served: Served = serve.get_app_handle(MODEL_APP + name).describe.remote().result(timeout_s=_PATIENCE_S)[0]
    except (*_NO_ANSWER, BackPressureError, RayServeException, TimeoutError):
        return None
    return served


def _restore(served: Served, before: Served | None, report: Report) -> None:
    """Serve would go on trying to start what failed: give it back what worked, or nothing."""
    if before is None:
        undeploy(served.name)
        return
    report(Event("serve", message=f"{served.name} version {before.version} goes on answering"))
    with contextlib.suppress(ServingFailed):
        _submit(before.app, _model_app(before), None)
        _wait_running(before.app)


def _wait_until_known(url: str, served: Served) -> None:
    """The gateway looks once a second; asked here as any client would."""
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        if _answered_version(url, served.name) == str(served.version):
            return
        time.sleep(0.1)
    raise ServingFailed(f"{url} does not answer with {served.name} version {served.version}", "see Serve's logs")


def _answered_version(url: str, name: str) -> str | None:
    try:
        with urllib.request.urlopen(f"{url}/v1/models/{name}", timeout=5.0) as answer:
            version: str = json.load(answer)["model_version"]
    except (OSError, ValueError):
        return None
    return version
