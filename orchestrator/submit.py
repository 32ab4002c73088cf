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
from pathlib import Path
from typing import Any

from orchestrator.errors import ResourceError, StageError

_EXCLUDED = [".git", ".venv", "/runs", "__pycache__", "*.pyc", ".*_cache", ".hypothesis"]
_USER_ERROR_STATUS = 2
_ATTEMPTS, _RETRY_DELAY_S = 10, 1.0


def submit_job(address: str, verb: str, arguments: list[str]) -> int:
    """Submit, stream the log, wait; returns the job's exit status.

    Raises:
        ResourceError: no job server answers at the address, or it refuses the job.
        StageError: the job server was lost while the job ran.
    """
    # Data is often what git ignores; the environment and the results, which are too large, are left out by name.
    os.environ.setdefault("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    client = _client(address)
    job = _submit(client, address, verb, arguments)
    _say(f"[submit] job {job}: follow it with: ray job logs {job} --address {address}")
    try:
        last_line = asyncio.run(_stream(client, job))
        return _finish(client, job, last_line)
    except KeyboardInterrupt:
        client.stop_job(job)
        raise


def _submit(client: Any, address: str, verb: str, arguments: list[str]) -> str:
    recipe, *options = arguments
    try:
        job: str = client.submit_job(
            entrypoint=shlex.join(["python", "-m", f"jobs.{verb}", _from_here(recipe), *options]),
            runtime_env={"working_dir": ".", "excludes": _EXCLUDED},
            metadata={"submitted_by": "orchestrator", "verb": verb},
        )
    except Exception as error:  # noqa: BLE001  the client raises bare exceptions for every refusal
        too_large = "Package size" in str(error)
        raise ResourceError(
            f"{address} refused the job ({_first_line(error)})",
            "put the data where the cluster sees them, or name what is to stay here in .rayignore"
            if too_large
            else "check its token and its free disk",
        ) from None
    return job


def _from_here(recipe: str) -> str:
    """The recipe's path in the job, whose folder is a copy of this one. One that lies elsewhere must be there as well."""
    path = Path(recipe).expanduser().resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


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
    """Print the log as it comes; returns its last line. A line may come in parts."""
    last_line = ""
    try:
        async for chunk in client.tail_job_logs(job):
            print(chunk, end="", file=sys.stderr, flush=True)  # noqa: T201
            text = last_line + chunk
            last_line = text[text.rstrip().rfind("\n") + 1 :]
    except Exception as error:  # noqa: BLE001  aiohttp's and Ray's own
        _say(f"[submit] the log stopped coming ({_first_line(error)}); waiting for the job's end")
    return last_line.strip()


def _finish(client: Any, job: str, last_line: str) -> int:
    details = _ended(client, job)
    if details.status == "SUCCEEDED":
        if _is_json(last_line):
            print(last_line)  # noqa: T201
        return 0
    # Without an exit status the command never ran: only Ray knows why.
    reason = "" if details.driver_exit_code is not None else f" ({_first_line(details.message)})"
    _say(f"error: job {job} ended as {details.status.value}{reason}")
    return _USER_ERROR_STATUS if details.driver_exit_code == _USER_ERROR_STATUS else 1


def _ended(client: Any, job: str) -> Any:
    """The job's details once it has ended, which is recorded a moment after its log ends."""
    failures = 0
    while True:
        try:
            details = client.get_job_info(job)
        except Exception as error:  # noqa: BLE001
            failures += 1
            if failures == _ATTEMPTS:
                raise StageError(
                    f"the job server was lost ({_first_line(error)})", f"job {job} may go on: ask for its status later"
                ) from None
            time.sleep(_RETRY_DELAY_S)
            continue
        if details.status.is_terminal():
            return details
        failures = 0
        time.sleep(0.3)


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _first_line(problem: object) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201
