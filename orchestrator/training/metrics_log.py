"""A run's metrics: one JSON object per line, and the same numbers for TensorBoard. No step appears twice.

In: dictionaries with a ``step``. Out: metrics.jsonl and a tensorboard folder. A run that goes back to a checkpoint first
drops the lines of the steps it is about to do again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.storage import METRICS, TENSORBOARD, atomic_write


class MetricsLog:
    def __init__(self, folder: Path, resume_step: int) -> None:
        """Lines with a step above ``resume_step`` are dropped: they will be written again."""
        from tensorboardX import SummaryWriter

        self.file = folder / METRICS
        kept = [line for line in read_metrics(self.file) if line["step"] <= resume_step]
        atomic_write(self.file, b"".join(_line(values) for values in kept))
        self.board = SummaryWriter(str(folder / TENSORBOARD), purge_step=resume_step + 1)
        self.handle = self.file.open("ab")

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """``kind``: ``train`` (a step) or ``validation`` (an epoch)."""
        self.handle.write(_line({"kind": kind, "step": step, **values}))
        self.handle.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        self.board.flush()

    def close(self) -> None:
        self.handle.close()
        self.board.close()


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """All whole lines in order; a line that a kill left half-written is left out."""
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"
