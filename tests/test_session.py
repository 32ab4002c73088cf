"""Joining and leaving Ray: what the environment says, and what is left of it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from orchestrator import session
from orchestrator.errors import ResourceError, UserError


def test_a_job_server_is_no_address_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAY_ADDRESS is a URL where somebody uses Ray's job commands."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ResourceError, match=r"http://127.0.0.1:8265 is a job server.*orchestrator submit"):
        session.connect().__enter__()


def test_a_relative_storage_of_a_job_goes_to_where_it_lasts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert session.lasting_storage("./runs") == "./runs"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert session.lasting_storage("./runs") == session.lasting_storage("runs") == f"{tmp_path}/orchestrator/runs"
    for lasting in ("/mnt/runs", "~/runs", "s3://bucket/runs"):
        assert session.lasting_storage(lasting) == lasting


def test_more_nodes_than_one_need_a_storage_that_all_see() -> None:
    session.refuse_unshared_storage("./runs", "/root/orchestrator/runs", nodes=1)
    session.refuse_unshared_storage("/mnt/runs", "/mnt/runs", nodes=2)
    with pytest.raises(UserError, match="the cluster has 2 nodes"):
        session.refuse_unshared_storage("./runs", "/root/orchestrator/runs", nodes=2)


def test_sockets_get_a_short_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert session._scratch_root() is None
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a-long-name-of-a-folder"))
    assert session._scratch_root() == "/tmp"


@pytest.mark.ray
def test_an_own_instance_takes_its_own_token_and_leaves_the_users_environment_as_it_was(tmp_path: Path) -> None:
    """In a process of its own: twice, under a token and a mode of the user that would not fit, from a long TMPDIR."""
    (tmp_path / "temporary-files-of-a-batch-system").mkdir()
    script = """
import os, signal
from orchestrator.session import connect

def stop(number, frame):
    raise SystemExit

signal.signal(signal.SIGTERM, stop)
names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
before = [os.environ.get(name) for name in names]
for _ in range(2):  # the second one after the first has left
    with connect() as session:
        import ray
        assert session.is_private and "RAY_AUTH_TOKEN" not in os.environ
        assert signal.getsignal(signal.SIGTERM) is stop, "and not Ray's own"
        assert ray.get(ray.remote(lambda: os.environ["RAY_AUTH_TOKEN_PATH"]).remote()) == session.token_path
    assert [os.environ.get(name) for name in names] == before
    assert not session.scratch.exists()
print("well")
"""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "0" * 64,
                                "TMPDIR": str(tmp_path / "temporary-files-of-a-batch-system")}  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240)
    assert ran.stdout.splitlines()[-1:] == ["well"], ran.stderr[-3000:]


@pytest.mark.ray
def test_a_worker_that_hangs_while_it_exits_does_not_stay(tmp_path: Path) -> None:
    """Ray has forgotten it by then."""
    script = """
import atexit, os, pathlib, sys, time
from orchestrator.session import connect

exiting = pathlib.Path(sys.argv[1])

def wait_until(fact):
    deadline = time.monotonic() + 60
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.1)

with connect():
    import ray

    class Hanging:
        def process(self):
            atexit.register(self.hang)
            return os.getpid()

        def hang(self):
            exiting.touch()
            time.sleep(300)

    actor = ray.remote(Hanging).remote()
    pid = ray.get(actor.process.remote())
    actor.__ray_terminate__.remote()
    wait_until(exiting.exists)
    time.sleep(1)  # so that Ray forgets it
    assert os.path.exists(f"/proc/{pid}"), "it hangs"
wait_until(lambda: not os.path.exists(f"/proc/{pid}"))
print("gone")
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", script, str(tmp_path / "exiting")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert ran.stdout.splitlines()[-1:] == ["gone"], ran.stderr[-3000:]


@pytest.mark.ray
def test_what_comes_too_late_starts_no_other_ray() -> None:
    """Also where Ray was imported before there was a session, and so has not seen the session's environment."""
    program = (
        "import os; os.environ.pop('RAY_ENABLE_AUTO_CONNECT', None)\n"
        "import ray\nfrom orchestrator.session import connect\n"
        "with connect():\n    assert ray.is_initialized()\n"
        "try:\n    ray.put(1)\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
        "assert not ray.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip(), "it was refused"
