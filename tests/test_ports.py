"""Ports for the tests' servers."""

import socket
from pathlib import Path

import ports
import pytest


@pytest.mark.skipif(not Path("/proc/sys/net").exists(), reason="the range is the kernel's to say")
def test_a_port_is_never_one_that_the_kernel_gives_away_and_never_the_same() -> None:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    given = [ports.free_port() for _ in range(200)]
    assert len(set(given)) == 200
    assert not any(low <= port <= high or 10_002 <= port < 20_000 for port in given)


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken, free = other.getsockname()[1], ports.free_port()
        monkeypatch.setattr(ports, "_candidates", lambda: [taken, free])
        ports._given.discard(free)
        assert ports.free_port() == free
