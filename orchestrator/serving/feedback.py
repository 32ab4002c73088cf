"""Keeping what happened, one JSON line each, or a small file each where nothing can be appended to: users' remarks on answers,
the log of rollouts.

In: entries as JSON objects. Out: ``<location>.jsonl`` in the storage. Knows no HTTP.
"""

from __future__ import annotations

import json
import os
import uuid
from typing import Any

from orchestrator.storage import Storage, disk_errors, feedback_location


def append_feedback(storage: Storage, name: str, entry: dict[str, Any]) -> None:
    """Store one remark so that it survives a power cut. Raises DiskFull."""
    append_entry(storage, feedback_location(name), entry)


def append_entry(storage: Storage, location: str, entry: dict[str, Any]) -> None:
    """Add it so that it survives a power cut. Raises DiskFull."""
    if not storage.is_local:
        storage.write_json(f"{location}/{uuid.uuid4().hex}.json", entry)
        return
    path = storage.path(f"{location}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(entry, ensure_ascii=True).encode() + b"\n"
    with disk_errors(path), path.open("ab", buffering=0) as file:
        file.write(line)
        os.fsync(file.fileno())
