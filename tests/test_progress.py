"""Progress without a terminal: one line now and then, with the time that is left."""

import pytest

from orchestrator import progress
from orchestrator.progress import Event, display, format_seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its only item is the time."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_every_few_seconds_and_tell_the_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with display() as report:
        for step in range(1, 31):
            report(Event("train", done=step, total=61, figures={"loss": 0.51239}))
            clock[0] += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[train] 1/61  loss 0.5124", "nothing is known yet about the time left"
    assert lines[1] == "[train] 6/61  loss 0.5124  left 55s"
    assert len(lines) == 6


def test_what_an_earlier_run_did_does_not_count_as_fast(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with display() as report:
        for step in (90, 95):
            report(Event("train", done=step, total=100))
            clock[0] += 10.0
    assert capsys.readouterr().err.splitlines()[-1].endswith("left 10s")


def test_messages_are_always_kept_and_totals_may_be_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with display() as report:
        report(Event("prepare", message="400 of 400 rows kept"))
        report(Event("prepare", done=2048, figures={"rows/s": 9000.0}))
    assert capsys.readouterr().err.splitlines() == ["[prepare] 400 of 400 rows kept", "[prepare] 2048  rows/s 9000"]


def test_seconds_are_words_people_read() -> None:
    assert [format_seconds(s) for s in (0.4, 59.6, 61, 3599)] == ["0s", "1m00s", "1m01s", "59m59s"]
