"""Connecting to Ray: a private instance on this machine, or the cluster at an address; and leaving it cleanly.

A private instance has its own folder (mode 0700), its own token and its own ports, and ends with the ``with`` block.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import ResourceError, UserError

# Ray reads these when it is imported or started; what a user has set already wins.
_RAY_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # dead workers are seen four times sooner
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # logs an error at each run where there is no preemption notice
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # of the processes that we start; of this one see _start_no_other
    "RAY_DEDUP_LOGS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "TOKENIZERS_PARALLELISM": "true",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
# Of a private instance: what only a dashboard would show takes a tenth of a core all the time.
_UNWATCHED = {
    "RAY_enable_metrics_collection": "0",
    "RAY_metrics_report_interval_ms": "100000",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
}
_OBJECT_STORE_BYTES = 512 * 1024 * 1024
_LONGEST_SCRATCH_ROOT = 24
_LEAVING_S = 5.0


@dataclass(frozen=True)
class Resources:
    """What the cluster has at the moment of connecting."""

    nodes: int
    cpus: float
    gpus: float
    cpus_of_largest_node: float
    free_cpus: float
    """Not taken by an endpoint or another run."""

    def __str__(self) -> str:
        return f"{self.nodes} node{'s' * (self.nodes != 1)}, {self.cpus:g} CPUs, {self.gpus:g} GPUs"


@dataclass(frozen=True)
class Session:
    """An open connection to Ray."""

    address: str
    resources: Resources
    scratch: Path
    """A folder of this process for Ray's own bookkeeping; gone with the session."""
    is_private: bool
    """Started by this process and ended with it."""
    token_path: str | None = None


def inside_ray_job() -> bool:
    """Whether this process is the entry point of a submitted job, whose working folder vanishes at its end."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def lasting_storage(root: str) -> str:
    """Where results really go. A relative folder of a submitted job would vanish with the job's working folder: it moves
    to the home folder of the head node, where the job runs."""
    if not inside_ray_job() or "://" in root or Path(root).expanduser().is_absolute():
        return root
    return str(Path.home() / "orchestrator" / (Path(root).name or "runs"))


def refuse_unshared_storage(wanted: str, root: str, nodes: int) -> None:
    """Raises UserError when ``wanted`` was moved to ``root`` and there are nodes that cannot see it."""
    if root != wanted and nodes > 1:
        raise UserError(
            f"storage {wanted!r} is relative and would lie on the head node alone, but the cluster has {nodes} nodes",
            "give a path that every node sees, or a URL: --storage /mnt/shared/runs, --storage s3://bucket/runs",
        )


@contextlib.contextmanager
def connect(address: str | None = None, *, token_path: str | None = None) -> Iterator[Session]:
    """Join the cluster at ``address`` (or RAY_ADDRESS, as in submitted jobs), or start a private instance.

    Raises:
        ResourceError: there is no cluster at the address.
    """
    for name, value in _RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise ResourceError(
            f"{address} is a job server; here the address of Ray itself is needed",
            "give HOST:6379, or hand the work to the job server: orchestrator submit VERB RECIPE --address URL",
        )
    scratch = Path(tempfile.mkdtemp(prefix="orch-", dir=_scratch_root()))
    _start_no_other()
    try:
        with _private(scratch) if address is None else _joined(address, scratch, token_path) as session:
            yield session
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _start_no_other() -> None:
    """A thread that is late to notice our leaving must not start another Ray: Ray would, and asks the environment whether it
    may when it is imported, which may have been before."""
    from ray._private import auto_init_hook

    auto_init_hook.enable_auto_connect = False


@contextlib.contextmanager
def _private(scratch: Path) -> Iterator[Session]:
    token_path = scratch / "token"
    token_path.touch(mode=0o600)
    token_path.write_text(secrets.token_hex(32))
    # Ray's agents put sockets into TMPDIR itself.
    short = {"TMPDIR": _scratch_root()} if _scratch_root() else {}
    with _showing(token_path), _environment(_UNWATCHED | short):
        import ray

        with _own_answer_to_sigterm():
            ray.init(
                num_cpus=available_cpus(),
                _temp_dir=str(scratch / "ray"),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        try:
            gcs: str = ray.get_runtime_context().gcs_address
            yield Session(gcs, _resources(ray), scratch, is_private=True, token_path=str(token_path))
        finally:
            ray.shutdown()
            _end_what_is_left(token_path)


def _end_what_is_left(token_path: Path) -> None:
    """A process of Ray now and then hangs while it exits, and would stay for ever. Ours have our token in their environment."""
    deadline = time.monotonic() + _LEAVING_S
    while left := _workers_with(f"RAY_AUTH_TOKEN_PATH={token_path}".encode()):
        if time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.1)


def _workers_with(variable: bytes) -> list[int]:
    """Pids of Ray's workers that were started with it; none where there is no /proc."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended, or is not ours to read
            is_worker = (process / "cmdline").read_bytes().startswith(b"ray::")
            if is_worker and variable in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


@contextlib.contextmanager
def _joined(address: str, scratch: Path, token_path: str | None) -> Iterator[Session]:
    with _showing(Path(token_path)) if token_path is not None else contextlib.nullcontext():
        import ray

        try:
            with _own_answer_to_sigterm():
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # noqa: BLE001  Ray raises whatever went wrong underneath
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ResourceError(
                f"cannot join the Ray cluster at {address!r} ({reason})",
                "check that it runs and that RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH holds its token, "
                "or leave --address out to use this machine",
            ) from None
        try:
            yield Session(address, _resources(ray), scratch, is_private=False, token_path=token_path)
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _own_answer_to_sigterm() -> Iterator[None]:
    """Ray puts its own handler in the place of one that the process has: afterwards the process's is back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _showing(token_path: Path) -> Iterator[None]:
    """In the block this process and those it starts show the token in this file (mode 0600, unlike Ray's own default
    file), and no other: a token in RAY_AUTH_TOKEN, meant for some cluster, would win over it."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": str(token_path)}
    try:
        with _environment(token):
            _read_token_again()
            yield
    finally:
        _read_token_again()


@contextlib.contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """In the block the variables have these values (None: they are not there), afterwards what they had before."""
    before = {name: os.environ.get(name) for name in values}
    _set_variables(values)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _read_token_again() -> None:
    """Ray read its variables when it was imported."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # made by Cython

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _scratch_root() -> str | None:
    """Where Ray's sockets go: a path of a socket has at most 107 characters, 82 of which come after this folder. None: the
    system's folder for temporary files, which is short enough almost everywhere."""
    too_long = len(tempfile.gettempdir()) > _LONGEST_SCRATCH_ROOT
    return "/tmp" if too_long and os.access("/tmp", os.W_OK) else None


def available_cpus() -> int:
    """Cores this process may use: the affinity mask, then the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def _resources(ray: Any) -> Resources:
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [float(node.get("CPU", 0.0)) for node in alive]
    gpus = sum(float(node.get("GPU", 0.0)) for node in alive)
    free = float(ray.available_resources().get("CPU", 0.0))
    return Resources(len(alive), sum(cpus), gpus, max(cpus, default=0.0), free)
