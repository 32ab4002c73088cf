"""Answers are kept for whoever watches a model, or a share of them.

In: requests with their answers. Out: files as ``prediction_files.py`` has them, each whole or not there. The event loop only
fills a buffer; a thread writes it. Who kills the process loses what it held: half a minute's answers at most. Knows no HTTP
and no Ray; ``recorded.py`` reads.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator.recipe_serving import Recording
from orchestrator.serving.contract import Answers, Input
from orchestrator.serving.prediction_files import (
    SCHEMA,
    forget,
    labelled,
    note_days,
    noted_days,
    predictions_file,
    recorded_models,
    write_bytes,
)
from orchestrator.storage import Storage

log = logging.getLogger(__name__)
_ROW_BYTES = 600
"""Of a row in memory, without its scores and its text."""
_RETRY_S, _COMPLAIN_S = 10.0, 60.0
_TIDY_S = 3600.0


@functools.lru_cache(maxsize=256)
def storage_at(root: str) -> Storage:
    """The same one whenever a process asks for it: opening an object store takes a while."""
    return Storage(root)


class _Row(NamedTuple):
    columns: tuple[Any, ...]
    """As ``SCHEMA`` has them; ``scores`` as the bytes of float32."""
    labels: tuple[str, ...]
    """Empty for an input that was not answered."""
    size_bytes: int

    @property
    def time(self) -> datetime:
        return datetime.fromtimestamp(self.columns[0] / 1000, UTC)


class Recorder:
    """Of one model. ``record`` is the event loop's; ``flush`` blocks and is a thread's."""

    def __init__(
        self, storage: Storage, model: str, *, share: float = 1.0, keep_inputs: bool = False, flush_s: float = 30.0,
        max_rows: int = 10_000, max_bytes: int = 64_000_000, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """``share``: of the requests, 0 to 1. ``keep_inputs``: texts too, which may be personal; of images the hash alone is
        kept. A file is due after ``flush_s`` or ``max_rows``. ``max_bytes``: in memory, roughly; what comes on top is dropped.
        """
        self.storage, self.model, self.share, self.keep_inputs = storage, model, share, keep_inputs
        self.flush_s, self.max_rows, self.max_bytes, self._clock = flush_s, max_rows, max_bytes, clock
        self.written = self.dropped = self.held_bytes = 0
        self.told_written = self.told_dropped = 0
        self._rows: list[_Row] = []
        self._labels: tuple[str, ...] = ()
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self._wait_until = self._silent_until = 0.0

    def record(
        self, request_id: str, inputs: Sequence[Input], answers: Answers | None, *, latency_ms: float, version: str = "",
        error: str | None = None, chance: float = 0.0,
    ) -> int:  # fmt: skip
        """How many of the inputs are kept: all of a request, or none. Never waits, never raises.

        ``answers``: None if there are none; then ``error`` says why, and ``version`` of which version. ``chance``: uniform in
        [0, 1), the same for all that is recorded of one request; it is kept if that is below the share.
        """
        if chance >= self.share:
            return 0
        try:
            arm = "stable" if answers is None else answers.arm
            known = (int(self._clock() * 1000), request_id, arm, latency_ms, error, version)
            rows = [self._row(known, index, value, answers) for index, value in enumerate(inputs)]
        except Exception:  # noqa: BLE001  (an answer of a strange shape: the client has it, the record does without)
            self._drop(len(inputs), "an answer of %s cannot be recorded", self.model)
            return 0
        size_bytes = sum(row.size_bytes for row in rows)
        with self._lock:
            if has_room := self.held_bytes + size_bytes <= self.max_bytes:
                self.held_bytes += size_bytes
                self._rows += rows
        if not has_room:
            self._drop(len(rows), "more answers of %s wait than fit in memory", self.model)
        return len(rows) if has_room else 0

    def _row(self, known: tuple[Any, ...], index: int, value: Input, answers: Answers | None) -> _Row:
        time_ms, request_id, arm, latency_ms, error, version = known
        output: Mapping[str, Any] = {}
        if answers is not None:
            output, version, error = answers.outputs[index], answers.version, answers.unreadable.get(index, error)
        scores: Mapping[str, float] = output.get("scores", {})
        labels, label = tuple(scores), output.get("label")
        if labels:  # one tuple for all rows
            labels = self._labels = self._labels if labels == self._labels else labels
        content = value.encode() if isinstance(value, str) else value
        kept = value if self.keep_inputs and isinstance(value, str) else None
        packed = np.fromiter(scores.values(), np.float32, len(scores)).tobytes() if scores else None
        columns = (time_ms, request_id, index, version, arm, label, None if label is None else scores[label], packed, error,
                   latency_ms, kept, hashlib.sha256(content).hexdigest())  # fmt: skip
        return _Row(columns, labels, _ROW_BYTES + 4 * len(scores) + (len(content) if kept is not None else 0))

    def due(self) -> bool:
        """Whether it is time to flush."""
        rows, now = self._rows, self._clock()
        is_ripe = len(rows) >= self.max_rows or (bool(rows) and now - rows[0].columns[0] / 1000 >= self.flush_s)
        return is_ripe and now >= self._wait_until

    def flush(self) -> int:
        """Write what is held; returns how many rows were written. Rows that the storage does not take stay, for a later try."""
        with self._flushing:
            with self._lock:
                rows, self._rows = self._rows, []
            return sum(self._write(labels, group) for labels, group in _grouped(rows, self.max_rows))

    def _write(self, labels: tuple[str, ...], rows: list[_Row]) -> int:
        location, written = predictions_file(self.model, rows[0].time, uuid.uuid4().hex[:12]), 0
        try:
            write_bytes(self.storage, location, _parquet(labels, rows))
            written = len(rows)
        except OSError:
            self.complain("cannot write %s: %d rows wait", location, len(rows))
            self._wait_until = self._clock() + _RETRY_S
            with self._lock:
                self._rows = rows + self._rows
            return 0
        except Exception:  # noqa: BLE001  (they would fail again for ever)
            self._drop(len(rows), "rows of %s cannot be written", self.model)
        self.written += written
        with self._lock:
            self.held_bytes -= sum(row.size_bytes for row in rows)
        return written

    def _drop(self, rows: int, why: str, *values: object) -> None:
        with self._lock:
            self.dropped += rows
        self.complain(why, *values)

    def complain(self, text: str, *values: object) -> None:
        """Of the error at hand, once a minute at most."""
        now = self._clock()
        if now >= self._silent_until:
            self._silent_until = now + _COMPLAIN_S
            log.warning(f"{text} (%d dropped so far)", *values, self.dropped, exc_info=sys.exc_info()[0] is not None)


def _grouped(rows: Sequence[_Row], most: int) -> Iterator[tuple[tuple[str, ...], list[_Row]]]:
    """What goes in one file: of one day and one order of labels; rows without an answer go with any."""
    usual = next((row.labels for row in rows if row.labels), ())
    groups: dict[tuple[date, tuple[str, ...]], list[_Row]] = {}
    for row in rows:
        groups.setdefault((row.time.date(), row.labels or usual), []).append(row)
    for (_, labels), group in groups.items():
        for start in range(0, len(group), most):
            yield labels, group[start : start + most]


def _parquet(labels: tuple[str, ...], rows: list[_Row]) -> bytes:
    columns = dict(zip(SCHEMA.names, zip(*(row.columns for row in rows), strict=True), strict=True))
    packed = columns.pop("scores")
    arrays = {name: pa.array(values, SCHEMA.field(name).type) for name, values in columns.items()}
    ends = np.cumsum([0, *(len(each or b"") // 4 for each in packed)]).astype(np.int32)
    flat, missing = (
        np.frombuffer(b"".join(each or b"" for each in packed), np.float32),
        [each is None for each in packed],
    )
    arrays["scores"] = pa.ListArray.from_arrays(pa.array(ends), pa.array(flat), mask=pa.array(missing))
    table, sink = pa.table([arrays[name] for name in SCHEMA.names], schema=labelled(labels)), pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


class Recorders:
    """Those of all models of an endpoint. ``record`` is the event loop's; what writes is a thread's, one call at a time."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], tuple[Recorder, Recording]] = {}
        """By storage and model."""
        self._noted: dict[tuple[str, str], int] = {}
        self._tidy_at = 0.0

    def of(self, storage: str, model: str, terms: Recording) -> Recorder:
        recorder, known = self.known.get((storage, model), (None, None))
        if recorder is None:
            recorder = Recorder(storage_at(storage), model)
        if known != terms:
            recorder.share, recorder.keep_inputs = terms.share, terms.keep_inputs
            self.known[storage, model] = recorder, terms
        return recorder

    def news(self) -> Iterator[tuple[str, int, int]]:
        """Of each model, how many rows were written and dropped since the last call."""
        for recorder, _ in self.known.values():
            written, dropped = recorder.written, recorder.dropped
            yield recorder.model, written - recorder.told_written, dropped - recorder.told_dropped
            recorder.told_written, recorder.told_dropped = written, dropped

    def write_due(self, storages: Iterable[str] = ()) -> None:
        """And once an hour, forget what is too old, in ``storages`` too: of models that are recorded no more, or not here."""
        self._note_terms()
        for recorder, _ in list(self.known.values()):
            if recorder.due():
                recorder.flush()
        if time.time() >= self._tidy_at:
            self._tidy_at = time.time() + _TIDY_S
            for storage in {*storages, *(storage for storage, _ in self.known)}:
                _tidy(storage_at(storage))

    def write_all(self) -> None:
        self._note_terms()
        for recorder, _ in list(self.known.values()):
            recorder.flush()

    def _note_terms(self) -> None:
        """How long answers are kept stands beside them, for when their model is gone."""
        for (storage, model), (recorder, terms) in list(self.known.items()):
            if self._noted.get((storage, model)) != terms.keep_days:
                try:
                    note_days(recorder.storage, model, terms.keep_days)
                except OSError:
                    recorder.complain("cannot write how long answers of %s are kept", model)
                else:
                    self._noted[storage, model] = terms.keep_days


def _tidy(storage: Storage) -> None:
    for model in recorded_models(storage):
        try:
            if (days := noted_days(storage, model)) is not None:
                forget(storage, model, datetime.now(UTC).date() - timedelta(days=days))
        except (OSError, ValueError, TypeError, KeyError):
            log.warning("cannot remove old answers of %s", model, exc_info=True)
