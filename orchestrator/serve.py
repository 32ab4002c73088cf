"""The serve stage: a version behind the endpoint, a new one beside it, and the way back.

In: a registered version. Out: ``EndpointRecord``. On a cluster the endpoint is the cluster's; on one machine it lives in a
background process of its own. What ``orchestrator models`` says of a version, a rollout that is under way hears as well.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.errors import ModelNotFound, ServingFailed
from orchestrator.evaluation.predictions import read_samples
from orchestrator.progress import Event, Report
from orchestrator.recipe import Recipe
from orchestrator.records import EndpointRecord, VersionRecord
from orchestrator.registry.listing import act_on_models
from orchestrator.registry.store import CHALLENGER, CHAMPION, Registry
from orchestrator.session import Session, connect
from orchestrator.storage import SAMPLES, Storage

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
        from orchestrator.serving.host import find_host, start_host

        if self.on_cluster:
            return self._deploy(version, self.connect(), pid=None)
        self.disconnect()  # the endpoint's own Ray needs the cores
        started = time.monotonic()
        host = find_host(self.storage, self.recipe.serving.port)
        if host is None:
            self.report(Event("serve", message=f"starting the endpoint on port {self.recipe.serving.port}"))
            host = start_host(self.recipe, self.storage, version.version)
            return self._endpoint(version, host.url, host.address, host.pid, time.monotonic() - started)
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
            withdraw(self.storage, port)
            shutdown()
        return {"stage": "serve", "stopped": True}

    def roll_out(self, version: int | None, mode: Mode, share: float) -> dict[str, Any]:
        """Put a version beside the one that answers. ``version``: None for the challenger, or else the newest."""
        from orchestrator.serving.host import find_host

        candidate = self._candidate() if version is None else self.registry.get(self.recipe.name, version)
        if self.on_cluster:
            self.connect()
            return self._roll_out(candidate, mode, share)
        host = find_host(self.storage, self.recipe.serving.port)
        if host is None:
            raise ServingFailed(
                f"no endpoint runs on port {self.recipe.serving.port}", "first: orchestrator serve RECIPE"
            )
        self.disconnect()
        with connect(host.address, token_path=host.token_path):
            return self._roll_out(candidate, mode, share)

    def _candidate(self) -> VersionRecord:
        try:
            return self.registry.get(self.recipe.name, CHALLENGER)
        except ModelNotFound:
            return self.registry.get(self.recipe.name, max((v.version for v in self.registry.versions(self.recipe.name)),
                                                           default=1))  # fmt: skip

    def _roll_out(self, version: VersionRecord, mode: Mode, share: float) -> dict[str, Any]:
        from orchestrator.serving.on_ray import roll_out
        from orchestrator.serving.served import served_version

        known = read_samples(self.registry.open(version) / SAMPLES)
        served = served_version(self.registry, version, self.recipe.serving)
        plan = roll_out(served, mode, share, self.report, known, self.recipe.registry.url)
        return {"stage": "serve", "rollout": plan.model_dump(mode="json", exclude={"terms", "registry"})}

    def stop(self) -> dict[str, Any]:
        """Take the endpoint down; on a cluster, this model only."""
        from orchestrator.serving.host import stop_host

        if self.on_cluster:
            from orchestrator.serving.on_ray import undeploy

            self.connect()
            return {"stage": "serve", "stopped": undeploy(self.recipe.name)}
        return {"stage": "serve", "stopped": stop_host(self.storage, self.recipe.serving.port)}

    def _deploy(self, version: VersionRecord, session: Session, pid: int | None) -> EndpointRecord:
        from orchestrator.serving.on_ray import deploy
        from orchestrator.serving.served import served_version

        started = time.monotonic()
        known = read_samples(self.registry.open(version) / SAMPLES)
        url = deploy(served_version(self.registry, version, self.recipe.serving), self.report, known)
        return self._endpoint(version, url, session.address, pid, time.monotonic() - started)

    def _endpoint(
        self, version: VersionRecord, url: str, address: str, pid: int | None, seconds: float
    ) -> EndpointRecord:
        settings = self.recipe.serving
        return EndpointRecord(
            name=version.name, version=version.version, url=url, predict_url=f"{url}/v1/models/{version.name}:predict",
            host=settings.host, port=settings.port, min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas, ray_address=address, pid=pid, seconds=seconds,
        )  # fmt: skip


def change_models(storage: str, url: str | None, words: Sequence[str], alias: str) -> tuple[Any, str]:
    """What ``act_on_models`` does; and a rollout of that version that is under way ends: whoever promotes it has it answer
    everybody, and going back ends it first of all."""
    from orchestrator.serving.plans import read_end, read_plan, write_end

    place = Storage(storage)
    plan = read_plan(place, words[1]) if len(words) > 1 and words[0] in {"promote", "rollback"} else None
    running = plan is not None and alias == CHAMPION and read_end(place, plan) is None
    if plan is not None and running and words[0] == "rollback":
        end = write_end(place, plan, "rollback", "by hand")
        return (
            end.model_dump(),
            f"version {plan.candidate} of {plan.name} is taken back; version {plan.stable} answers all",
        )
    values, text = act_on_models(storage, url, words, alias)
    if plan is not None and running and list(words) == ["promote", plan.name, str(plan.candidate)]:
        write_end(place, plan, "promote", "by hand")
        return values, f"{text}, and answers all requests; orchestrator serve makes it the stable one"
    return values, text
