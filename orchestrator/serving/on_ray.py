"""Ray Serve: one gateway application, and one application per model behind it, or one shelf of many models.

In: where a version's folder is, and the recipe's goals. Out: a URL that answers with that version. Every function
expects Ray to be connected already. The gateway finds models by asking Serve once a second, so models come, change and
go without it being deployed again. A new version replaces the old one only once it has loaded, verified and warmed up.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from orchestrator.errors import ServingFailed
from orchestrator.progress import Event, Report, ignore
from orchestrator.recipe_serving import Listen, Serving, Shelf
from orchestrator.serving.access import own_key
from orchestrator.serving.address import Endpoint, check_certificate, check_joining, check_port, url_of
from orchestrator.serving.contract import Answers
from orchestrator.serving.gateway_on_ray import GATEWAY, NO_ANSWER, PATIENCE_S, gateway_app
from orchestrator.serving.known_answers import Ask, check_known_answers, over_http
from orchestrator.serving.plans import Plan, read_plan, write_end, write_plan
from orchestrator.serving.replica_on_ray import QUIET, has_room, model_app
from orchestrator.serving.rollout import Mode
from orchestrator.serving.served import (
    CANDIDATE_APP,
    MODEL_APP,
    SHELF_APP,
    GatewayArguments,
    ModelArguments,
    Served,
    ShelfArguments,
)
from orchestrator.serving.shelf import Refusal
from orchestrator.serving.shelf_on_ray import one_at_a_time, shelf_app
from orchestrator.storage import Storage

logging.getLogger("ray.serve").setLevel(logging.WARNING)
_READY_TIMEOUT_S = 300.0


def deploy(served: Served, report: Report = ignore, known: Sequence[Mapping[str, Any]] = ()) -> str:
    """Bring this version to the endpoint, starting Serve if need be; returns the endpoint's URL once it answers, and answers
    as it should. ``known``: rows with the answers that were evaluated (``known_answers.py``).

    If the new version cannot start, the one that answered before goes on answering.

    Raises:
        PortInUse: something else listens on the address.
        ServingFailed: the version did not start, with the reason its replica gave, or does not answer as it did.
    """
    url = _start(served.settings, report)
    own, stood = _running(served.name), _on_shelf().get(served.name)
    try:
        if served.settings.shared:
            _put_on_shelf(served, report, known)
        else:
            _start_own(served, own, stood, report, known)
        _check_endpoint(served, url, known)
    except ServingFailed:
        _put_back(served, own, stood, report)
        raise
    _end_rollout(served)
    return url


def _start_own(
    served: Served, own: Served | None, stood: Served | None, report: Report, known: Sequence[Mapping[str, Any]]
) -> None:
    """Replicas of its own; if it stood on the shelf, they answer as they should before it leaves. Raises ServingFailed."""
    report(Event("serve", message=f"{served.name} version {served.version} starts"))
    if own and not has_room(served):
        report(Event("serve", message="no CPU is free to start it beside the old one: requests wait meanwhile"))
    _submit(served.app, model_app(served), None)
    for app in (GATEWAY, served.app):
        _wait_running(app)
    if stood is not None:
        check_known_answers(_through(served.app, "predict", None), served.name, known, _at_once(served))
        _wait_places(served.name, lambda places: served.app in places)
        _take_off_shelf(served.name)


def _check_endpoint(served: Served, url: str, known: Sequence[Mapping[str, Any]]) -> None:
    """That clients get this version's answers. Raises ServingFailed."""
    with own_key(Storage(served.storage), served.name) if served.settings.keys else nullcontext() as key:
        endpoint = Endpoint(url, key)
        endpoint.wait_for(served.name, str(served.version))
        check_known_answers(over_http(endpoint, served.name), served.name, known, _at_once(served))


def _at_once(served: Served) -> int:
    return min(served.scale.max_batch_size, served.settings.max_instances)


def roll_out(
    served: Served, mode: Mode, share: float, report: Report = ignore, known: Sequence[Mapping[str, Any]] = (),
    registry: str | None = None,
) -> Plan:  # fmt: skip
    """Start this version beside the one that answers, and have it answer a share of the requests (``plans.py``); or change
    the share of a rollout that is under way. The gateway takes it back by itself when it does harm. ``registry``: whose alias
    moves if it promotes it.

    Raises ServingFailed: no other version of the model answers here, there is no room, or it does not start or answer as it
    did when it was evaluated. The stable version is not touched.
    """
    storage, stable = Storage(served.storage), _running(served.name) or _on_shelf().get(served.name)
    if stable is None or stable.version == served.version:
        there = "no version of" if stable is None else f"version {served.version} itself of"
        raise ServingFailed(f"{there} {served.name} answers here", "serve another first: orchestrator serve RECIPE")
    app = CANDIDATE_APP + served.name
    running = _running(served.name, CANDIDATE_APP)
    if running is not None and running.version == served.version:
        return write_plan(storage, served.name, stable.version, served.version, mode, share, served.settings, registry)
    if not has_room(served):
        raise ServingFailed(
            f"no {served.settings.cpus_per_replica:g} CPUs are free to start version {served.version} beside the stable one",
            "lower serving.min_replicas or serving.cpus_per_replica, or add a node",
        )
    report(Event("serve", message=f"{served.name} version {served.version} starts beside version {stable.version}"))
    plan = write_plan(storage, served.name, stable.version, served.version, mode, share, served.settings, registry)
    try:
        _submit(app, model_app(served), None)
        _wait_running(app)
        check_known_answers(_through(app, "predict", None), served.name, known, _at_once(served))
    except ServingFailed as error:
        write_end(storage, plan, "rollback", f"it did not start: {error}", "the deployment")
        serve.delete(app)
        raise
    return plan


def _through(app: str, method: str, first: Any, model: str = "") -> Ask:
    """Asked past the gateway, which may not know it yet. ``first``: of the method's arguments. ``model``: on a shelf, which."""

    def ask(inputs: list[Any]) -> list[dict[str, Any]]:
        raw = [given if isinstance(given, str) else base64.b64decode(given["b64"]) for given in inputs]
        try:
            answers: Answers | Refusal = _called(app, method, _READY_TIMEOUT_S, first, raw, model=model)
        except (RayError, RayServeException, TimeoutError) as error:
            raise ServingFailed(f"{app} fails to answer ({_last_line(error)})", "see Serve's logs") from None
        if isinstance(answers, Refusal):
            told = f" ({answers.reason})" if answers.reason else ""
            raise ServingFailed(answers.message + told, answers.next_step)
        return answers.outputs

    return ask


def _end_rollout(served: Served) -> None:
    """Whatever was rolled out beside the version before: this one is the stable one now."""
    storage, app = Storage(served.storage), CANDIDATE_APP + served.name
    plan = read_plan(storage, served.name)
    if plan is not None:
        kind: Literal["promote", "rollback"] = "promote" if plan.candidate == served.version else "rollback"
        write_end(storage, plan, kind, f"version {served.version} became the stable one")
    if app in serve.status().applications:
        serve.delete(app)


def serving_status() -> dict[str, dict[str, Any]]:
    """Model -> version, status, running replicas and message; of one on the shelf, whose replicas are shared, also whether it
    is loaded."""
    apps = serve.status().applications
    result = _shelf_status(apps[SHELF_APP]) if SHELF_APP in apps else {}
    for app, status in apps.items():
        if app.startswith(MODEL_APP):
            name = app.removeprefix(MODEL_APP)
            replicas = _replicas(status)
            running = _running(name) if replicas else None
            result[name] = {"version": running.version if running else None, "status": status.status.value,
                            "replicas": replicas, "message": status.message}  # fmt: skip
    return result


def _shelf_status(status: Any) -> dict[str, dict[str, Any]]:
    replicas = _replicas(status)
    models = _on_shelf() if replicas else {}
    return {
        name: {"version": served.version, "status": status.status.value, "replicas": replicas, "message": status.message,
               "loaded": _called(SHELF_APP, "loaded", PATIENCE_S, name, model=served.key)}
        for name, served in models.items()
    }  # fmt: skip


def _replicas(status: Any) -> int:
    return sum(deployment.replica_states.get("RUNNING", 0) for deployment in status.deployments.values())


def undeploy(name: str) -> bool:
    """Take a model off the endpoint, once its open requests are answered; False if it was not there."""
    was_shared = _take_off_shelf(name)
    return _delete_own(name) or was_shared


def _delete_own(name: str) -> bool:
    """Its applications; False if it had none."""
    there = serve.status().applications
    for app in (CANDIDATE_APP + name, MODEL_APP + name):
        if app in there:
            serve.delete(app)
    return MODEL_APP + name in there


def shutdown() -> None:
    """End the endpoint and all its models, once the open requests are answered."""
    serve.shutdown()


def gateway_application(arguments: dict[str, Any]) -> Any:
    """For a Serve config file: the application that answers for all models. It has no route: it listens for itself.

    ``arguments``: as ``GatewayArguments`` says. Raises pydantic's ValidationError that names the wrong one.
    """
    wanted = GatewayArguments.model_validate(arguments)
    listen = Listen(**wanted.model_dump(include=set(Listen.model_fields)))
    return gateway_app(listen, wanted.doors, wanted.resource)


def shelf_application(arguments: dict[str, Any]) -> Any:
    """For a Serve config file: the application of many models, which must be named ``shelf`` and have no route.

    ``arguments``: as ``ShelfArguments`` says. Raises pydantic's ValidationError that names the wrong one.
    """
    wanted = ShelfArguments.model_validate(arguments)
    terms = Shelf(**wanted.model_dump(include=set(Shelf.model_fields)))
    return shelf_app(terms, [model.resolve() for model in wanted.models])


def model_application(arguments: dict[str, Any]) -> Any:
    """For a Serve config file: one model's application, which must be named ``model-NAME`` and have no route.

    ``arguments``: as ``ModelArguments`` says. Raises pydantic's ValidationError that names the wrong one.
    """
    return model_app(ModelArguments.model_validate(arguments).resolve())


# --------------------------------------------------------------------------------------------------------- the shelf


def _put_on_shelf(served: Served, report: Report, known: Sequence[Mapping[str, Any]]) -> None:
    """The version loads there and answers as it was evaluated before any client is sent to it; what answered before goes on
    until then. Raises ServingFailed."""
    with one_at_a_time():
        terms, models = _shelf(served.settings.shelf, report)
        report(Event("serve", message=f"{served.name} version {served.version} comes to the shelf, beside "
                                      f"{len(models.keys() - {served.name})} models"))  # fmt: skip
        ask = _through(SHELF_APP, "answer", served, served.key)
        try:
            ask([])  # loads it, and says why not
            check_known_answers(ask, served.name, known, _at_once(served))
        except ServingFailed:
            if models.get(served.name) != served:
                _called(SHELF_APP, "forget", _READY_TIMEOUT_S, served, model=served.key)
            raise
        _fill_shelf(terms, models | {served.name: served})
    _wait_running(GATEWAY)
    _wait_places(served.name, lambda places: SHELF_APP in places)
    _delete_own(served.name)


def _take_off_shelf(name: str) -> bool:
    """False if it did not stand there. The last one takes the shelf with it."""
    if SHELF_APP not in serve.status().applications:
        return False
    with one_at_a_time():
        models = _on_shelf()
        if name not in models:
            return False
        terms: Shelf = _called(SHELF_APP, "listed", _READY_TIMEOUT_S)[0]
        del models[name]
        _fill_shelf(terms, models)
        if not models:
            _wait_places(name, lambda places: SHELF_APP not in places)  # nobody is sent there any more
            serve.delete(SHELF_APP)
    return True


def _shelf(wanted: Shelf, report: Report) -> tuple[Shelf, dict[str, Served]]:
    """Its terms, and what stands there; it is started if it is not there. Raises ServingFailed."""
    if SHELF_APP not in serve.status().applications:
        _fill_shelf(wanted, {})
        return wanted, {}
    terms, models = _called(SHELF_APP, "listed", _READY_TIMEOUT_S)
    if terms != wanted:
        kept = ", ".join(f"{name} {value:g}" for name, value in terms.model_dump().items())
        report(Event("serve", message=f"the shelf that runs here keeps its own terms ({kept})"))
    return terms, {served.name: served for served in models}


def _fill_shelf(terms: Shelf, models: Mapping[str, Served]) -> None:
    """Raises ServingFailed."""
    _submit(SHELF_APP, shelf_app(terms, list(models.values())), None)
    _wait_running(SHELF_APP)


def _on_shelf() -> dict[str, Served]:
    """What stands there, by name; nothing if the shelf does not answer."""
    if SHELF_APP not in serve.status().applications:
        return {}
    try:
        return {served.name: served for served in _called(SHELF_APP, "listed", PATIENCE_S)[1]}
    except (*NO_ANSWER, BackPressureError, RayServeException, TimeoutError):
        return {}


def _wait_places(name: str, right: Callable[[list[str]], bool]) -> None:
    """Until the places where the gateway could ask the model are right. Raises ServingFailed."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while not right(places := _called(GATEWAY, "places", _READY_TIMEOUT_S, name)):
        if time.monotonic() > deadline:
            raise ServingFailed(f"the gateway still asks {name} at {places or 'no place'}", "see Serve's logs")
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------------------- starting


def _start(settings: Serving, report: Report) -> str:
    """Serve and the gateway, if they are not there yet; returns the URL at which the gateway is going to answer."""
    wanted = Listen(**{name: getattr(settings, name) for name in Listen.model_fields})
    there = _listens()
    if there is None:
        check_port(settings.host, settings.port)
        if settings.tls is not None:
            check_certificate(settings.tls)
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        _submit(GATEWAY, gateway_app(wanted), None)
        return _url(wanted)
    check_joining(there.host, settings)
    if there != wanted:
        report(Event("serve", message=f"Serve already listens at {_url(there)}; the model joins there"))
    return _url(there)


def _listens() -> Listen | None:
    """Where this cluster's gateway listens, if it runs."""
    try:
        if GATEWAY not in serve.status().applications:
            return None
        there: Listen = _called(GATEWAY, "listens", _READY_TIMEOUT_S)
    except RayServeException:
        return None
    return there


def _url(listen: Listen) -> str:
    """An address to connect to; one that means every interface becomes the head node's own."""
    host = listen.host
    if host in {"0.0.0.0", "::", ""}:
        heads = [n["NodeManagerAddress"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]]
        host = heads[0] if heads and heads[0] != ray.util.get_node_ip_address() else "127.0.0.1"
    return url_of(host, listen.port, listen.tls is not None)


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


def _called(app: str, method: str, timeout_s: float, *arguments: Any, model: str = "") -> Any:
    """What a replica of it answers. Leaves nothing behind that would go on in this process, and complain when Ray is left."""
    handle = serve.get_app_handle(app).options(method_name=method, multiplexed_model_id=model)
    try:
        return handle.remote(*arguments).result(timeout_s=timeout_s)
    finally:
        handle.shutdown()


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _running(name: str, kind: str = MODEL_APP) -> Served | None:
    """What the replicas that answer now are made from. ``kind``: prefix of the application."""
    if kind + name not in serve.status().applications:
        return None
    try:
        served: Served = _called(kind + name, "describe", PATIENCE_S)[0]
    except (*NO_ANSWER, BackPressureError, RayServeException, TimeoutError):
        return None
    return served


def _put_back(served: Served, own: Served | None, stood: Served | None, report: Report) -> None:
    """What answered before ``served`` came answers again. ``own``, ``stood``: what ran and what stood on the shelf."""
    for before in (own, stood):
        if before is not None:
            report(Event("serve", message=f"{served.name} version {before.version} goes on answering"))
    with contextlib.suppress(ServingFailed):
        if own is None:
            _delete_own(served.name)
        elif not served.settings.shared or _running(served.name) != own:
            # Serve would go on trying to start what failed
            _submit(own.app, model_app(own), None)
            _wait_running(own.app)
        if stood is None:
            _take_off_shelf(served.name)
        elif _on_shelf().get(served.name) != stood:
            with one_at_a_time():
                terms, models = _shelf(stood.settings.shelf, ignore)
                _fill_shelf(terms, models | {stood.name: stood})
