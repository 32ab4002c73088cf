"""Keeping what happened, one JSON line each, or a small file each where nothing can be appended to: users' remarks on answers,
the log of rollouts.

In: entries as JSON objects. Out: ``<location>.jsonl`` in the storage. Knows no HTTP.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from typing import Any, BinaryIO

from orchestrator.serving.prediction_files import write_bytes
from orchestrator.storage import Storage, disk_errors, feedback_location, sync_folder


def append_feedback(storage: Storage, name: str, entry: dict[str, Any]) -> None:
    """Store one remark so that it survives a power cut. Raises DiskFull."""
    append_entry(storage, feedback_location(name), entry)


def append_entry(storage: Storage, location: str, entry: dict[str, Any]) -> None:
    """Add it so that it survives a power cut, whole or not at all. Raises DiskFull."""
    content = json.dumps(entry, ensure_ascii=True).encode()
    if not storage.is_local:
        write_bytes(storage, f"{location}/{uuid.uuid4().hex}.json", content)
        return
    path = storage.path(f"{location}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path), path.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # what is taken back below must not be another's
        end = file.seek(0, os.SEEK_END)
        try:
            _write_all(file, (b"\n" if _is_torn(file, end) else b"") + content + b"\n")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise
        if end == 0:
            sync_folder(path.parent)


def _is_torn(file: BinaryIO, end: int) -> bool:
    """Whether a writer died amid the last line."""
    return end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"


def _write_all(file: BinaryIO, content: bytes) -> None:
    """A disk that fills up takes a part first."""
    written = 0
    while written < len(content):
        written += file.write(content[written:])
