"""What `orchestrator submit` makes of what a job server says; a real one is asked in end_to_end/test_jobs.py."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from orchestrator import submit
from orchestrator.errors import ResourceError, StageError


class Server:
    """A job server that sends this log in these parts, and then says this of the job, time after time."""

    def __init__(self, chunks: list[str | Exception], *answers: Any) -> None:
        self.chunks, self.answers = chunks, list(answers)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for chunk in self.chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    def get_job_info(self, job: str) -> Any:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def details(status: str, exit_code: int | None = None, message: str = "") -> SimpleNamespace:
    return SimpleNamespace(status=JobStatus(status), driver_exit_code=exit_code, message=message)


def last_line(*chunks: str | Exception) -> str:
    return asyncio.run(submit._stream(Server(list(chunks)), "job"))


def test_a_record_that_comes_in_parts_is_put_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert last_line('[train] done\n{"stage": ', '"train",', ' "steps": 20}', "\n") == '{"stage": "train", "steps": 20}'
    assert last_line("one\ntwo\n", "\n\n") == "two"
    assert last_line() == ""
    assert '{"stage": "train", "steps": 20}' in capsys.readouterr().err


def test_a_log_that_breaks_off_does_not_end_the_wait(capsys: pytest.CaptureFixture[str]) -> None:
    line = last_line("[train] step 1\n", RuntimeError("WebSocket connection closed unexpectedly"))
    server = Server([], details("RUNNING"), ConnectionError("refused"), details("SUCCEEDED", 0))
    assert submit._finish(server, "job", line) == 0
    assert "the log stopped coming (WebSocket connection closed unexpectedly)" in capsys.readouterr().err


def test_a_job_server_that_is_gone_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_RETRY_DELAY_S", 0.0)
    with pytest.raises(StageError, match="the job server was lost .refused.: job raysubmit_1 may go on"):
        submit._finish(Server([], ConnectionError("refused")), "raysubmit_1", "")


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (details("SUCCEEDED", 0), 0, ""),
        (details("FAILED", 2), 2, "error: job job ended as FAILED\n"),
        (details("FAILED", 7), 1, "error: job job ended as FAILED\n"),
        (details("STOPPED"), 1, "ended as STOPPED"),
        (details("FAILED", None, "Failed to set up runtime environment.\nmore"), 1, "(Failed to set up runtime environment.)"),
    ],
)  # fmt: skip
def test_the_jobs_end_becomes_an_exit_status(
    answer: Any, status: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit._finish(Server([], answer), "job", "no record") == status
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == ""


def test_the_recipe_is_named_as_it_lies_in_the_jobs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    assert submit._from_here("recipes/a.yaml") == "recipes/a.yaml"
    assert submit._from_here(str(tmp_path / "project" / "recipes" / "a.yaml")) == "recipes/a.yaml"
    assert submit._from_here(str(tmp_path / "elsewhere.yaml")) == str(tmp_path / "elsewhere.yaml")
    assert submit._from_here("../elsewhere.yaml") == str(tmp_path / "elsewhere.yaml")


class Refusing:
    def submit_job(self, **asked: Any) -> str:
        raise RuntimeError(
            "Package size (600.00MiB) exceeds the maximum size of 512.00MiB. To exclude large files, ..."
        )


def test_a_folder_that_is_too_large_to_bring_is_said_with_what_to_do() -> None:
    with pytest.raises(ResourceError, match=r"Package size \(600.00MiB\) exceeds.*: put the data where the cluster"):
        submit._submit(Refusing(), "http://127.0.0.1:8265", "run", ["recipe.yaml"])
