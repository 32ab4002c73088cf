"""Serve's applications one by one: handed over, waited for, asked, taken away. And the commands that do so, one at a time.

In: an application's name. Out: its status, and what its replicas say. What Ray raises meanwhile comes out as ServingFailed.
Every function expects Ray to be connected already.
"""

from __future__ import annotations

import base64
import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from orchestrator.errors import ServingFailed
from orchestrator.serving.contract import Answers
from orchestrator.serving.known_answers import Ask
from orchestrator.serving.shelf import Refusal

READY_S = 300.0
"""How long an application may take to start. ``host.py`` waits longer: the reason that is given here is the better one."""
PATIENCE_S = 5.0
"""How long a replica that has nothing else to do may take to say what it is."""
_WAKING_S = 120.0
"""How long one may take that is busy, or that has to start first."""
_CLOSING_S = 3700.0
"""A request may take an hour; Serve itself ends what takes longer."""
_TURN_S = 600.0
_POLL_S = 0.1
_ALIVE = ("RUNNING", "UPDATING", "RECOVERING", "PENDING_MIGRATION")


def applications() -> dict[str, Any]:
    """Their status, by name; without those that are being taken away. Raises ServingFailed."""
    return {app: status for app, status in _statuses().items() if status.status != "DELETING"}


def _statuses() -> dict[str, Any]:
    with _as_serving_failed("Serve's controller"):
        statuses: dict[str, Any] = serve.status().applications
    return statuses


def replicas(status: Any, *states: str) -> int:
    """How many an application has in these states."""
    return sum(each.replica_states.get(state, 0) for each in status.deployments.values() for state in states)


def submit(app: str, target: Any) -> None:
    """Hand it to Serve. Raises ServingFailed if that refuses."""
    try:
        serve.run_many([serve.RunTarget(target, app, None)], wait_for_applications_running=False)
    except (RayError, RayServeException, RuntimeError, ValueError, TimeoutError) as error:
        raise ServingFailed(f"Serve refused {app} ({error})", "see `ray status` and Serve's logs") from None


def wait_running(app: str) -> None:
    """Until it runs. Raises ServingFailed with the replica's own reason."""
    deadline = time.monotonic() + READY_S
    while (status := _statuses().get(app)) is not None:
        if status.status == "RUNNING":
            return
        if status.status in {"DEPLOY_FAILED", "UNHEALTHY"}:
            raise ServingFailed(f"{app} did not start ({_reason(status)})", "repair it, then serve again")
        if time.monotonic() > deadline:
            raise ServingFailed(
                f"{app} was not ready within {READY_S:.0f} s ({_reason(status)})",
                "free some CPUs, lower serving.cpus_per_replica, or add a node",
            )
        time.sleep(_POLL_S)
    raise ServingFailed(f"{app} was taken away while it started", "serve it again")


def _reason(status: Any) -> str:
    """The last line of the replica's traceback, or what Serve says."""
    messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines()]
    raised = [
        line for line in lines if re.match(r"([\w.]+\.)?\w*(Error|Exception|Failed|Full|InUse|NotFound)\b.*: ", line)
    ]
    return (raised or [line for line in lines if line] or ["no reason given"])[-1]


def called(app: str, method: str, timeout_s: float, *arguments: Any, model: str = "") -> Any:
    """What a replica of it answers. Leaves nothing behind that would go on in this process, and complain when Ray is left.

    Raises ServingFailed: it is not there, did not answer in time, or raised something.
    """
    with _as_serving_failed(app):
        handle = serve.get_app_handle(app).options(method_name=method, multiplexed_model_id=model)
        try:
            return handle.remote(*arguments).result(timeout_s=timeout_s)
        finally:
            handle.shutdown()


def asked_directly(app: str, method: str, first: Any, model: str = "") -> Ask:
    """Asked past the gateway, which may not know it yet. ``first``: of the method's arguments. ``model``: on a shelf, which."""

    def ask(inputs: list[Any]) -> list[dict[str, Any]]:
        raw = [given if isinstance(given, str) else base64.b64decode(given["b64"]) for given in inputs]
        answers: Answers | Refusal = called(app, method, READY_S, first, raw, model=model)
        if isinstance(answers, Refusal):
            told = f" ({answers.reason})" if answers.reason else ""
            raise ServingFailed(answers.message + told, answers.next_step)
        return answers.outputs

    return ask


def described(app: str, method: str) -> Any | None:
    """What its replicas say that it is; None: it is not there, or never came up. One that nobody asked for long is woken.

    Raises ServingFailed if it runs and is silent: who replaced it now could not put it back.
    """
    deadline = time.monotonic() + _WAKING_S
    while (status := applications().get(app)) is not None:
        if status.status not in {"RUNNING", "UNHEALTHY"} and not replicas(status, *_ALIVE):
            return None
        try:
            return called(app, method, max(PATIENCE_S, deadline - time.monotonic()))
        except ServingFailed as error:
            if time.monotonic() > deadline:
                raise ServingFailed(
                    f"{app} runs here and does not say which version it is ({error.message})",
                    "try again when it is less busy, or take it off first: orchestrator serve RECIPE --stop",
                ) from None
        time.sleep(5 * _POLL_S)
    return None


def delete(*apps: str) -> bool:
    """Take them away, once their open requests are answered; False if none was there. Raises ServingFailed."""
    there = [app for app in apps if app in _statuses()]
    for app in there:
        with _as_serving_failed("Serve's controller"):
            serve.delete(app, _blocking=False)
    deadline = time.monotonic() + _CLOSING_S
    while left := [app for app in there if app in _statuses()]:
        if time.monotonic() > deadline:
            raise ServingFailed(f"{', '.join(left)} did not end within {_CLOSING_S:.0f} s", "see Serve's logs")
        time.sleep(_POLL_S)
    return bool(there)


@contextlib.contextmanager
def _as_serving_failed(who: str) -> Iterator[None]:
    try:
        yield
    except (RayError, RayServeException, TimeoutError) as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ServingFailed(f"{who} fails to answer ({told})", "see `ray status` and Serve's logs") from None


@contextlib.contextmanager
def one_at_a_time(what: str) -> Iterator[None]:
    """Of the commands that change the same thing: each looks what is there, and writes it anew. A command that dies leaves the
    lock open, for its actor dies with it. Raises ServingFailed when another takes longer than ten minutes."""

    class Lock:  # an actor whose name there can be but once; local, so that its process imports nothing for it
        pass

    deadline = time.monotonic() + _TURN_S
    while True:
        try:
            lock = ray.remote(num_cpus=0)(Lock).options(name=f"{what}-lock", namespace="orchestrator").remote()
            break
        except ValueError:  # the name is taken
            if time.monotonic() > deadline:
                raise ServingFailed(f"another command is changing {what}", "try again when it has ended") from None
            time.sleep(0.2)
    try:
        yield
    finally:
        ray.kill(lock)
