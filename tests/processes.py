"""The processes of a command: started, found, and waited for."""

import os
import subprocess
import sys
import time
from pathlib import Path


def descendants(pid: int) -> set[int]:
    """Its children, their children and so on."""
    children: dict[int, list[int]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it has ended
            continue
        children.setdefault(parent, []).append(int(process.name))
    found, waiting = set[int](), [pid]
    while waiting:
        waiting += (below := children.get(waiting.pop(), []))
        found |= set(below)
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_end(pids: set[int], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while left := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"still there after {timeout_s:g} s: {left}"
        time.sleep(0.2)


def start_command(verb: str, recipe: Path) -> subprocess.Popen[str]:
    """``orchestrator VERB RECIPE --json`` of this clone, as a process of its own."""
    command = [sys.executable, "-m", "orchestrator.cli", verb, str(recipe), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)})  # fmt: skip
