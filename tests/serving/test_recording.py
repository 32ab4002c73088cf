"""Answers that are kept: what comes back of them, and what a full disk, a damaged file or a crowd does to them."""

from __future__ import annotations

import errno
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from orchestrator.recipe_serving import Recording
from orchestrator.serving import prediction_files
from orchestrator.serving.contract import Answers, Input
from orchestrator.serving.feedback import append_feedback
from orchestrator.serving.prediction_files import SCHEMA, forget, labels_of, note_days, noted_days
from orchestrator.serving.recorded import read_predictions, with_feedback
from orchestrator.serving.recording import Recorder, Recorders, _tidy
from orchestrator.storage import Storage, feedback_location

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


class Clock:
    def __init__(self, now: datetime = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now.timestamp()

    def pass_by(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["local", "remote"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A folder, and an object store's stand-in: a folder behind pyarrow's own interface, with a cache elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "root").mkdir()
    storage = Storage(str(tmp_path / "root"))
    if request.param == "remote":
        storage.filesystem = fs.SubTreeFileSystem(str(tmp_path / "root"), fs.LocalFileSystem())
        storage.base, storage.is_local, storage.url = "", False, "s3://bucket"
    return storage


@pytest.fixture
def in_tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def answers(*labels: str, version: str = "3", names: tuple[str, ...] = ("bad", "good"), **more: Any) -> Answers:
    outputs = [
        {"label": label, "scores": {name: 0.75 if name == label else 0.25 for name in names}} for label in labels
    ]
    return Answers(version=version, outputs=outputs, **more)


def keep(recorder: Recorder, request_id: str, *inputs: Input, **more: Any) -> int:
    told = more.pop("answers", None) or answers(*["good"] * len(inputs))
    return recorder.record(request_id, inputs, told, latency_ms=more.pop("latency_ms", 12.5), **more)


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def column(table: pa.Table, name: str) -> list[Any]:
    values: list[Any] = table[name].to_pylist()
    return values


def refusing(error: Exception) -> Callable[..., None]:
    def refuse(*_: object, **__: object) -> None:
        raise error

    return refuse


def test_what_was_recorded_comes_back(storage: Storage, clock: Clock, tmp_path: Path) -> None:
    recorder = Recorder(storage, "reviews", keep_inputs=True, clock=clock)
    assert keep(recorder, "r-1", "fine", "größe", answers=answers("good", "bad", arm="candidate")) == 2
    assert files_of(tmp_path / "root") == [], "nothing is written while requests are answered"
    assert (recorder.flush(), recorder.flush()) == (2, 0)
    (file,) = files_of(tmp_path / "root")
    assert file.parent == tmp_path / "root/serve/predictions/reviews/date=2026-03-01"
    assert file.name.startswith("20260301T120000000-") and file.suffix == ".parquet"
    table = read_predictions(storage, "reviews")
    assert table.schema.equals(SCHEMA) and labels_of(table) == ["bad", "good"]
    assert table.to_pylist() == [
        {
            "time": NOON, "request_id": "r-1", "index": index, "model_version": "3", "arm": "candidate", "label": label,
            "score": 0.75, "scores": scores, "error": None, "latency_ms": 12.5, "input": text,
            "input_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
        for index, (label, scores, text) in enumerate([("good", [0.25, 0.75], "fine"), ("bad", [0.75, 0.25], "größe")])
    ]  # fmt: skip


def test_of_an_input_the_hash_alone_is_kept_unless_texts_are_asked_for(local: Storage, tmp_path: Path) -> None:
    for name, keeps in (("plain", False), ("asked", True)):
        recorder = Recorder(local, name, keep_inputs=keeps)
        keep(recorder, "r-1", "my secret diary", b"\x89PNG pixels")
        recorder.flush()
        table = read_predictions(local, name)
        assert column(table, "input") == ["my secret diary" if keeps else None, None]
        assert column(table, "input_sha256")[1] == hashlib.sha256(b"\x89PNG pixels").hexdigest()
    (file,) = files_of(tmp_path / "serve/predictions/plain")
    assert b"diary" not in file.read_bytes() and "diary" not in str(pq.read_table(file).to_pylist())


def test_failures_are_recorded_with_their_reason(local: Storage) -> None:
    recorder = Recorder(local, "digits")
    keep(recorder, "r-0", b"0")
    broken = Answers(version="4", outputs=[{"label": "good", "scores": {"bad": 0.5, "good": 0.5}}, {}],
                     unreadable={1: "is no image"})  # fmt: skip
    keep(recorder, "r-1", b"1", b"2", answers=broken)
    recorder.record("r-2", [b"3"], None, latency_ms=30_000.0, version="4", error="timeout")
    recorder.flush()
    table = read_predictions(local, "digits")
    assert column(table, "error") == [None, None, "is no image", "timeout"]
    assert column(table, "label") == ["good", "good", None, None]
    assert column(table, "scores")[1:] == [[0.5, 0.5], None, None]
    assert column(table, "model_version") == ["3", "4", "4", "4"]
    assert len(files_of(Path(local.url))) == 1, "they need no file of their own"


def test_the_share_is_decided_by_chance_alone(local: Storage) -> None:
    recorder = Recorder(local, "reviews", share=0.25)
    chances = [number / 100 for number in range(100)]
    assert sum(keep(recorder, "r-1", "a", chance=chance) for chance in chances) == 25
    assert [keep(recorder, f"r-{number}", "b", "c", chance=0.24) for number in range(9)] == [2] * 9
    assert recorder.dropped == 0, "what is not sampled is not dropped"


def test_ten_thousand_rows_make_one_file(local: Storage) -> None:
    recorder = Recorder(local, "reviews", max_rows=10_000)
    for number in range(5_000):
        assert not recorder.due()
        keep(recorder, f"r-{number}", "a", "b")
    assert recorder.due()
    assert recorder.flush() == 10_000 and not recorder.due()
    (file,) = files_of(Path(local.url))
    assert file.stat().st_size < 1_000_000
    table = read_predictions(local, "reviews")
    assert len(set(zip(column(table, "request_id"), column(table, "index"), strict=True))) == 10_000
    assert (recorder.written, recorder.dropped, recorder.held_bytes) == (10_000, 0, 0)


def test_a_few_rows_are_written_after_a_while(local: Storage, clock: Clock) -> None:
    recorder = Recorder(local, "reviews", flush_s=30.0, clock=clock)
    clock.pass_by(1_000)
    assert not recorder.due(), "there is nothing to write"
    keep(recorder, "r-1", "a")
    clock.pass_by(29.0)
    assert not recorder.due()
    clock.pass_by(1.5)
    assert recorder.due()


def test_what_does_not_fit_in_memory_is_dropped_counted_and_told(
    local: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(local, "reviews", keep_inputs=True, max_bytes=100_000)
    assert keep(recorder, "long", "x" * 200_000) == 0
    kept = sum(keep(recorder, f"r-{number}", "x" * 10_000) for number in range(50))
    assert 5 <= kept < 10 and recorder.dropped == 51 - kept
    assert recorder.held_bytes <= 100_000
    (told,) = caplog.records
    assert "more answers of reviews wait than fit in memory (1 dropped so far)" in told.message and not told.exc_info
    assert recorder.flush() == kept == len(read_predictions(local, "reviews"))
    assert keep(recorder, "r-51", "there is room again") == 1


def test_a_full_disk_costs_nobody_an_answer(
    local: Storage, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(local, "reviews", flush_s=1.0, max_bytes=20_000, clock=clock)
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(prediction_files, "atomic_write", refusing(full))
        for number in range(100):
            keep(recorder, f"r-{number}", "a")
            clock.pass_by(1.0)
            if recorder.due():
                assert recorder.flush() == 0
        assert recorder.held_bytes <= 20_000
        assert recorder.dropped == 100 - len(recorder._rows) > 50
    assert len(caplog.records) == 2, "once a minute"
    assert "no room to write" in caplog.text and "serve/predictions/reviews" in caplog.text
    clock.pass_by(10.0)
    assert recorder.due() and recorder.flush() == 100 - recorder.dropped
    assert column(read_predictions(local, "reviews"), "request_id")[0] == "r-0", "the first ones waited"


def test_a_failing_storage_is_not_asked_every_second(
    local: Storage, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(local, "reviews", flush_s=1.0, clock=clock)
    monkeypatch.setattr(prediction_files, "atomic_write", refusing(PermissionError(errno.EACCES, "Permission denied")))
    keep(recorder, "r-1", "a")
    clock.pass_by(2.0)
    recorder.flush()
    clock.pass_by(9.0)
    assert not recorder.due()
    clock.pass_by(2.0)
    assert recorder.due()


@pytest.mark.parametrize("died_in", ["replace", "fsync"])
def test_a_writer_that_dies_leaves_no_half_file(
    local: Storage, monkeypatch: pytest.MonkeyPatch, died_in: str, tmp_path: Path
) -> None:
    recorder = Recorder(local, "reviews")
    keep(recorder, "r-1", "a")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("pathlib.Path.replace" if died_in == "replace" else "os.fsync", refusing(KeyboardInterrupt()))
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)  # as a kill would: nothing is tidied up
        recorder.flush()
    (left,) = files_of(tmp_path)
    assert left.name.startswith(".") and left.suffix != ".parquet"
    assert len(read_predictions(local, "reviews")) == 0
    keep(recorder, "r-2", "b")
    recorder.flush()
    assert "r-2" in column(read_predictions(local, "reviews"), "request_id")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_left_out_and_named(storage: Storage, caplog: pytest.LogCaptureFixture, tmp_path: Path,
                                              damage: str) -> None:  # fmt: skip
    recorder = Recorder(storage, "reviews")
    for number in range(2):
        keep(recorder, f"r-{number}", *"abcdefgh")
        recorder.flush()
    bad, good = files_of(tmp_path / "root")
    survivor = column(pq.read_table(good), "request_id")[0]
    content = bytearray(bad.read_bytes())
    content[content.index(b"r-") + 2] ^= 1  # another request's id, and still a readable file
    foreign = pa.BufferOutputStream()
    pq.write_table(pa.table({"anything": [1]}, metadata={"labels": "[]"}), foreign)
    told = {"cut": bad.read_bytes()[:-20], "flipped": bytes(content), "empty": b"", "foreign": foreign.getvalue()}
    bad.write_bytes(told[damage])
    with caplog.at_level(logging.WARNING):
        table = read_predictions(storage, "reviews")
    assert set(column(table, "request_id")) == {survivor}
    assert len(caplog.records) == 1 and bad.name in caplog.text


def test_a_strange_answer_is_not_recorded_and_nothing_else_is_lost(local: Storage) -> None:
    recorder = Recorder(local, "reviews", keep_inputs=True)
    strange = [{"label": "good"}, {"label": "good", "scores": {"bad": 1.0}}, {"scores": {"bad": "much"}}, {"label": 3}]
    for number, output in enumerate(strange):
        assert keep(recorder, f"r-{number}", "a", answers=Answers(version="3", outputs=[output])) == 0
    assert keep(recorder, "few", "a", "b", answers=answers("good")) == 0
    assert keep(recorder, "surrogate", "\ud800") == 0
    assert recorder.dropped == 7
    assert keep(recorder, "fine", "a") == 1 == recorder.flush()


def test_feedback_is_joined_by_request_and_index(storage: Storage, clock: Clock) -> None:
    recorder = Recorder(storage, "reviews", clock=clock)
    keep(recorder, "r-1", "a", "b")
    keep(recorder, "r-2", "c")
    recorder.record("r-3", ["d"], None, latency_ms=1.0, error="timeout")
    recorder.flush()
    remarks = [("r-1", 1, "bad", "10"), ("r-2", 0, "bad", "11"), ("r-2", 0, "good", "12"), ("r-3", 0, "good", "13"),
               ("r-9", 0, "good", "14")]  # fmt: skip
    for request_id, index, label, hour in remarks:
        entry = {"time": f"2026-03-02T{hour}:00:00.000+00:00", "model_version": "3"}
        append_feedback(storage, "reviews", entry | {"request_id": request_id, "label": label, "index": index})
    table = with_feedback(storage, "reviews")
    assert column(table, "told_label") == [None, "bad", "good", "good"]
    assert column(table, "right") == [None, False, True, None]
    assert labels_of(table) == ["bad", "good"]


def test_what_is_said_of_an_id_that_several_requests_have_is_said_of_the_newest(local: Storage, clock: Clock) -> None:
    recorder = Recorder(local, "reviews", clock=clock)
    for text in ("first", "second"):
        keep(recorder, "1", text)
        clock.pass_by(60.0)
    keep(recorder, "1", "second", answers=answers("bad", arm="shadow"))
    recorder.flush()
    append_feedback(local, "reviews", {"time": "2026-03-01T13:00:00", "request_id": "1", "label": "bad", "index": 0})
    assert column(with_feedback(local, "reviews"), "told_label") == [None, "bad", "bad"]


def test_damaged_feedback_is_left_out(local: Storage, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(local, "reviews")
    keep(recorder, "r-1", "a")
    recorder.flush()
    append_feedback(local, "reviews", {"time": "1", "request_id": "r-1", "label": "bad", "index": 0})
    with local.path(feedback_location("reviews") + ".jsonl").open("ab") as file:
        file.write(
            b'[1]\n{"label": "good"}\n{"request_id": ["r-1"], "label": "good"}\n\xff\n{"time": "2", "request_id": "r-1", '
        )
    with caplog.at_level(logging.WARNING):
        table = with_feedback(local, "reviews")
    assert (column(table, "told_label"), column(table, "right")) == (["bad"], [False])
    assert len(caplog.records) == 5 and feedback_location("reviews") in caplog.text


def test_there_may_be_nothing_yet(storage: Storage) -> None:
    table = with_feedback(storage, "reviews")
    assert len(table) == 0 and labels_of(table) == []
    assert table.column_names == [*SCHEMA.names, "told_label", "right"]


def test_a_span_of_time_is_read(storage: Storage, clock: Clock, in_tokyo: None) -> None:
    recorder = Recorder(storage, "reviews", clock=clock)
    for hours in range(0, 72, 12):
        clock.now = NOON + timedelta(hours=hours)
        keep(recorder, f"r-{hours}", "a")
    recorder.flush()
    assert len(storage.children("serve/predictions/reviews")) == 4, "a file lies with its day"

    def found(since: datetime | None = None, until: datetime | None = None) -> list[str]:
        return column(read_predictions(storage, "reviews", since, until), "request_id")

    assert found() == ["r-0", "r-12", "r-24", "r-36", "r-48", "r-60"]
    assert found(NOON + timedelta(hours=12), NOON + timedelta(hours=36)) == ["r-12", "r-24"]
    assert found(datetime(2026, 3, 2, 0, 0, 1)) == ["r-24", "r-36", "r-48", "r-60"], "a time without a zone is in UTC"


def test_versions_with_other_labels_are_told_apart(local: Storage) -> None:
    recorder = Recorder(local, "reviews")
    keep(recorder, "r-1", "a", answers=answers("bad"))
    keep(recorder, "r-2", "a", answers=answers("good", names=("awful", "good"), version="4"))
    recorder.flush()
    table = read_predictions(local, "reviews")
    assert len(files_of(Path(local.url))) == 2
    labels, scores = labels_of(table), dict(zip(column(table, "request_id"), column(table, "scores"), strict=True))
    assert sorted(labels) == ["awful", "bad", "good"]
    named = {request: dict(zip(labels, row, strict=True)) for request, row in scores.items()}
    assert named == {
        "r-1": {"bad": 0.75, "good": 0.25, "awful": None},
        "r-2": {"awful": 0.25, "good": 0.75, "bad": None},
    }


def test_days_are_forgotten(storage: Storage, clock: Clock) -> None:
    for days in range(3):
        clock.now = NOON + timedelta(days=days)
        for name in ("reviews", "digits"):
            recorder = Recorder(storage, name, clock=clock)
            keep(recorder, f"r-{days}", "a")
            recorder.flush()
    for stranger in ("date=2026-02-30", "date=yesterday"):
        storage.write_json(f"serve/predictions/reviews/{stranger}/note.json", {})
    assert (forget(storage, "reviews", date(2026, 3, 3)), forget(storage, "reviews", date(2026, 3, 3))) == (2, 0)
    assert column(read_predictions(storage, "reviews"), "request_id") == ["r-2"]
    assert len(read_predictions(storage, "digits")) == 3


def test_an_endpoints_recorders_write_what_is_due_and_forget_what_is_old(
    local: Storage, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Recorder(local, "reviews", clock=clock)
    keep(old, "long ago", "a")
    old.flush()
    recorders, terms = Recorders(), Recording(keep_days=30)
    recorder = recorders.of(local.url, "reviews", terms)
    assert recorders.of(local.url, "reviews", terms) is recorder
    keep(recorder, "today", "a")
    recorders.write_due()
    assert column(read_predictions(local, "reviews"), "request_id") == [], "the old day is gone, the new not due"
    recorders.write_all()
    assert column(read_predictions(local, "reviews"), "request_id") == ["today"]
    assert recorders.of(local.url, "reviews", Recording(share=0.5)) is recorder and recorder.share == 0.5


def test_what_has_to_be_removed_and_cannot_stops_nothing(
    local: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    recorders = Recorders()
    recorder = recorders.of(local.url, "reviews", Recording())
    monkeypatch.setattr("orchestrator.serving.recording.forget", refusing(PermissionError(errno.EACCES, "no")))
    recorders.write_due()
    assert "cannot remove old answers of reviews" in caplog.text and recorder.written == 0


def test_old_answers_of_a_model_that_is_recorded_no_more_are_forgotten_too(storage: Storage, clock: Clock) -> None:
    gone = Recorder(storage, "gone", clock=clock)
    keep(gone, "long ago", "a")
    gone.flush()
    note_days(storage, "gone", 30)
    kept = Recorder(storage, "nobody-said", clock=clock)
    keep(kept, "long ago", "a")
    kept.flush()
    _tidy(storage)
    assert storage.children("serve/predictions/gone") == []
    assert storage.children("serve/predictions/nobody-said") == ["date=2026-03-01"]


def test_an_endpoint_notes_how_long_answers_are_kept(local: Storage) -> None:
    recorders = Recorders()
    keep(recorders.of(local.url, "reviews", Recording(keep_days=7)), "r-1", "a")
    recorders.write_all()
    assert noted_days(local, "reviews") == 7
    old = Recorder(local, "gone", clock=Clock())
    keep(old, "long ago", "a")
    old.flush()
    note_days(local, "gone", 30)
    Recorders().write_due([local.url])
    assert local.children("serve/predictions/gone") == []


def test_what_was_written_and_lost_is_news_once(local: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    recorders = Recorders()
    recorder = recorders.of(local.url, "reviews", Recording())
    keep(recorder, "r-1", "a", "b")
    assert list(recorders.news()) == [("reviews", 0, 0)], "it is not written yet"
    recorders.write_all()
    keep(recorder, "r-2", "a", answers=Answers(version="3", outputs=[{"label": 3}]))
    assert list(recorders.news()) == [("reviews", 2, 1)]
    assert list(recorders.news()) == [("reviews", 0, 0)]
