"""Where answers that were kept lie, and in which form: ``serve/predictions/MODEL/date=DAY/*.parquet`` in the storage.

Knows no HTTP and no Ray.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date, datetime

import pyarrow as pa
from pyarrow import fs

from orchestrator.storage import Storage, atomic_write, disk_errors

SCHEMA = pa.schema([
    ("time", pa.timestamp("ms", "UTC")), ("request_id", pa.string()), ("index", pa.int32()),
    ("model_version", pa.string()), ("arm", pa.string()), ("label", pa.string()), ("score", pa.float32()),
    ("scores", pa.list_(pa.float32())), ("error", pa.string()), ("latency_ms", pa.float32()), ("input", pa.string()),
    ("input_sha256", pa.string()),
])  # fmt: skip
"""``scores`` are in the order of the labels, which stand in the table's metadata: see ``labels_of``. ``input_sha256`` tells
equal inputs; who guesses a short text can confirm it by that."""


def labelled(labels: Sequence[str]) -> pa.Schema:
    return SCHEMA.with_metadata({"labels": json.dumps(list(labels))})


def labels_of(table: pa.Table) -> list[str]:
    """The labels that the table's ``scores`` belong to, in their order."""
    labels: list[str] = json.loads(table.schema.metadata[b"labels"])
    return labels


_ROOT, _TERMS = "serve/predictions", "terms.json"


def predictions_location(name: str) -> str:
    """Answers of a model that were kept: a folder ``date=DAY`` for each day, in UTC."""
    return f"{_ROOT}/{name}"


def predictions_file(name: str, first: datetime, unique: str) -> str:
    """``first``: time of its first row."""
    told = first.strftime("%Y%m%dT%H%M%S%f")[:-3]
    return f"{predictions_location(name)}/date={first.date().isoformat()}/{told}-{unique}.parquet"


def _place(storage: Storage, location: str) -> str:
    return str(storage.path(location)) if storage.is_local else f"{storage.base.rstrip('/')}/{location}"


def files_in(storage: Storage, location: str, suffix: str) -> list[str]:
    """Locations of the files directly in a folder, sorted; what is still being written has another name."""
    selector = fs.FileSelector(_place(storage, location), allow_not_found=True)
    found = (info.base_name for info in storage.filesystem.get_file_info(selector) if info.is_file)
    return [f"{location}/{name}" for name in sorted(found) if name.endswith(suffix)]


def read_bytes(storage: Storage, location: str) -> bytes:
    with storage.filesystem.open_input_stream(_place(storage, location)) as stream:
        return bytes(stream.read())


def write_bytes(storage: Storage, location: str, content: bytes) -> None:
    """Readers see all of it or nothing; an object store shows an object when it is complete. Raises OSError, DiskFull."""
    if storage.is_local:
        with disk_errors(storage.path(location)):
            atomic_write(storage.path(location), content)
        return
    storage.filesystem.create_dir(_place(storage, location).rpartition("/")[0], recursive=True)
    with storage.filesystem.open_output_stream(_place(storage, location)) as sink:
        sink.write(content)


def recorded_models(storage: Storage) -> list[str]:
    return storage.children(_ROOT)


def note_days(storage: Storage, model: str, days: int) -> None:
    """How long the model's answers are kept. Raises OSError."""
    storage.write_json(f"{predictions_location(model)}/{_TERMS}", {"keep_days": days})


def noted_days(storage: Storage, model: str) -> int | None:
    """None: nobody said. Raises OSError, ValueError, TypeError or KeyError if it cannot be read."""
    noted = storage.read_json(f"{predictions_location(model)}/{_TERMS}")
    return None if noted is None else int(noted["keep_days"])


def days_of(storage: Storage, model: str) -> list[tuple[date, str]]:
    """Days, and where their files are. Folders that are named for no day are somebody else's."""
    root = predictions_location(model)
    return [(day, f"{root}/{name}") for name in storage.children(root) if (day := _day(name)) is not None]


def _day(folder: str) -> date | None:
    match = re.fullmatch(r"date=(\d{4}-\d\d-\d\d)", folder)
    try:
        return None if match is None else date.fromisoformat(match[1])
    except ValueError:  # the 30th of February
        return None


def forget(storage: Storage, model: str, before: date) -> int:
    """Remove the days before that one; returns how many there were."""
    past = [folder for day, folder in days_of(storage, model) if day < before]
    for folder in past:
        storage.remove(folder)
    return len(past)
