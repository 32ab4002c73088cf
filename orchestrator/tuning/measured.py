"""What a trial says of itself: plain data that crosses processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from orchestrator.tuning.space import Point


@dataclass(frozen=True)
class Measured:
    """``pruned``: stopped early by the scheduler, its metrics those of its last epochs. ``failed``: it raised."""

    state: Literal["complete", "pruned", "failed"]
    metrics: dict[str, float] = field(default_factory=dict)
    location: str = ""
    """The run's folder."""
    epochs: int = 0
    seconds: float = 0.0
    error: str = ""
    kind: str = ""
    """Of a failure: ``out_of_memory``, ``diverged``, ``lost``, ``raised`` and so on, as training's policy names them."""


GoOn = Callable[[int, float, Measured], bool]
"""Asked after an epoch (0-based) that is not the last: its objective, and what would be told if the trial ended here."""


class RunTrial(Protocol):
    """Trains and measures; runs in a worker process, so it is pickled with what it holds. Called again with the same number
    and point after a kill, it goes on from where it was."""

    def __call__(self, number: int, point: Point, go_on: GoOn) -> Measured: ...
