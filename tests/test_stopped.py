"""A command that is told to stop says in one line that it can go on, with the exit status that shells know."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("how", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_command_that_is_told_to_stop(how: signal.Signals, status: int, word: str, tmp_path: Path) -> None:
    """It reads its recipe from a pipe that never ends. While Ray trains: training/test_interrupted.py, test_session.py."""
    pipe = tmp_path / "recipe.yaml"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "orchestrator.cli", "train", str(pipe)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    end = write_end(pipe, process)
    process.send_signal(how)
    said = process.communicate(timeout=60)[1]
    os.close(end)
    assert (process.returncode, said) == (status, f"error: {word}; the same command goes on from here\n")


def write_end(pipe: Path, process: subprocess.Popen[str]) -> int:
    """Of the pipe, once the process reads it."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
