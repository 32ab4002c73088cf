"""Writing checkpoints while training goes on: one at a time, in a thread, from a copy of the tensors.

In: a function that writes. Out: nothing, or at the next call the error that it met. Knows no files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

_POLL_S = 1.0


class BackgroundWriter:
    def __init__(self, beat: Callable[[], None] = lambda: None) -> None:
        """``beat`` is called every second while somebody waits: a slow disk is no hang."""
        self._threads, self._beat = ThreadPoolExecutor(1, "checkpoint"), beat
        self._pending: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Start a write when the one before it is done. Raises what that one met."""
        self.finish()
        self._pending = self._threads.submit(write)

    def finish(self) -> None:
        """Wait for the write that is under way. Raises what it met."""
        pending, self._pending = self._pending, None
        if pending is not None:
            while not wait([pending], _POLL_S).done:
                self._beat()
            pending.result()

    def close(self) -> None:
        """Wait, whatever comes of it: the caller has an error of its own."""
        with contextlib.suppress(Exception):
            self.finish()
        self._threads.shutdown()
