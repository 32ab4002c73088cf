"""A node that does not come up is started again, and says why when it never does."""

import subprocess
import time
from pathlib import Path

import pytest
from own_cluster import Node, end, start_until_up


def saying(words: str, log: Path) -> Node:
    """A process that says something and ends, or stays."""
    with log.open("w") as out:
        return subprocess.Popen(["sh", "-c", words], stdout=out, text=True, start_new_session=True)


def test_a_node_that_ends_at_once_is_started_again(tmp_path: Path) -> None:
    def start(log: Path) -> Node:
        started.append(log.name)
        return saying("exit 1" if len(started) < 3 else f"touch {tmp_path}/up; sleep 60", log)

    started: list[str] = []
    node = start_until_up(start, lambda log: (tmp_path / "up").exists(), tmp_path / "node")
    assert started == ["node-0.log", "node-1.log", "node-2.log"] and node.poll() is None
    end(node)
    assert node.poll() is not None


def test_a_node_that_always_ends_says_why(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"node is not up after attempt 3 of 3: the port is in use"):
        start_until_up(lambda log: saying("echo the port is in use", log), lambda log: False, tmp_path / "node")


def test_a_node_that_neither_ends_nor_comes_up_is_ended(tmp_path: Path) -> None:
    nodes: list[Node] = []

    def start(log: Path) -> Node:
        nodes.append(saying("echo waiting; sleep 60", log))
        return nodes[-1]

    began = time.monotonic()
    with pytest.raises(AssertionError, match="node is not up after attempt 1 of 3: waiting"):
        start_until_up(start, lambda log: False, tmp_path / "node", timeout_s=1.0)
    assert time.monotonic() - began < 30
    assert [node.poll() is None for node in nodes] == [False]
