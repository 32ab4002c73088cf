"""Log lines: what stands in them, what never does, and what a stuck reader does to requests."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.serving import logs
from orchestrator.serving.logs import JsonFormatter, Outlet, configure, log_request, request_line, stop

KNOWN: dict[str, Any] = {"request_id": "r-1", "model": "reviews", "version": "3", "route": "predict", "status": 200,
                         "ms": 12.3456, "instances": 2, "batch_size": 8, "bytes_in": 120, "key_id": "0a1b2c3d4e5f",
                         "error": ""}  # fmt: skip
ODD = (
    st.text()
    | st.text(st.characters(codec=None))
    | st.sampled_from(["\n", "\r\n", "\u2028", "\x1b[2J", "\x00", "\x85", '"}\n{'])
)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Each test leaves the process's logging as it found it."""
    yield
    for handler in logs.ROOM.handlers:
        if isinstance(handler, Outlet):
            stop(handler)


class Stuck(io.StringIO):
    """A pipe that nobody reads, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()

    def write(self, text: str) -> int:
        self.free.wait(10.0)
        return super().write(text)


def formatted(line: dict[str, Any]) -> str:
    return JsonFormatter().format(
        logging.LogRecord("orchestrator.requests", logging.INFO, "", 0, "request", (line,), None)
    )


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_request_makes_one_line() -> None:
    stream = io.StringIO()
    outlet = configure("INFO", stream)
    before = time.time()
    log_request(request_line(**KNOWN))
    stop(outlet)
    (line,) = lines_of(stream)
    assert list(line) == ["time", "level", *KNOWN]
    assert line == KNOWN | {"time": line["time"], "level": "INFO", "ms": 12.346}
    assert abs(datetime.fromisoformat(line["time"]).timestamp() - before) < 5.0


def test_failures_of_the_endpoint_are_warnings_and_those_of_clients_are_not() -> None:
    stream = io.StringIO()
    outlet = configure("INFO", stream)
    for status in (200, 422, None, 503):
        log_request(request_line(**KNOWN | {"status": status}))
    outlet = configure("WARNING", stream)
    for status in (200, 422, None, 500):
        log_request(request_line(**KNOWN | {"status": status}))
    stop(outlet)
    told = [(line["level"], line["status"]) for line in lines_of(stream)]
    assert told == [("INFO", 200), ("INFO", 422), ("INFO", None), ("WARNING", 503), ("WARNING", 500)]


@given(values=st.fixed_dictionaries({name: ODD for name, value in KNOWN.items() if isinstance(value, str)}),
       ms=st.floats() | st.just(float("nan")))  # fmt: skip
def test_no_value_breaks_a_line_or_adds_a_field(values: dict[str, str], ms: float) -> None:
    text = formatted(request_line(**KNOWN | values | {"ms": ms}))
    assert text.isascii() and text.isprintable()
    line = json.loads(text, parse_constant=pytest.fail)
    assert list(line) == ["time", "level", *KNOWN] and line["level"] == "INFO"
    assert all(line[name] == value[:128] for name, value in values.items())


@given(message=ODD, value=ODD)
def test_no_message_breaks_a_line(message: str, value: str) -> None:
    try:
        raise ValueError(value)
    except ValueError as error:
        caught = (ValueError, error, error.__traceback__)
    record = logging.LogRecord(
        "orchestrator.serving.gateway", logging.ERROR, "", 0, message + " of %s", (value,), caught
    )
    text = JsonFormatter().format(record)
    assert text.isascii() and text.isprintable()
    line = json.loads(text)
    assert list(line) == ["time", "level", "logger", "message", "traceback"]
    assert "ValueError" in line["traceback"]


def test_lengths_are_bounded() -> None:
    long = {name: "x" * 1_000_000 for name, value in KNOWN.items() if isinstance(value, str)}
    assert len(formatted(request_line(**KNOWN | long))) < 1_200
    record = logging.LogRecord("orchestrator.a", logging.INFO, "", 0, "%s", ("x" * 1_000_000,), None)
    assert len(JsonFormatter().format(record)) < 2_200


def test_a_value_of_another_kind_is_not_shown() -> None:
    """Should a caller hand over a header or an input by mistake."""
    line = json.loads(
        formatted(request_line(**KNOWN | {"key_id": {"authorization": "Bearer orc_secret"}, "error": b"secret"}))
    )
    assert (line["key_id"], line["error"]) == ("dict", "bytes")


def test_other_loggers_of_the_package_write_to_the_same_place_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)  # whatever a library did to the root logger
    stream, root = io.StringIO(), list(logging.getLogger().handlers)
    outlet = configure("INFO", stream)
    logging.getLogger("orchestrator.serving.gateway").warning("cannot see %s\nmodels", "which")
    logging.getLogger("orchestrator.serving.gateway").warning("%d", "no number")
    logging.getLogger("orchestrator.serving.gateway").debug("not asked for")
    logging.getLogger("elsewhere").warning("not ours")
    assert logging.getLogger().handlers == root
    stop(outlet)
    assert [line["message"] for line in lines_of(stream)] == ["cannot see which\nmodels", "%d"]
    assert [record.message for record in caplog.records] == ["not ours"]
    assert len(stream.getvalue().splitlines()) == 2


def test_configured_twice_is_configured_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = configure()
    assert configure("WARNING") is first and logs.ROOM.level == logging.WARNING
    to_file = configure("INFO", tmp_path / "logs" / "endpoint.log")
    assert to_file is not first and configure("INFO", str(tmp_path / "logs" / "endpoint.log")) is to_file
    assert [handler for handler in logs.ROOM.handlers if isinstance(handler, Outlet)] == [to_file]
    log_request(request_line(**KNOWN))
    stop(to_file)
    stop(configure("INFO", tmp_path / "logs" / "endpoint.log"))
    assert len((tmp_path / "logs" / "endpoint.log").read_text().splitlines()) == 1
    assert capsys.readouterr().err == ""
    assert (logs.ROOM.handlers, logs.ROOM.level, logs.ROOM.propagate) == ([], logging.NOTSET, True)


def test_a_reader_that_is_stuck_costs_lines_and_no_time() -> None:
    stream = Stuck()
    outlet = Outlet(stream, is_own=False, waiting=100)
    logs.ROOM.addHandler(outlet)
    logs.ROOM.setLevel("INFO")
    log_request(request_line(**KNOWN))
    while outlet.lines.qsize():  # until the writer has it, and is stuck
        time.sleep(0.01)
    began = time.perf_counter()
    for number in range(1_000):
        log_request(request_line(**KNOWN | {"request_id": f"r-{number}"}))
    assert time.perf_counter() - began < 1.0
    assert (outlet.dropped, outlet.lines.qsize()) == (900, 100)
    stream.free.set()
    stop(outlet)
    told = lines_of(stream)
    assert [line["request_id"] for line in told[1:101]] == [f"r-{number}" for number in range(100)], (
        "the first ones waited"
    )
    assert [line["message"] for line in told[101:]] == ["900 log lines were dropped so far"]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), ValueError("I/O operation on closed file")])
def test_a_stream_that_fails_costs_its_lines(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    stream = io.StringIO()

    def fail(text: str) -> int:
        raise fault

    outlet = configure("INFO", stream)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "write", fail)
        log_request(request_line(**KNOWN))
        while not outlet.dropped:
            time.sleep(0.01)
    log_request(request_line(**KNOWN | {"request_id": "r-2"}))
    stop(outlet)
    assert outlet.dropped == 1
    assert [line.get("request_id", line.get("message")) for line in lines_of(stream)] == [
        "r-2",
        "1 log lines were dropped so far",
    ]


def test_lines_of_many_threads_stay_whole() -> None:
    stream = io.StringIO()
    outlet = configure("INFO", stream)

    def ask(thread: int) -> None:
        for number in range(250):
            log_request(request_line(**KNOWN | {"request_id": f"{thread}-{number}"}))

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop(outlet)
    assert len({line["request_id"] for line in lines_of(stream)}) == 1_000 and outlet.dropped == 0


def test_a_line_that_a_full_disk_cut_off_spoils_no_other(tmp_path: Path) -> None:
    file = tmp_path / "endpoint.log"
    outlet = configure("INFO", file)
    put, left = FileIO.write, [20]

    class Full(FileIO):
        def write(self, content: Any) -> int:
            if not left[0]:
                raise OSError(28, "No space left on device")
            taken, left[0] = put(self, bytes(content)[: left[0]]), 0
            return taken

    outlet.stream = Full(file, "a")
    log_request(request_line(**KNOWN))
    while not outlet.dropped:
        time.sleep(0.01)
    left[0] = 1_000_000
    log_request(request_line(**KNOWN | {"request_id": "r-2"}))
    stop(outlet)
    cut, whole, told = file.read_text().splitlines()
    assert len(cut) == 20 and json.loads(whole)["request_id"] == "r-2"
    assert json.loads(told)["message"] == "1 log lines were dropped so far"
