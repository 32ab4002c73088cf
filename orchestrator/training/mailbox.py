"""What the workers tell the driver: events to show, signs of life, and a question that waits for its answer. An actor in a
process of its own, so it is quick to import: neither torch nor Ray.
"""

from __future__ import annotations

from typing import Any

from orchestrator.progress import Event
from orchestrator.training.watch import Beat


class Mailbox:
    """Carries it without a barrier among the workers."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.beats: dict[int, Beat] = {}
        self.question: Any = None
        self.verdict: bool | None = None

    def put(self, event: Event) -> None:
        self.events.append(event)

    def beat(self, beat: Beat) -> None:
        self.beats[beat.rank] = beat

    def drain(self) -> tuple[list[Event], list[Beat], Any]:
        """Everything since the last time, and the question, if one is open."""
        events, beats, question = self.events, list(self.beats.values()), self.question
        self.events, self.beats, self.question = [], {}, None
        return events, beats, question

    def ask(self, question: Any) -> None:
        self.question, self.verdict = question, None

    def answer(self, verdict: bool) -> None:
        self.verdict = verdict

    def answered(self) -> bool | None:
        """None: not yet."""
        return self.verdict

    def flush(self) -> None:
        """Returns after every ``put`` that was sent before it."""
