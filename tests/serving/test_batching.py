"""Requests that arrive while a batch is computed form the next one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from orchestrator.serving.batching import Batched, Batcher


class Doubler:
    """Doubles numbers; the first batch waits until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()

    def __call__(self, inputs: list[int]) -> list[int]:
        self.batches.append(inputs)
        assert self.go.wait(60)
        if -1 in inputs:
            raise ValueError("minus one")
        return [2 * value for value in inputs]


async def _settle(condition: Sequence[object]) -> None:
    while not condition:
        await asyncio.sleep(0.001)


def test_company_is_found_while_the_first_batch_is_computed() -> None:
    async def scenario() -> None:
        double = Doubler()
        batcher: Batcher[int, int] = Batcher(double, 4)
        first = asyncio.create_task(batcher.submit([1]))
        await _settle(double.batches)
        rest = [asyncio.create_task(batcher.submit([n])) for n in range(2, 8)]
        await asyncio.sleep(0.01)
        double.go.set()
        assert (await first)[:2] == ([2], 1)
        assert [(await task)[:2] for task in rest] == [([4], 4), ([6], 4), ([8], 4), ([10], 4), ([12], 2), ([14], 2)]
        assert double.batches == [[1], [2, 3, 4, 5], [6, 7]]

    asyncio.run(scenario())


def test_requests_stay_whole_and_in_order() -> None:
    async def scenario() -> None:
        double = Doubler()
        double.go.set()
        batcher: Batcher[int, int] = Batcher(double, 4)
        answers = await asyncio.gather(*(batcher.submit(list(range(size))) for size in (3, 2, 9, 1)))
        assert [each.results for each in answers] == [[0, 2, 4], [0, 2], [0, 2, 4, 6, 8, 10, 12, 14, 16], [0]]
        assert [len(batch) for batch in double.batches] == [3, 2, 9, 1]

    asyncio.run(scenario())


def test_an_idle_batcher_waits_for_nobody() -> None:
    async def scenario() -> None:
        double = Doubler()
        batcher: Batcher[int, int] = Batcher(double, 4)
        first = asyncio.create_task(batcher.submit([1]))
        await _settle(double.batches)
        second = asyncio.create_task(batcher.submit([2]))
        double.go.set()
        answers = await asyncio.gather(first, second)
        assert [each[:2] for each in answers] == [([2], 1), ([4], 1)]

    asyncio.run(scenario())


def test_a_failure_reaches_its_own_batch_and_no_other() -> None:
    async def scenario() -> None:
        double = Doubler()
        double.go.set()
        batcher: Batcher[int, int] = Batcher(double, 1)
        results = await asyncio.gather(batcher.submit([-1]), batcher.submit([3]), return_exceptions=True)
        assert isinstance(results[0], ValueError)
        assert isinstance(results[1], Batched) and results[1][:2] == ([6], 1)

    asyncio.run(scenario())


def test_nothing_is_computed_for_a_caller_who_has_gone() -> None:
    async def scenario() -> None:
        double = Doubler()
        batcher: Batcher[int, int] = Batcher(double, 1)
        first, gone = asyncio.create_task(batcher.submit([1])), asyncio.create_task(batcher.submit([5]))
        await _settle(double.batches)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        double.go.set()
        await first
        assert (await batcher.submit([7]))[0] == [14]
        assert double.batches == [[1], [7]]

    asyncio.run(scenario())


def test_how_long_a_request_waited_for_its_batch() -> None:
    async def scenario() -> None:
        double = Doubler()
        batcher: Batcher[int, int] = Batcher(double, 4)
        began_s = time.monotonic()
        first = asyncio.create_task(batcher.submit([1]))
        await _settle(double.batches)
        taken_s = time.monotonic()
        second = asyncio.create_task(batcher.submit([2]))
        await asyncio.sleep(0)
        waiting_s = time.monotonic()
        await asyncio.sleep(0.05)
        let_go_s = time.monotonic()
        double.go.set()
        assert 0.0 <= (await first).queue_s <= taken_s - began_s
        assert let_go_s - waiting_s <= (await second).queue_s <= time.monotonic() - taken_s

    asyncio.run(scenario())
