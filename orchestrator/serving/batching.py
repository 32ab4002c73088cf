"""Dynamic batching: requests that arrive while a batch is computed form the next one.

In: requests of one or more inputs each. Out: their results. Serve's own ``@serve.batch`` closes a batch by time alone,
even while the previous one is still being computed: it gathers only for as long as it makes every request wait. And it
takes no request of several inputs. Knows neither Ray nor models.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Waiting(Generic[T, R]):
    inputs: Sequence[T]
    result: asyncio.Future[tuple[list[R], int]]


class Batcher(Generic[T, R]):
    """Computes in one thread, in the order of arrival, as many requests together as fit in a batch."""

    def __init__(self, compute: Callable[[list[T]], list[R]], max_batch_size: int, wait_s: float = 0.0) -> None:
        """``compute``: inputs -> as many results. ``wait_s``: how long an idle thread waits for company."""
        self.compute, self.max_batch_size, self.wait_s = compute, max_batch_size, wait_s
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="predict")
        self.waiting: deque[_Waiting[T, R]] = deque()
        self.worker: asyncio.Task[None] | None = None

    async def submit(self, inputs: Sequence[T]) -> tuple[list[R], int]:
        """The results of these inputs, and how many were computed together with them, themselves included.

        A request larger than ``max_batch_size`` is a batch of its own. Raises what ``compute`` raises.
        """
        future: asyncio.Future[tuple[list[R], int]] = asyncio.get_running_loop().create_future()
        self.waiting.append(_Waiting(inputs, future))
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Lives as long as anything waits."""
        if self.wait_s:
            await asyncio.sleep(self.wait_s)
        while batch := self._gather():
            inputs = [value for request in batch for value in request.inputs]
            try:
                results = await asyncio.get_running_loop().run_in_executor(self.thread, self.compute, inputs)
            except Exception as error:  # noqa: BLE001  (each waiting request gets it)
                _fail(batch, error)
            else:
                _deliver(batch, results)

    def _gather(self) -> list[_Waiting[T, R]]:
        """The oldest requests, up to a full batch; those whose caller has gone are dropped."""
        batch: list[_Waiting[T, R]] = []
        size = 0
        while self.waiting:
            request = self.waiting[0]
            if batch and size + len(request.inputs) > self.max_batch_size:
                break
            self.waiting.popleft()
            if not request.result.done():
                batch.append(request)
                size += len(request.inputs)
        return batch


def _deliver(batch: Sequence[_Waiting[T, R]], results: list[R]) -> None:
    start = 0
    for request in batch:
        end = start + len(request.inputs)
        if not request.result.done():
            request.result.set_result((results[start:end], len(results)))
        start = end


def _fail(batch: Sequence[_Waiting[T, R]], error: Exception) -> None:
    for request in batch:
        if not request.result.done():
            request.result.set_exception(error)
