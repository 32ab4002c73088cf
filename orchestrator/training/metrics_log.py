"""A run's metrics: one JSON object per line, and the same numbers for TensorBoard. No step appears twice.

In: dictionaries with a ``step``. Out: metrics.jsonl and a tensorboard folder. A run that goes back to a checkpoint first
drops the lines of the steps it is about to do again.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.storage import METRICS, TENSORBOARD, atomic_write, disk_errors


@dataclass(frozen=True)
class Scores:
    """Validation scores of two epochs."""

    best: dict[str, float]
    """Of the best so far: what the run's model would have."""
    latest: dict[str, float]


class MetricsLog:
    """Raises DiskFull from every method when there is no room."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        """Lines with a step above ``resume_step`` are dropped: they will be written again."""
        self.file = folder / METRICS
        kept = [line for line in read_metrics(self.file) if line["step"] <= resume_step]
        with disk_errors(self.file):
            atomic_write(self.file, b"".join(_line(values) for values in kept))
            self.board = _Board(folder / TENSORBOARD, resume_step)
            self.handle = self.file.open("ab")

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """``kind``: ``train`` (a step) or ``validation`` (an epoch). ``time`` in the file is in seconds since 1970."""
        with disk_errors(self.file):
            self.handle.write(_line({"kind": kind, "step": step, "time": time.time(), **values}))
            self.handle.flush()
            self.board.write(step, {f"{kind}/{n}": float(v) for n, v in values.items() if isinstance(v, int | float)})

    def scores(self, best: int, latest: int) -> Scores:
        """What was written of two epochs' validation."""
        epochs = {line["epoch"]: line for line in read_metrics(self.file) if line["kind"] == "validation"}
        return Scores(epochs.get(best, {}), epochs.get(latest, {}))

    def flush(self) -> None:
        """What was written so far survives a power cut."""
        with disk_errors(self.file):
            os.fsync(self.handle.fileno())
            self.board.events.flush()

    def close(self) -> None:
        with disk_errors(self.file):
            self.handle.close()
            self.board.events.close()


class _Board:
    """TensorBoard's file, written in the caller's thread.

    tensorboardX's SummaryWriter has a thread of its own: a full disk ends it without a word, and then the next events
    wait for it for ever.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._summary = Event, Summary
        self.events = EventsWriter(str(folder / "events"), f".{resume_step}")  # its name has but a time in seconds
        # From here on a reader forgets what an earlier attempt wrote about these steps.
        self.events.write_event(Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, float]) -> None:
        summary = self._summary(value=[self._summary.Value(tag=name, simple_value=v) for name, v in values.items()])
        self.events.write_event(self._event(step=step, wall_time=time.time(), summary=summary))


def write_hparams(folder: Path, parameters: dict[str, Any], metrics: dict[str, float]) -> None:
    """For TensorBoard's table of hyper-parameters: what a run was given and what came out, beside its curves."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.summary import hparams

    board = folder / TENSORBOARD
    with disk_errors(board):
        board.mkdir(parents=True, exist_ok=True)
        events = EventsWriter(str(board / "events"), ".hparams")
        values = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in parameters.items()
        }
        scalars = Summary(
            value=[Summary.Value(tag=f"best/{name}", simple_value=value) for name, value in metrics.items()]
        )
        for summary in (*hparams(values, {f"best/{name}": value for name, value in metrics.items()}), scalars):
            events.write_event(Event(wall_time=time.time(), summary=summary))
        events.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """All whole lines in order; a line that a kill left half-written is left out."""
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"
