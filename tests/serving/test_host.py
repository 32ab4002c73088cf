"""The background process of a laptop: one per port, also where two commands want one at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import ServingFailed
from orchestrator.serving import applications_on_ray, host
from orchestrator.serving.host import Host, announce, find_host, one_starts, withdraw
from orchestrator.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """One that a host could be, by its command."""
    command = [sys.executable, "-c", "print(flush=True); input()", "orchestrator"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        yield process
        process.kill()


def note(pid: int) -> Host:
    return Host(pid, "127.0.0.1:6379", None, "http://127.0.0.1:8000")


def test_the_second_command_waits_until_the_first_has_started_one(storage: Storage) -> None:
    order, began = list[str](), threading.Event()

    def second() -> None:
        began.set()
        with one_starts(storage, 8000):
            order.append("second")

    thread = threading.Thread(target=second)
    with one_starts(storage, 8000):
        with one_starts(storage, 8001):
            order.append("another port")
        thread.start()
        began.wait(60)
        thread.join(0.2)
        order.append("first")
    thread.join(60)
    assert order == ["another port", "first", "second"]


def test_a_command_takes_no_other_process_for_its_own(
    storage: Storage, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(storage, 8000, note(os.getpid()))
    monkeypatch.setattr(host, "_is_host", lambda pid: True)
    monkeypatch.setattr(host, "_READY_TIMEOUT_S", 0.3)
    monkeypatch.setattr(host, "_POLL_S", 0.01)
    log = storage.path("host.log")
    with pytest.raises(ServingFailed, match="did not answer within"):
        host._wait_ready(process, storage, 8000, log)
    announce(storage, 8000, note(process.pid))
    assert host._wait_ready(process, storage, 8000, log).pid == process.pid


def test_only_its_own_note_is_withdrawn(storage: Storage, process: subprocess.Popen[bytes]) -> None:
    announce(storage, 8000, note(process.pid))
    withdraw(storage, 8000, os.getpid())
    found = find_host(storage, 8000)
    assert found is not None and found.pid == process.pid, "one that came after us lives on"
    withdraw(storage, 8000, process.pid)
    assert find_host(storage, 8000) is None
    withdraw(storage, 8000, process.pid)


def test_a_process_that_ends_while_it_is_looked_at_is_gone(
    process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanished(path: Path, *_: Any) -> str:
        raise FileNotFoundError(path)

    assert host._is_host(process.pid)
    monkeypatch.setattr(Path, "read_text", vanished)
    assert not host._is_host(process.pid)


def test_a_command_waits_longer_than_the_deployment_whose_reason_it_tells() -> None:
    assert host._READY_TIMEOUT_S > applications_on_ray.READY_S + 60


class Stage:
    """`serve --stop` on one machine, where these models answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, storage: Storage, names: set[str]) -> None:
        from orchestrator import serve
        from orchestrator.serving import on_ray

        self.did: list[str] = []
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(host, "find_host", lambda *_: note(os.getpid()))
        monkeypatch.setattr(host, "stop_host", lambda *_: self.did.append("end all") or True)
        monkeypatch.setattr(on_ray, "served_names", lambda: names)
        monkeypatch.setattr(on_ray, "undeploy", lambda name: self.did.append(f"take off {name}") or True)
        monkeypatch.setattr(serve, "connect", _no_ray)
        recipe: Any = SimpleNamespace(name="reviews", serving=SimpleNamespace(port=8000))
        registry: Any = None
        self.stage = serve.ServeStage(recipe, storage, registry, None, _no_session, lambda: None, lambda event: None)


class _no_ray:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _no_session() -> Any:
    raise AssertionError("no Ray of its own is needed")


def test_a_model_leaves_alone_and_the_last_one_takes_the_endpoint_with_it(
    monkeypatch: pytest.MonkeyPatch, storage: Storage
) -> None:
    from orchestrator.present import describe

    one = Stage(monkeypatch, storage, {"reviews", "shapes"})
    told = one.stage.stop()
    assert (one.did, told["stopped"], told["left"]) == (["take off reviews"], True, ["shapes"])
    assert describe(told, str).strip().endswith("reviews is off the endpoint now; shapes stay")
    last = Stage(monkeypatch, storage, {"reviews"})
    assert (last.stage.stop(), last.did) == ({"stage": "serve", "stopped": True}, ["end all"])


def test_an_endpoint_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch, storage: Storage) -> None:
    from orchestrator.serving import on_ray

    def silent() -> set[str]:
        raise ServingFailed("the shelf is silent")

    stage = Stage(monkeypatch, storage, set())
    monkeypatch.setattr(on_ray, "served_names", silent)
    assert (stage.stage.stop()["stopped"], stage.did) == (True, ["end all"])
