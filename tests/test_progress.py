"""Progress without a terminal: one line now and then, with the time that is left."""

import io

import pytest
from rich.console import Console

from orchestrator import progress
from orchestrator.progress import Event, Together, display, format_seconds


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


def test_runs_side_by_side_are_one_line_that_only_grows_and_messages_say_whose_they_are() -> None:
    events: list[Event] = []
    together = Together(["fold 1/3", "fold 2/3", "fold 3/3"], events.append)
    one, two = together.report_of("fold 1/3"), together.report_of("fold 2/3")
    one(Event("train", done=50, total=100, figures={"loss": 0.5}))
    two(Event("train", done=22, total=110))
    one(Event("train", message="epoch 1/1: loss 0.4"))
    one(Event("train", done=100, total=100))
    two(Event("train", done=110, total=110))
    shown = [(round(event.done), event.total) for event in events if event.total]
    assert shown == [(50, 300), (74, 315), (126, 315), (210, 315)]
    assert events[0].figures == {"run": "fold 1/3", "loss": 0.5}
    assert events[2].message == "fold 1/3: epoch 1/1: loss 0.4"


def test_runs_that_were_left_behind_are_not_heard_any_more() -> None:
    events: list[Event] = []
    together = Together(["member 1/2"], events.append)
    together.close()
    together.report_of("member 1/2")(Event("train", message="worker 0 was lost"))
    assert events == []


def test_a_terminal_shows_what_goes_on_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=written, force_terminal=True, width=100))
    with progress._Live() as report:
        table = (("trial", "macro_f1"), ("3 best", "0.81"), ("7", "[red]0.5"))
        report(Event("tune", done=4, total=24, figures={"running": "7"}, table=table))
    shown = written.getvalue()
    assert "3 best" in shown and "[red]0.5" in shown and "4/24" in shown
