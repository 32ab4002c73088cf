"""Ray Serve: one gateway application, and one application per model behind it, or one shelf of many models.

In: where a version's folder is, and the recipe's goals. Out: a URL that answers with that version. Every function
expects Ray to be connected already. The gateway finds models by asking Serve once a second, so models come, change and
go without it being deployed again. A new version replaces the old one only once it has loaded, verified and warmed up.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import ray
from ray import serve

from orchestrator.errors import ServingFailed
from orchestrator.progress import Event, Report, ignore
from orchestrator.recipe_serving import Listen, Serving, Shelf
from orchestrator.serving.access import own_key
from orchestrator.serving.address import Endpoint, check_certificate, check_joining, check_port, url_of
from orchestrator.serving.applications_on_ray import (
    PATIENCE_S,
    READY_S,
    applications,
    asked_directly,
    called,
    delete,
    described,
    one_at_a_time,
    replicas,
    submit,
    wait_running,
)
from orchestrator.serving.door_on_ray import GATEWAY, gateway_app
from orchestrator.serving.known_answers import check_known_answers, over_http
from orchestrator.serving.plans import Plan, mark_checked, mark_settled, read_end, read_plan, write_end, write_plan
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
from orchestrator.serving.shelf_on_ray import shelf_app
from orchestrator.serving.shelving_on_ray import on_shelf, put_back_on_shelf, put_on_shelf, take_off_shelf, wait_places
from orchestrator.storage import Storage

logging.getLogger("ray.serve").setLevel(logging.WARNING)


def deploy(served: Served, report: Report = ignore, known: Sequence[Mapping[str, Any]] = ()) -> str:
    """Bring this version to the endpoint, starting Serve if need be; returns the endpoint's URL once it answers, and answers
    as it should. ``known``: rows with the answers that were evaluated (``known_answers.py``).

    If the new version cannot start, the one that answered before goes on answering.

    Raises:
        PortInUse: something else listens on the address.
        ServingFailed: the version did not start, with the reason its replica gave, or does not answer as it did.
    """
    url = _start(served.settings, report)
    with one_at_a_time(served.app):
        own, stood = described_model(served.app), on_shelf().get(served.name)
        try:
            if served.settings.shared:
                put_on_shelf(served, report, known)
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
    submit(served.app, model_app(served))
    for app in (GATEWAY, served.app):
        wait_running(app)
    if stood is not None or CANDIDATE_APP + served.name in applications():  # which may be the same version
        check_known_answers(asked_directly(served.app, "predict", None), served.name, known, served.at_once)
    if stood is not None:
        wait_places(served.name, lambda places: served.app in places)
        take_off_shelf(served.name)


def _check_endpoint(served: Served, url: str, known: Sequence[Mapping[str, Any]]) -> None:
    """That clients get this version's answers. Raises ServingFailed."""
    with own_key(Storage(served.storage), served.name) if served.settings.keys else nullcontext() as key:
        endpoint = Endpoint(url, key)
        called(GATEWAY, "expect", READY_S, endpoint.request_id)
        endpoint.wait_for(served.name, str(served.version))
        check_known_answers(over_http(endpoint, served.name, served.version), served.name, known, served.at_once)


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
    with one_at_a_time(served.app):
        storage, stable = Storage(served.storage), answering_version(served.name)
        if stable == served.version:
            raise ServingFailed(f"version {stable} of {served.name} already answers",
                                "name another with --version N, or train and `orchestrator promote RECIPE`")  # fmt: skip
        begin = partial(
            write_plan, storage, served.name, stable, served.version, mode, share, served.settings, registry
        )
        if _is_under_way(served):
            return begin()
        if not has_room(served):
            raise ServingFailed(
                f"no {served.settings.cpus_per_replica:g} CPUs are free to start version {served.version} beside the stable "
                "one",
                "lower serving.max_replicas and serve again, lower serving.cpus_per_replica, or add a node",
            )
        report(Event("serve", message=f"{served.name} version {served.version} starts beside version {stable}"))
        plan = begin(checked=False)
        try:
            _start_candidate(served, known)
        except ServingFailed as error:
            write_end(storage, plan, "rollback", f"it did not start: {error}", "the deployment")
            delete(CANDIDATE_APP + served.name)
            raise
        mark_checked(storage, plan)
        return plan.model_copy(update={"checked": True})


def _is_under_way(served: Served) -> bool:
    """Whether clients are sent to it already; else, what is left of another rollout goes. Raises ServingFailed where an
    earlier candidate answers everybody: they would be sent back to the version before it."""
    storage, app = Storage(served.storage), CANDIDATE_APP + served.name
    there, plan = described_model(app), read_plan(storage, served.name)
    end = None if plan is None else read_end(storage, plan)
    if plan is not None and there is not None and there.version == plan.candidate:
        if end is not None and end.kind == "promote":
            raise ServingFailed(f"version {there.version} of {served.name} was promoted and answers everybody",
                                "make it the stable one first: orchestrator serve RECIPE")  # fmt: skip
        if end is None and plan.checked and there.version == served.version:
            return True
    if plan is not None and end is None:
        write_end(storage, plan, "rollback", f"version {served.version} is started anew")
    delete(app)
    return False


def _start_candidate(served: Served, known: Sequence[Mapping[str, Any]]) -> None:
    """Raises ServingFailed."""
    # one that sleeps while few are sent to it would be too slow for those
    awake = served.settings.model_copy(update={"min_replicas": max(1, served.settings.min_replicas)})
    app = CANDIDATE_APP + served.name
    submit(app, model_app(replace(served, settings=awake)))
    wait_running(app)
    check_known_answers(asked_directly(app, "predict", None), served.name, known, served.at_once)


def _end_rollout(served: Served) -> None:
    """Whatever was rolled out beside the version before: this one is the stable one now."""
    storage = Storage(served.storage)
    plan = read_plan(storage, served.name)
    if plan is not None and not plan.settled:
        kind: Literal["promote", "rollback"] = "promote" if plan.candidate == served.version else "rollback"
        write_end(storage, plan, kind, f"version {served.version} became the stable one")
        mark_settled(storage, plan)
    delete(CANDIDATE_APP + served.name)


def answering_version(name: str) -> int:
    """The stable one. Raises ServingFailed where the model has none here."""
    there = described_model(MODEL_APP + name) or on_shelf().get(name)
    if there is None:
        raise ServingFailed(f"no version of {name} answers here", "serve one first: orchestrator serve RECIPE")
    return there.version


def described_model(app: str) -> Served | None:
    """What its replicas are made from; None: there is no such application. Raises ServingFailed if it does not say."""
    told = described(app, "describe")
    return None if told is None else told[0]


def served_names() -> set[str]:
    """The models that answer here."""
    return {app.removeprefix(MODEL_APP) for app in applications() if app.startswith(MODEL_APP)} | on_shelf().keys()


def serving_status() -> dict[str, dict[str, Any]]:
    """Model -> version, status, running replicas and message; of one on the shelf, whose replicas are shared, also whether it
    is loaded."""
    apps = applications()
    result = _shelf_status(apps[SHELF_APP]) if SHELF_APP in apps else {}
    for app, status in apps.items():
        if app.startswith(MODEL_APP):
            running, version = replicas(status, "RUNNING"), None
            with suppress(ServingFailed):
                version = called(app, "describe", PATIENCE_S)[0].version if running else None
            result[app.removeprefix(MODEL_APP)] = {"version": version, "status": status.status.value,
                                                   "replicas": running, "message": status.message}  # fmt: skip
    return result


def _shelf_status(status: Any) -> dict[str, dict[str, Any]]:
    running = replicas(status, "RUNNING")
    models = on_shelf() if running else {}
    return {
        name: {"version": served.version, "status": status.status.value, "replicas": running, "message": status.message,
               "loaded": called(SHELF_APP, "loaded", PATIENCE_S, name, model=served.key)}
        for name, served in models.items()
    }  # fmt: skip


def undeploy(name: str) -> bool:
    """Take a model off the endpoint, once its open requests are answered; False if it was not there. Raises ServingFailed."""
    with one_at_a_time(MODEL_APP + name):
        had_its_own = delete(MODEL_APP + name)
        delete(CANDIDATE_APP + name)
        return take_off_shelf(name) or had_its_own


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


# ---------------------------------------------------------------------------------------------------------- starting


def _start(settings: Serving, report: Report) -> str:
    """Serve and the gateway, if they are not there yet; returns the URL at which the gateway is going to answer."""
    wanted = Listen(**{name: getattr(settings, name) for name in Listen.model_fields})
    there = listens()
    if there is None:
        with one_at_a_time(GATEWAY):
            if (there := listens()) is None:
                return _start_gateway(settings, wanted)
    check_joining(there.host, settings)
    report(Event("serve", message=f"the model joins the endpoint at {_url(there)}{_ignored(wanted, there)}"))
    return _url(there)


def _start_gateway(settings: Serving, wanted: Listen) -> str:
    check_port(settings.host, settings.port)
    if settings.tls is not None:
        check_certificate(settings.tls)
    serve.start(proxy_location="Disabled", logging_config=QUIET)
    submit(GATEWAY, gateway_app(wanted))
    return _url(wanted)


def _ignored(wanted: Listen, there: Listen) -> str:
    other = [f"serving.{name}" for name in Listen.model_fields if getattr(wanted, name) != getattr(there, name)]
    if not other:
        return ""
    return f"; {', '.join(other)} stay as they are there: to change them, stop all its models, then serve again"


def listens() -> Listen | None:
    """Where this cluster's gateway listens, if it runs. Raises ServingFailed if it does not say."""
    status = applications().get(GATEWAY)
    if status is None or status.status == "DEPLOY_FAILED":
        return None
    there: Listen = called(GATEWAY, "listens", READY_S)
    return there


def _url(listen: Listen) -> str:
    """An address to connect to; one that means every interface becomes the head node's own."""
    host = listen.host
    if host in {"0.0.0.0", "::", ""}:
        heads = [n["NodeManagerAddress"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]]
        host = heads[0] if heads and heads[0] != ray.util.get_node_ip_address() else "127.0.0.1"
    return url_of(host, listen.port, listen.tls is not None)


def _put_back(served: Served, own: Served | None, stood: Served | None, report: Report) -> None:
    """What answered before ``served`` came answers again. ``own``, ``stood``: what ran and what stood on the shelf; what was
    not there goes. Of a candidate nothing is touched."""
    try:
        if own is None:
            delete(served.app)
        elif not served.settings.shared or described_model(own.app) != own:
            # Serve would go on trying to start what failed
            submit(own.app, model_app(own))
            wait_running(own.app)
        if stood is None:
            take_off_shelf(served.name)
        elif on_shelf().get(served.name) != stood:
            put_back_on_shelf(stood)
    except ServingFailed as error:
        report(Event("serve", message=f"what answered before could not be put back: {error}"))
        return
    for before in (own, stood):
        if before is not None:
            report(Event("serve", message=f"{served.name} version {before.version} goes on answering"))
