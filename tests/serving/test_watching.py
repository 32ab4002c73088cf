"""Work beside the answers: one that hangs or fails holds up no other, and is told once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from orchestrator.errors import ServingFailed
from orchestrator.serving.watching import Complaints, Rounds


async def until(right: Callable[[], bool]) -> None:
    async with asyncio.timeout(60.0):
        while not right():
            await asyncio.sleep(0.001)


def test_one_that_hangs_or_fails_holds_up_no_other(caplog: pytest.LogCaptureFixture) -> None:
    rounds = {"good": 0, "bad": 0}

    async def hang() -> None:
        await asyncio.Event().wait()

    async def fail() -> None:
        rounds["bad"] += 1
        raise OSError("no storage")

    async def work() -> None:
        rounds["good"] += 1

    async def run() -> None:
        all_of_them = Rounds({"models": hang, "keys": fail, "answers": work}, 0.001)
        all_of_them.start()
        await until(lambda: min(rounds.values()) >= 3)
        all_of_them.check()
        all_of_them.stop()

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert [record.message for record in caplog.records] == ["cannot see keys: OSError('no storage')"], "once"


def test_one_that_has_ended_is_noticed() -> None:
    async def end() -> None:
        raise asyncio.CancelledError

    async def run() -> None:
        rounds = Rounds({"which keys there are": end}, 0.001)
        rounds.check()
        rounds.start()
        await until(lambda: rounds._tasks["which keys there are"].done())
        with pytest.raises(ServingFailed, match="no longer sees which keys there are"):
            rounds.check()

    asyncio.run(run())


def test_a_complaint_is_made_when_it_begins_and_when_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    complaints = Complaints()
    with caplog.at_level(logging.WARNING):
        for text in ("full", "full", "gone", "gone"):
            complaints.tell("disk", text)
        complaints.settle("disk")
        complaints.tell("disk", "gone")
    assert [record.message for record in caplog.records] == ["full", "gone", "gone"]
