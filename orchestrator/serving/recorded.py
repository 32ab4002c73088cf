"""Answers that were kept, as one table, with what users said of them.

In: a storage, a model, a span of time. Out: an Arrow table, ``prediction_files.SCHEMA`` and more. What is damaged is left out
and named. Knows no HTTP and no Ray.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.serving.prediction_files import SCHEMA, days_of, files_in, labelled, labels_of, read_bytes
from orchestrator.storage import Storage, feedback_location

log = logging.getLogger(__name__)


def read_predictions(
    storage: Storage, model: str, since: datetime | None = None, until: datetime | None = None
) -> pa.Table:
    """What was recorded from ``since`` on and before ``until`` (None: no limit), oldest first. A damaged file is left out, and
    a warning names it. Where labels differ between files, ``scores`` are null for those that a model did not have."""
    tables = [labelled(()).empty_table()]
    for day, folder in days_of(storage, model):
        if (since is None or day >= _utc(since).date()) and (until is None or day <= _utc(until).date()):
            tables += [
                table for file in files_in(storage, folder, ".parquet") if (table := _read(storage, file)) is not None
            ]
    labels = list(dict.fromkeys(label for table in tables for label in labels_of(table)))
    table = pa.concat_tables([_reordered(table, labels) for table in tables])
    for limit, keep in ((since, pc.greater_equal), (until, pc.less)):
        if limit is not None:
            table = table.filter(keep(table["time"], pa.scalar(_utc(limit), pa.timestamp("us", "UTC"))))
    return table.sort_by([("time", "ascending"), ("request_id", "ascending"), ("index", "ascending")])


def _utc(moment: datetime) -> datetime:
    """A moment that names no zone is one in UTC."""
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _read(storage: Storage, location: str) -> pa.Table | None:
    try:
        content = pa.BufferReader(read_bytes(storage, location))
        table = pq.read_table(content, page_checksum_verification=True)
        return table.cast(labelled(labels_of(table)))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged and left out: %s", storage.place(location), error)
        return None


def _reordered(table: pa.Table, labels: Sequence[str]) -> pa.Table:
    """With scores in another order of labels."""
    if (old := labels_of(table)) != labels:
        rows = [None if row is None else dict(zip(old, row, strict=True)) for row in table["scores"].to_pylist()]
        scores = [None if row is None else [row.get(label) for label in labels] for row in rows]
        field = SCHEMA.field("scores")
        table = table.set_column(SCHEMA.names.index("scores"), field, pa.array(scores, field.type))
    return table.replace_schema_metadata(labelled(labels).metadata)


def with_feedback(
    storage: Storage, model: str, since: datetime | None = None, until: datetime | None = None
) -> pa.Table:
    """``read_predictions``, and what users said of it: ``told_label`` (null: nothing), and ``right``, whether that is what was
    answered (null: nobody said, or nothing was answered). What was said last of an input counts, whenever it was said. Where
    several requests have one id, it is said of the newest of them, and of no other input."""
    table, told = read_predictions(storage, model, since, until), _told(storage, model)
    keys = list(zip(table["request_id"].to_pylist(), table["index"].to_pylist(), strict=True))
    inputs = table["input_sha256"].to_pylist()
    newest = dict(zip(keys, inputs, strict=True))  # rows are in the order of time
    said = [
        told.get(key, ("", None))[1] if newest[key] == value else None for key, value in zip(keys, inputs, strict=True)
    ]
    labels = pa.chunked_array([pa.array(said, pa.string())])
    return table.append_column("told_label", labels).append_column("right", pc.equal(table["label"], labels))


def _told(storage: Storage, model: str) -> dict[tuple[str, int], tuple[str, str | None]]:
    """Request id and index -> time and label of the last remark."""
    told: dict[tuple[str, int], tuple[str, str | None]] = {}
    for line in _remarks(storage, feedback_location(model)):
        try:
            remark = json.loads(line)
            key, said = (remark["request_id"], remark.get("index", 0)), (remark.get("time", ""), str(remark["label"]))
            if said[0] >= told.get(key, ("", None))[0]:
                told[key] = said
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("a damaged remark in %s is left out", storage.place(feedback_location(model)))
    return told


def _remarks(storage: Storage, location: str) -> Iterator[bytes]:
    path = storage.path(f"{location}.jsonl")
    if storage.is_local and path.is_file():
        with path.open("rb") as file:
            yield from file
    elif not storage.is_local:
        with ThreadPoolExecutor(8) as threads:
            yield from threads.map(lambda file: read_bytes(storage, file), files_in(storage, location, ".json"))
