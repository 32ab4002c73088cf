"""Ray nodes started as an operator starts them, each with ports, a token and a folder of its own, and ended by pid."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ports import free_port

BIN = Path(sys.executable).parent
Node = subprocess.Popen[str]
_ATTEMPTS = 3
_PORTS = ("node-manager", "object-manager", "dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent",
          "metrics-export", "min-worker", "max-worker")  # fmt: skip


class OwnCluster:
    """A head node; more nodes on demand."""

    def __init__(self, root: Path) -> None:
        self.root, self.port, self.dashboard_port = root, 0, 0
        self.token, token = secrets.token_hex(32), root / "token"
        token.write_text(self.token)
        token.chmod(0o600)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(root),
        }  # fmt: skip
        self.nodes: list[Node] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def _name(self) -> Path:
        """Of the next node, without the number of the attempt."""
        return self.root / f"node-{len(self.nodes)}"

    def start_head(self, cpus: int = 2) -> None:
        def start(log: Path) -> Node:
            self.port, self.dashboard_port = free_port(), free_port()
            return self._start(log, "--head", f"--port={self.port}", f"--dashboard-port={self.dashboard_port}",
                               "--dashboard-host=127.0.0.1", "--include-dashboard=true",
                               f"--ray-client-server-port={free_port()}", f"--num-cpus={cpus}")  # fmt: skip

        self.nodes.append(start_until_up(start, self._is_alive, self._name))

    def start_worker_elsewhere(self, cpus: int = 1) -> None:
        """A node that finds this cluster's folder empty, Ray's sessions and drivers' scratch in it too, as on another
        machine: it has a mount namespace of its own. Why it ended, it says while that is there."""
        logs = f"{self.root}/ray/session_2*/logs"
        hide = (f'mount -t tmpfs -o size=1g none {self.root} && mkdir {self.root}/tmp && "$@" || '
                f"{{ tail -n 30 {logs}/raylet.err {logs}/dashboard_agent.err; exit 1; }}")  # fmt: skip
        environment = self.environment | {"RAY_AUTH_TOKEN": self.token}
        del environment["RAY_AUTH_TOKEN_PATH"]

        def start(log: Path) -> Node:
            return self._start(log, f"--address={self.address}", f"--num-cpus={cpus}",
                               wrapper=("unshare", "--mount", "sh", "-c", hide, "sh"), environment=environment)  # fmt: skip

        self.nodes.append(start_until_up(start, self._is_alive, self._name))

    def _start(
        self, log: Path, *options: str, wrapper: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> Node:
        """Its processes bind to whatever the kernel gives them: a port chosen here may be another's when they start."""
        ports = [f"--{name}-port=0" for name in _PORTS]
        command = [*wrapper, BIN / "ray", "start", "--block", "--node-ip-address=127.0.0.1", f"--node-name={log.stem}",
                   "--object-store-memory=200000000", f"--temp-dir={self.root}/ray", *ports, *options]  # fmt: skip
        with log.open("w") as out:
            return subprocess.Popen(command, env=environment or self.environment, stdout=out, stderr=subprocess.STDOUT,
                                    text=True, start_new_session=True)  # fmt: skip

    def state_of(self, kind: str) -> list[dict[str, Any]]:
        """What Ray's state API says about ``kind``: nodes, actors or tasks."""
        request = urllib.request.Request(
            f"{self.dashboard}/api/v0/{kind}?detail=1&limit=10000", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            rows: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
        return rows

    def alive_nodes(self) -> dict[str, str]:
        """Name of each node's log: its id."""
        return {node["node_name"]: node["node_id"] for node in self.state_of("nodes") if node["state"] == "ALIVE"}

    def _is_alive(self, log: Path) -> bool:
        said = [path.read_text()[-2000:] for path in sorted(self.root.glob("node-*.log"))]
        assert all(node.poll() is None for node in self.nodes), f"a node that was up has ended: {said}"
        try:
            return log.stem in self.alive_nodes()
        except (OSError, http.client.HTTPException):  # the dashboard is not up yet
            return False

    def run(self, *command: object, cwd: Path, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
        """A command of a user of this cluster."""
        return subprocess.run(list(map(str, command)), env=self.environment, cwd=cwd, capture_output=True, text=True,
                              timeout=timeout_s)  # fmt: skip

    def stop(self) -> None:
        for node in reversed(self.nodes):
            node.send_signal(signal.SIGTERM)
        for node in reversed(self.nodes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(5)
            end(node)


def start_until_up(
    start: Callable[[Path], Node], is_up: Callable[[Path], bool], name: Path, timeout_s: float = 180.0
) -> Node:
    """A node that is up. One that ends before that is started again: another may have come before it to a port, and
    ``ray start`` gives up after half a minute, which a busy machine may need.

    Raises:
        AssertionError: three have ended, or the time is over; with what the last one said.
    """
    deadline = time.monotonic() + timeout_s
    for attempt in range(_ATTEMPTS):
        log = name.with_name(f"{name.name}-{attempt}.log")
        with contextlib.ExitStack() as otherwise:
            node = start(log)
            otherwise.callback(end, node)
            while node.poll() is None and time.monotonic() < deadline:
                if is_up(log):
                    otherwise.pop_all()
                    return node
                time.sleep(0.3)
        if time.monotonic() >= deadline:
            break
    raise AssertionError(f"{name.name} is not up after attempt {attempt + 1} of {_ATTEMPTS}: {log.read_text()[-6000:]}")


def end(node: Node) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)  # a session of its own: nothing else is in it
    node.wait(10)


@contextlib.contextmanager
def own_cluster() -> Iterator[OwnCluster]:
    """An OwnCluster that is gone, with its folder, when the block ends."""
    root = Path(tempfile.mkdtemp(prefix="own-"))  # short: Ray's socket paths must stay under 107 characters
    cluster = OwnCluster(root)
    try:
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)
