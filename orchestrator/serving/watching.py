"""Work that goes on beside the answers, and telling what is wrong with it once instead of every second.

In: functions that are called again and again. Out: a task for each of them, so that one that hangs or fails holds up no other.
Knows no HTTP and no Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from orchestrator.errors import ServingFailed

log = logging.getLogger(__name__)


class Complaints:
    """What is wrong is told when it begins, and again when it has become something else."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}

    def tell(self, about: str, text: str, *, exc_info: bool = False) -> None:
        if self._told.get(about) != text:
            self._told[about] = text
            log.warning("%s", text, exc_info=exc_info)

    def settle(self, about: str) -> None:
        """It is well again."""
        self._told.pop(about, None)


class Rounds:
    """Functions that are called again and again, each in a task of its own, a while after it has returned or failed."""

    def __init__(self, works: Mapping[str, Callable[[], Awaitable[None]]], every_s: float) -> None:
        """``works``: by what is then not known if it fails, for the log."""
        self._works, self._every_s, self._complaints = works, every_s, Complaints()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        self._tasks = {what: asyncio.create_task(self._go_round(what)) for what in self._works}

    def stop(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self._tasks = {}

    def check(self) -> None:
        """Raises ServingFailed if one of them has ended."""
        if ended := [what for what, task in self._tasks.items() if task.done()]:
            raise ServingFailed(f"the gateway no longer sees {' and '.join(ended)}", "see Serve's logs")

    async def once(self, what: str) -> None:
        try:
            await self._works[what]()
        except Exception as error:  # noqa: BLE001  (what was known so far goes on being used)
            self._complaints.tell(what, f"cannot see {what}: {error!r}", exc_info=True)
        else:
            self._complaints.settle(what)

    async def _go_round(self, what: str) -> None:
        while True:
            await self.once(what)
            await asyncio.sleep(self._every_s)
