"""A file that is hashed and flushed while it is written.

In: bytes, as they come. Out: the file, and its SHA-256.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

_FLUSH_BYTES = 16 << 20


class HashingFile:
    """A binary file for writing, with the SHA-256 of what was written to it.

    The disk writes while the caller computes: a flush of everything at the end would leave the cores idle.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flushes: list[Future[None]] = []
        self._unflushed_bytes = 0

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        self._digest.update(view)
        written = 0
        while written < len(view):  # a disk that fills up takes a part first
            written += self._file.write(view[written:])
        self._unflushed_bytes += written
        if self._unflushed_bytes >= _FLUSH_BYTES:
            self._flushes.append(self._flusher.submit(os.fdatasync, self._file.fileno()))
            self._unflushed_bytes = 0
        return written

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Raises OSError when a flush failed: the system reports that once only."""
        self._flusher.shutdown()
        self._file.close()
        for flush in self._flushes:
            flush.result()
