"""Ray nodes started as an operator starts them, each with ports, a token and a folder of its own, and ended by pid."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

BIN = Path(sys.executable).parent
_PORTS = ("node-manager", "object-manager", "dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent",
          "metrics-export")  # fmt: skip


class OwnCluster:
    """A head node; more nodes on demand."""

    def __init__(self, root: Path) -> None:
        self.root, self.port, self.dashboard_port = root, free_port(), free_port()
        self.token, token = secrets.token_hex(32), root / "token"
        token.write_text(self.token)
        token.chmod(0o600)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(root),
        }  # fmt: skip
        self.nodes: list[subprocess.Popen[str]] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def start_head(self, cpus: int = 2) -> None:
        self._start("--head", f"--port={self.port}", f"--dashboard-port={self.dashboard_port}",
                    "--dashboard-host=127.0.0.1", f"--ray-client-server-port={free_port()}",
                    f"--temp-dir={self.root}/ray", f"--num-cpus={cpus}")  # fmt: skip
        self._wait(lambda: "dashboard" if _answers(f"{self.dashboard}/api/version") else None)

    def start_worker_elsewhere(self, cpus: int = 1) -> None:
        """A node that finds this cluster's folder empty, Ray's sessions and drivers' scratch in it too, as on another
        machine: it has a mount namespace of its own."""
        hide = f'mount -t tmpfs -o size=1g none {self.root} && mkdir {self.root}/tmp && exec "$@"'
        environment = self.environment | {"RAY_AUTH_TOKEN": self.token}
        del environment["RAY_AUTH_TOKEN_PATH"]
        self._start(f"--address={self.address}", f"--num-cpus={cpus}", f"--temp-dir={self.root}/ray",
                    wrapper=("unshare", "--mount", "sh", "-c", hide, "sh"), environment=environment)  # fmt: skip

    def _start(self, *options: str, wrapper: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        ports = [f"--{name}-port={free_port()}" for name in _PORTS]
        command = [*wrapper, BIN / "ray", "start", "--block", "--node-ip-address=127.0.0.1", "--object-store-memory=200000000",
                   *ports, *options]  # fmt: skip
        log = (self.root / f"node-{len(self.nodes)}.log").open("w")
        self.nodes.append(
            subprocess.Popen(
                command,
                env=environment or self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )

    def _wait(self, probe: object, timeout_s: float = 90.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not probe():  # type: ignore[operator]
            logs = "".join(path.read_text()[-2000:] for path in self.root.glob("node-*.log"))
            assert all(node.poll() is None for node in self.nodes), f"a node ended: {logs}"
            assert time.monotonic() < deadline, f"the head node is not up: {logs}"
            time.sleep(0.3)

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
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)  # a session of its own: nothing else is in it


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    """Any HTTP status will do: without the token it is a refusal."""
    try:
        urllib.request.urlopen(url, timeout=2)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
