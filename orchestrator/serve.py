"""The serve stage: a version behind the endpoint, a new one beside it, and the way back.

In: a registered version. Out: ``EndpointRecord``. On a cluster the endpoint is the cluster's; on one machine it lives in a
background process of its own. What ``orchestrator models`` says of a version, a rollout that is under way hears as well.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.errors import ModelNotFound, ServingFailed, UserError
from orchestrator.evaluation.predictions import read_samples
from orchestrator.progress import Event, Report
from orchestrator.recipe import Recipe
from orchestrator.recipe_serving import Listen
from orchestrator.records import EndpointRecord, VersionRecord
from orchestrator.registry.listing import act_on_models
from orchestrator.registry.store import CHALLENGER, CHAMPION, Registry
from orchestrator.session import Session, connect
from orchestrator.storage import SAMPLES, Storage

if TYPE_CHECKING:
    from orchestrator.serving.host import Host

Mode = Literal["canary", "shadow", "ab"]


@dataclass(frozen=True)
class ServeStage:
    recipe: Recipe
    storage: Storage
    registry: Registry
    address: str | None
    connect: Callable[[], Session]
    disconnect: Callable[[], None]
    report: Report

    @property
    def on_cluster(self) -> bool:
        return bool(self.address or os.environ.get("RAY_ADDRESS"))

    def version_to_serve(self, version: int | None = None) -> VersionRecord:
        """The given version, or the champion. Raises ServingFailed when there is none."""
        if version is not None:
            return self.registry.get(self.recipe.name, version)
        try:
            return self.registry.get(self.recipe.name, CHAMPION)
        except ModelNotFound:
            raise ServingFailed(
                f"{self.recipe.name} has no champion", "see why: orchestrator promote, then serve"
            ) from None

    def serve(self, version: VersionRecord) -> EndpointRecord:
        """Put a version behind the endpoint: on the cluster, or in a background process of this machine."""
        from orchestrator.serving.host import find_host, one_starts, start_host

        if self.on_cluster:
            return self._deploy(version, self.connect(), pid=None)
        self.disconnect()  # the endpoint's own Ray needs the cores
        started, settings = time.monotonic(), self.recipe.serving
        with one_starts(self.storage, settings.port):
            host = find_host(self.storage, settings.port)
            if host is None:
                self.report(Event("serve", message=f"starting the endpoint on port {settings.port}"))
                host = start_host(self.recipe, self.storage, version.version)
                seconds = time.monotonic() - started
                return self._endpoint(version, host.url, settings, host.address, host.pid, seconds)
        self.report(Event("serve", message=f"updating the endpoint at {host.url}"))
        with connect(host.address, token_path=host.token_path) as session:
            return self._deploy(version, session, pid=host.pid)

    def in_foreground(self, version: int | None) -> dict[str, Any]:
        """Serve from this process until it gets SIGTERM or SIGINT, then let requests finish and stop."""
        from orchestrator.serving.address import check_port
        from orchestrator.serving.host import Host, announce, wait_for_signal, withdraw
        from orchestrator.serving.on_ray import shutdown

        port = self.recipe.serving.port
        check_port(self.recipe.serving.host, port)  # before Ray is started for nothing
        session = self.connect()
        endpoint = self._deploy(self.version_to_serve(version), session, pid=os.getpid())
        announce(self.storage, port, Host(os.getpid(), session.address, session.token_path, endpoint.url))
        self.report(Event("serve", message=f"{endpoint.url} is up; Ctrl-C stops it"))
        try:
            wait_for_signal()
        finally:
            withdraw(self.storage, port, os.getpid())
            shutdown()
        return {"stage": "serve", "stopped": True}

    def roll_out(self, version: int | None, mode: Mode, share: float) -> dict[str, Any]:
        """Put a version beside the one that answers. ``version``: None for what ``choose_candidate`` finds."""
        from orchestrator.serving.host import find_host

        if self.on_cluster:
            self.connect()
            return self._roll_out(version, mode, share)
        host = find_host(self.storage, self.recipe.serving.port)
        if host is None:
            raise ServingFailed(
                f"no endpoint runs on port {self.recipe.serving.port}", "first: orchestrator serve RECIPE"
            )
        self.disconnect()
        with connect(host.address, token_path=host.token_path):
            return self._roll_out(version, mode, share)

    def _roll_out(self, number: int | None, mode: Mode, share: float) -> dict[str, Any]:
        from orchestrator.serving.on_ray import answering_version, roll_out
        from orchestrator.serving.served import served_version

        name = self.recipe.name
        version = (
            self.registry.get(name, number)
            if number is not None
            else choose_candidate(self.registry.versions(name), answering_version(name))
        )
        known = read_samples(self.registry.open(version) / SAMPLES)
        served = served_version(self.registry, version, self.recipe.serving)
        plan = roll_out(served, mode, share, self.report, known, self.recipe.registry.url)
        told = plan.model_dump(mode="json", exclude={"terms", "registry", "checked", "settled"})
        return {"stage": "serve", "rollout": told}

    def stop(self) -> dict[str, Any]:
        """Take this model off the endpoint; on one machine, the last one takes the endpoint with it."""
        from orchestrator.serving.host import find_host, stop_host

        if self.on_cluster:
            self.connect()
            return self._undeploy()
        host = find_host(self.storage, self.recipe.serving.port)
        if host is None:
            return {"stage": "serve", "stopped": False}
        self.disconnect()
        if others := self._others(host):
            with connect(host.address, token_path=host.token_path):
                return self._undeploy() | {"left": others}
        stopped = stop_host(self.storage, self.recipe.serving.port)
        end_rollout(self.storage, self.recipe.name)
        return {"stage": "serve", "stopped": stopped}

    def _others(self, host: Host) -> list[str]:
        """Models that answer beside this one; none where the endpoint does not say, which is then ended."""
        with contextlib.suppress(Exception), connect(host.address, token_path=host.token_path):
            from orchestrator.serving.on_ray import served_names

            return sorted(served_names() - {self.recipe.name})
        return []

    def _undeploy(self) -> dict[str, Any]:
        from orchestrator.serving.on_ray import undeploy

        stopped = undeploy(self.recipe.name)
        end_rollout(self.storage, self.recipe.name)
        return {"stage": "serve", "stopped": stopped, "taken_off": self.recipe.name}

    def _deploy(self, version: VersionRecord, session: Session, pid: int | None) -> EndpointRecord:
        from orchestrator.serving.on_ray import deploy, listens
        from orchestrator.serving.served import served_version

        started = time.monotonic()
        known = read_samples(self.registry.open(version) / SAMPLES)
        url = deploy(served_version(self.registry, version, self.recipe.serving), self.report, known)
        there = listens() or self.recipe.serving
        return self._endpoint(version, url, there, session.address, pid, time.monotonic() - started)

    def _endpoint(
        self, version: VersionRecord, url: str, listen: Listen, address: str, pid: int | None, seconds: float
    ) -> EndpointRecord:
        settings = self.recipe.serving
        return EndpointRecord(
            name=version.name, version=version.version, url=url, predict_url=f"{url}/v1/models/{version.name}:predict",
            host=listen.host, port=listen.port, min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas, ray_address=address, pid=pid, seconds=seconds,
        )  # fmt: skip


def choose_candidate(versions: Sequence[VersionRecord], stable: int) -> VersionRecord:
    """What is tried beside the version ``stable`` where nobody says: a newer challenger, or else the champion, or else the
    newest. ``versions``: oldest first. Raises ServingFailed where there is none."""
    newer = [version for version in versions if version.version > stable]
    challengers = [version for version in newer if CHALLENGER in version.aliases]  # an older one was held back long ago
    champions = [version for version in versions if CHAMPION in version.aliases and version.version != stable]
    for found in (challengers, champions, newer):
        if found:
            return found[-1]
    raise ServingFailed(f"version {stable} answers already, and no other is to be tried beside it",
                        "name one with --version N, or train and `orchestrator promote RECIPE`")  # fmt: skip


def end_rollout(storage: Storage, name: str) -> None:
    """Of a model that was taken off the endpoint."""
    from orchestrator.serving.plans import mark_settled, read_end, read_plan, write_end

    plan = read_plan(storage, name)
    if plan is not None and not plan.settled:
        if read_end(storage, plan) is None:
            write_end(storage, plan, "rollback", "the model was taken off the endpoint")
        mark_settled(storage, plan)


_BY_HAND = "orchestrator serve RECIPE brings it to the endpoint"


def change_models(storage: str, url: str | None, words: Sequence[str], alias: str) -> tuple[Any, str]:
    """What ``act_on_models`` does; and what was rolled out of that model hears of it: whoever promotes the candidate has it
    answer everybody, and going back takes it off the endpoint. The text says what moves by itself and what does not."""
    match list(words):
        case ["promote", name, version] if alias == CHAMPION:
            values, text = act_on_models(storage, url, words, alias)
            return values, f"{text}; {_after_promoting(Storage(storage), name, int(version))}"
        case ["rollback", name] if alias == CHAMPION:
            return _go_back(Storage(storage), url, name)
    return act_on_models(storage, url, words, alias)


def _after_promoting(storage: Storage, name: str, version: int) -> str:
    from orchestrator.serving.plans import read_plan, write_end

    plan = read_plan(storage, name)
    if plan is None or plan.settled or plan.candidate != version:
        return _BY_HAND
    end = write_end(storage, plan, "promote", "by hand")
    if end.kind == "rollback":
        return f"its rollout was taken back ({end.reason}), so {_BY_HAND}"
    return "an endpoint that runs sends everybody to it within seconds, and orchestrator serve RECIPE makes it the stable one"


def _go_back(storage: Storage, url: str | None, name: str) -> tuple[Any, str]:
    """A rollout goes first; the alias moves too, unless it has been at the stable version all the time."""
    from orchestrator.serving.plans import read_end, read_plan, write_end

    words, plan = ["rollback", name], read_plan(storage, name)
    before = None if plan is None else read_end(storage, plan)
    if plan is None or plan.settled or (before is not None and before.kind == "rollback"):
        values, text = act_on_models(storage.url, url, words, CHAMPION)
        return values, f"{text}; {_BY_HAND}"
    end = write_end(storage, plan, "rollback", "by hand")
    if end.kind == "rollback":
        told = (f"version {plan.candidate} of {name} is taken back: an endpoint that runs asks version {plan.stable} alone "
                "within seconds")  # fmt: skip
    else:
        told = f"an endpoint that runs goes on with version {plan.candidate} until orchestrator serve RECIPE"
    url = url or plan.registry
    if _champion(storage, url, name) != plan.candidate:
        return end.model_dump(), told
    values, text = act_on_models(storage.url, url, words, CHAMPION)
    return values, f"{text}; {told}"


def _champion(storage: Storage, url: str | None, name: str) -> int | None:
    try:
        return Registry(storage, url).get(name, CHAMPION).version
    except UserError:  # there is none, or no registry
        return None
