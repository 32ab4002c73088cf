"""Finding the worker that stands still: each gives signs of life, and the driver looks at when they last changed.

A thread of each worker sends a ``Beat`` now and then. A stopped process sends none. A worker that is stuck still sends them,
but its count of things done stands still, and so do soon the counts of all the others, who wait for it: the one that has
done least is the one to blame. Knows no Ray.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import orchestrator

_PACKAGE = str(Path(orchestrator.__file__).parent)


@dataclass(frozen=True)
class Beat:
    rank: int
    process: str
    """What is needed to end the process, in the driver's words."""
    count: int
    """Things done so far: parts of steps, batches of a validation. 0 until the first: loading takes what it takes."""
    line: str
    """Where the worker is in our code."""
    is_over: bool = False


@dataclass(frozen=True)
class Hang:
    rank: int
    process: str
    message: str


class Heart:
    """In a worker: ``beat()`` says that something was done, and a thread tells it to the driver every ``every_s``."""

    def __init__(self, rank: int, process: str, send: Callable[[Beat], object], every_s: float) -> None:
        self.rank, self.process, self.send, self.every_s = rank, process, send, every_s
        self.count, self.stopped, self.watched = 0, threading.Event(), threading.get_ident()
        self.thread = threading.Thread(target=self._loop, name="heart", daemon=True)

    def beat(self) -> None:
        self.count += 1

    def __enter__(self) -> Callable[[], None]:
        self.thread.start()
        return self.beat

    def __exit__(self, *exception: object) -> None:
        self.stopped.set()
        self.thread.join()
        self.send(Beat(self.rank, self.process, self.count, "", is_over=True))

    def _loop(self) -> None:
        while not self.stopped.is_set():
            self.send(Beat(self.rank, self.process, self.count, line_of(self.watched)))
            self.stopped.wait(self.every_s)


def line_of(thread: int) -> str:
    """The innermost line of ours that the thread is at."""
    frame = sys._current_frames().get(thread)
    ours = [f for f in traceback.extract_stack(frame) if f.filename.startswith(_PACKAGE)] if frame else []
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno} in {ours[-1].name}" if ours else "an unknown line"


@dataclass
class Watch:
    """In the driver: which workers hang."""

    timeout_s: float
    last: dict[int, Beat] = field(default_factory=dict)
    seen_s: dict[int, float] = field(default_factory=dict)
    moved_s: float = 0.0
    """When any worker's count last changed."""

    def note(self, beats: Iterable[Beat], now_s: float) -> None:
        for beat in beats:
            before = self.last.get(beat.rank)
            if before is None or before.count != beat.count or beat.is_over:
                self.moved_s = now_s
            self.last[beat.rank], self.seen_s[beat.rank] = beat, now_s

    def hung(self, now_s: float) -> list[Hang]:
        """Workers that gave no sign for ``timeout_s``; else, if nothing was done for as long, the one that did least."""
        running = [beat for beat in self.last.values() if not beat.is_over]
        silent = [beat for beat in running if now_s - self.seen_s[beat.rank] > self.timeout_s]
        if silent:
            return [Hang(b.rank, b.process, self._told(b, "gave no sign of life")) for b in silent]
        if not running or now_s - self.moved_s <= self.timeout_s or min(b.count for b in running) == 0:
            return []
        least = min(running, key=lambda beat: beat.count)
        return [Hang(least.rank, least.process, self._told(least, "did not get on"))]

    def _told(self, beat: Beat, what: str) -> str:
        return f"{what} for {self.timeout_s:g} s (training.hang_timeout_s), last at {beat.line}, and was ended"
