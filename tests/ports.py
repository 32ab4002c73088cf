"""Ports for servers that start some time after they are chosen."""

import random
import socket
from pathlib import Path

_RAYS_WORKERS = range(10_002, 20_000)  # of `ray start`, where it is not told others
_given: set[int] = set()


def free_port() -> int:
    """A port that nobody uses, and that nobody comes upon by chance until its server starts: not one of those that the
    kernel gives to outgoing connections and to whoever binds to 0, and never the same twice."""
    while True:
        port = random.SystemRandom().choice(_candidates())
        if port not in _given and _is_free(port):
            _given.add(port)
            return port


def _candidates() -> list[int]:
    low, high = _ephemeral()
    found = [port for port in range(_RAYS_WORKERS.stop, 65_536) if not low <= port <= high]
    return found or list(range(_RAYS_WORKERS.stop, 65_536))  # where any port may be given away, any is as good


def _ephemeral() -> tuple[int, int]:
    try:
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    except OSError:  # not Linux: the range of the standard
        return 49_152, 65_535
    return int(low), int(high)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
