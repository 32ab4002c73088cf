"""Logs for machines: one JSON object a line, one line a request.

In: log records, and what is known of a request when it is answered. Out: lines on standard error or in a file, written by a
thread: a full pipe or disk costs lines, which are counted, and no request. A line never holds inputs, keys, headers or query
strings: ``request_line`` takes none. Knows no HTTP and no Ray.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import queue
import sys
import threading
import time
from datetime import UTC, datetime
from io import FileIO
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any, TextIO

ROOM = logging.getLogger("orchestrator")
"""What is configured: this package's logger and those below it. The root logger and its handlers stay as they are."""
REQUESTS = logging.getLogger("orchestrator.requests")
"""Of the lines of requests, so that they can be silenced alone."""
_MAX_VALUE, _MAX_MESSAGE, _MAX_TRACEBACK = 128, 2_000, 8_000
"""Characters."""
_WAITING = 10_000
"""Lines that wait for the disk, at most."""
_EVERY_S, _CLOSING_S = 0.1, 2.0


def request_line(
    *, request_id: str, route: str, status: int | None, ms: float, model: str = "", version: str = "", instances: int = 0,
    batch_size: int = 0, bytes_in: int = 0, key_id: str = "", error: str = "",
) -> dict[str, Any]:  # fmt: skip
    """What may be said of a request. ``status``: None if the client hung up. ``key_id``: of the API key, never the key itself.
    ``error``: the code of the answer's error, never its message, which may quote an input."""
    told = {"request_id": request_id, "model": model, "version": version, "route": route, "status": status,
            "ms": round(ms, 3), "instances": instances, "batch_size": batch_size, "bytes_in": bytes_in, "key_id": key_id,
            "error": error}  # fmt: skip
    return {name: _bounded(value) for name, value in told.items()}


def log_request(line: dict[str, Any]) -> None:
    """Hand a ``request_line`` to the log: a warning if the endpoint failed, else information."""
    level = logging.WARNING if (line["status"] or 0) >= 500 else logging.INFO
    if REQUESTS.isEnabledFor(level):
        REQUESTS.handle(logging.LogRecord(REQUESTS.name, level, "", 0, "request", (line,), None))


def _bounded(value: Any) -> Any:
    if isinstance(value, str):
        return value[:_MAX_VALUE]
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # JSON has no NaN
    return value if isinstance(value, int) or value is None else type(value).__name__


class JsonFormatter(logging.Formatter):
    """One line of ASCII for a record, whatever it holds: JSON escapes line ends and control characters."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {"time": _time(record.created), "level": record.levelname}
        if record.name == REQUESTS.name and isinstance(record.args, dict):
            return json.dumps(told | record.args)
        told |= {"logger": record.name, "message": _message(record)[:_MAX_MESSAGE]}
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)[-_MAX_TRACEBACK:]
        return json.dumps(told)


def _time(since_1970_s: float) -> str:
    return datetime.fromtimestamp(since_1970_s, UTC).isoformat(timespec="milliseconds")


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001  (values that do not fit the text, or cannot be shown)
        return str(record.msg)


class Outlet(QueueHandler):
    """Makes the lines where they arise, and has a thread write them. Neither waits for the stream nor raises."""

    def __init__(self, stream: TextIO | FileIO, is_own: bool, waiting: int = _WAITING) -> None:
        """``is_own``: the stream ends with this handler. ``waiting``: lines that are held, at most."""
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        super().__init__(self.lines)
        self.setFormatter(JsonFormatter())
        self.stream, self._is_own, self._waiting = stream, is_own, waiting
        self.dropped = self._told = 0
        self._is_torn = False
        """The last line in the file has no end."""
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write_all, name="logs", daemon=True)
        self._writer.start()

    def prepare(self, record: logging.LogRecord) -> Any:
        return self.format(record)

    def enqueue(self, record: Any) -> None:
        if self.lines.qsize() < self._waiting:
            self.lines.put(record)
        else:
            self.dropped += 1

    def handleError(self, record: logging.LogRecord) -> None:
        self.dropped += 1

    def _write_all(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._ended.wait(_EVERY_S)  # and not line by line: waking up costs more than writing
            if batch := [self.lines.get() for _ in range(self.lines.qsize())]:
                self._write(batch)

    def _write(self, batch: list[str]) -> None:
        if (dropped := self.dropped) > self._told:
            told = {"level": "WARNING", "logger": __name__, "message": f"{dropped} log lines were dropped so far"}
            batch.append(json.dumps({"time": _time(time.time())} | told))
            self._told = dropped
        try:
            self._put("\n".join(batch) + "\n")
        except (OSError, ValueError):  # the disk is full, or somebody else closed the stream
            self.dropped += len(batch)

    def _put(self, lines: str) -> None:
        if not isinstance(self.stream, FileIO):
            self.stream.write(lines)
            self.stream.flush()
            return
        left = memoryview(("\n" * self._is_torn + lines).encode())
        while left:  # a disk that fills up takes a part first
            written = self.stream.write(left) or 0
            self._is_torn = written < len(left)
            left = left[written:]

    def close(self) -> None:
        """What waits is written, if that takes two seconds at most."""
        self._ended.set()
        self._writer.join(_CLOSING_S)
        if self._is_own and not self._writer.is_alive():
            with contextlib.suppress(OSError):
                self.stream.close()
        super().close()


def configure(level: str = "INFO", stream: TextIO | str | Path | None = None) -> Outlet:
    """Have this process log as JSON to ``stream``: standard error (None), an open text stream, or a file, which is appended to.

    Called again, it changes level and stream; there is one outlet at any time.
    """
    target = sys.stderr if stream is None else stream
    outlet = next((handler for handler in ROOM.handlers if isinstance(handler, Outlet)), None)
    if outlet is None or not _leads_to(outlet, target):
        opened = _opened(target)  # if that fails, the one before stays
        if outlet is not None:
            stop(outlet)
        outlet = Outlet(opened, isinstance(target, (str, Path)))
        ROOM.addHandler(outlet)
        ROOM.propagate = False  # others would write the same once more, in another form
    ROOM.setLevel(level.upper())
    return outlet


def stop(outlet: Outlet) -> None:
    """The package logs as before ``configure``."""
    ROOM.removeHandler(outlet)
    ROOM.propagate = True
    ROOM.setLevel(logging.NOTSET)
    outlet.close()


def _leads_to(outlet: Outlet, target: TextIO | str | Path) -> bool:
    if isinstance(target, (str, Path)):
        return str(getattr(outlet.stream, "name", "")) == str(Path(target).resolve())
    return outlet.stream is target


def _opened(target: TextIO | str | Path) -> TextIO | FileIO:
    """A file without a buffer: what a full disk did not take must not come later, in the midst of other lines."""
    if not isinstance(target, (str, Path)):
        return target
    path = Path(target).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileIO(path, "a")
