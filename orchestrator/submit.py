"""A verb as a job on a Ray cluster, through Ray's job API: the same code, the same output, the same exit status.

In: the job server's URL and the verb's arguments. Out: the job's log on standard error, its last line on standard output
too when it is JSON. The working directory travels with the job.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import time
from typing import Any

from orchestrator.errors import ResourceError

_EXCLUDED = [".git", ".venv", "/runs", "__pycache__", "*.pyc", ".*_cache", ".hypothesis"]
_USER_ERROR_STATUS = 2


def submit_job(address: str, verb: str, arguments: list[str]) -> int:
    """Submit, stream the log, wait; returns the job's exit status.

    Raises:
        ResourceError: no job server answers at the address, or it refuses the job.
    """
    # Data is often what git ignores; the environment and the results, which are too large, are left out by name.
    os.environ.setdefault("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    client = _client(address)
    try:
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", f"jobs.{verb}", *arguments]),
            runtime_env={"working_dir": ".", "excludes": _EXCLUDED},
            metadata={"submitted_by": "orchestrator", "verb": verb},
        )
    except Exception as error:  # noqa: BLE001  the client raises bare exceptions for every refusal
        raise ResourceError(
            f"{address} refused the job ({_first_line(error)})", "check its token and its free disk"
        ) from None
    print(f"[submit] job {job}: follow it with: ray job logs {job} --address {address}", file=sys.stderr)  # noqa: T201
    try:
        last_line = asyncio.run(_stream(client, job))
    except KeyboardInterrupt:
        client.stop_job(job)
        raise
    return _finish(client, job, last_line)


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except Exception as error:  # noqa: BLE001
        raise ResourceError(
            f"no job server answers at {address!r} ({_first_line(error)})",
            "give the dashboard's URL, such as --address http://127.0.0.1:8265, and RAY_AUTH_TOKEN if it asks for one",
        ) from None


async def _stream(client: Any, job: str) -> str:
    """Print the log as it comes; returns its last line."""
    last_line = ""
    async for chunk in client.tail_job_logs(job):
        print(chunk, end="", file=sys.stderr, flush=True)  # noqa: T201
        last_line = next((line for line in reversed(chunk.splitlines()) if line.strip()), last_line)
    return last_line


def _finish(client: Any, job: str, last_line: str) -> int:
    status = _final_status(client, job)
    if status == "SUCCEEDED":
        if _is_json(last_line):
            print(last_line)  # noqa: T201
        return 0
    details = client.get_job_info(job)
    print(f"error: job {job} ended as {status}", file=sys.stderr)  # noqa: T201
    return _USER_ERROR_STATUS if details.driver_exit_code == _USER_ERROR_STATUS else 1


def _final_status(client: Any, job: str) -> str:
    """The job's end is recorded a moment after its log ends."""
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.3)
    return str(status.value)


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
