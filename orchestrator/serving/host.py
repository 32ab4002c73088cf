"""The background process that keeps a local endpoint up after the command has returned.

In: a recipe and a version. Out: an EndpointRecord once the endpoint answers. The process is the same command with
``--block``; it leaves a note (pid, Ray address, token) in the storage, by which later commands find, update and stop it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.errors import ServingFailed
from orchestrator.recipe import Recipe
from orchestrator.recipe_file import to_yaml
from orchestrator.storage import Storage, atomic_write, endpoint_host_file

_READY_TIMEOUT_S = 420.0
"""Longer than a deployment waits for room (``applications_on_ray``): its reason says what to do."""
_STOP_TIMEOUT_S = 40.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Host:
    """A running background process and how to join its Ray instance."""

    pid: int
    address: str
    token_path: str | None
    url: str


def find_host(storage: Storage, port: int) -> Host | None:
    """The process that serves on this port from this storage folder, if it lives."""
    note = storage.read_json(endpoint_host_file(port))
    if note is None or not _is_host(note["pid"]):
        return None
    return Host(**note)


def announce(storage: Storage, port: int, host: Host) -> None:
    """Called by the process itself once its endpoint answers."""
    storage.write_json(endpoint_host_file(port), asdict(host))


def withdraw(storage: Storage, port: int, pid: int) -> None:
    """Of this process alone: another may have come after it."""
    note = storage.read_json(endpoint_host_file(port))
    if note is not None and note["pid"] == pid:
        storage.path(endpoint_host_file(port)).unlink(missing_ok=True)


@contextlib.contextmanager
def one_starts(storage: Storage, port: int) -> Iterator[None]:
    """Of the commands that want an endpoint on this port: the next one finds what the one before it has started."""
    lock = storage.path(f"serve/host-{port}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:  # open until it is closed or the process dies, in whatever way
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def start_host(recipe: Recipe, storage: Storage, version: int) -> Host:
    """Start the process and wait until its endpoint answers. Within ``one_starts``, where ``find_host`` finds none.

    Raises:
        ServingFailed: it ended before that, with the reason it gave, or took longer than seven minutes.
    """
    port = recipe.serving.port
    log = storage.path(f"serve/host-{port}.log")
    recipe_file = storage.path(f"serve/host-{port}.yaml")
    atomic_write(recipe_file, to_yaml(recipe).encode())
    command = [
        sys.executable,
        "-m",
        "orchestrator.cli",
        "serve",
        str(recipe_file),
        "--version",
        str(version),
        "--block",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True
        )
    return _wait_ready(process, storage, port, log)


def _wait_ready(process: subprocess.Popen[bytes], storage: Storage, port: int, log: Path) -> Host:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if (host := find_host(storage, port)) and host.pid == process.pid:
            return host
        if process.poll() is not None:
            raise ServingFailed(_last_words(log), f"the whole log is {log}")
        time.sleep(_POLL_S)
    process.terminate()
    raise ServingFailed(f"the endpoint did not answer within {_READY_TIMEOUT_S:.0f} s", f"its log is {log}")


def stop_host(storage: Storage, port: int) -> bool:
    """End the process and wait until it is gone; False if there was none."""
    host = find_host(storage, port)
    if host is None:
        return False
    os.kill(host.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while _is_host(host.pid) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    with contextlib.suppress(ProcessLookupError):
        if _is_host(host.pid):
            os.killpg(host.pid, signal.SIGKILL)
    withdraw(storage, port, host.pid)
    return True


def wait_for_signal() -> None:
    """Return at SIGTERM or SIGINT."""
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: stopped.append(received))
    while not stopped:
        time.sleep(_POLL_S)


def _is_host(pid: int) -> bool:
    """Whether this pid is alive and runs our command: a pid may have been given to another process since."""
    try:
        os.kill(pid, 0)
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:
        return False
    return b"orchestrator" in words and not state.startswith(" Z")


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (told or lines or ["the endpoint's process ended without a word"])[-1]
