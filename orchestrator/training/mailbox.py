"""What the workers tell the driver: events to show and signs of life. An actor in a process of its own, so it is quick to
import: neither torch nor Ray.
"""

from __future__ import annotations

from orchestrator.progress import Event
from orchestrator.training.watch import Beat


class Mailbox:
    """Carries it without a barrier among the workers."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.beats: dict[int, Beat] = {}

    def put(self, event: Event) -> None:
        self.events.append(event)

    def beat(self, beat: Beat) -> None:
        self.beats[beat.rank] = beat

    def drain(self) -> tuple[list[Event], list[Beat]]:
        """Everything since the last time."""
        events, beats, self.events, self.beats = self.events, list(self.beats.values()), [], {}
        return events, beats

    def flush(self) -> None:
        """Returns after every ``put`` that was sent before it."""
