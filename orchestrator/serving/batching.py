"""Dynamic batching: requests that arrive while a batch is computed form the next one.

In: requests of one or more inputs each. Out: their results. An idle thread waits for nobody: under load it is never idle, and
otherwise waiting gains nothing. Serve's own ``@serve.batch`` closes a batch by time alone,
even while the previous one is still being computed: it gathers only for as long as it makes every request wait. And it
takes no request of several inputs. Knows neither Ray nor models.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batched(NamedTuple, Generic[R]):
    results: list[R]
    """Of the request's own inputs."""
    batch_size: int
    """How many were computed together, these included."""
    queue_s: float
    """Until the batch began."""


@dataclass(frozen=True)
class _Waiting(Generic[T, R]):
    inputs: Sequence[T]
    result: asyncio.Future[Batched[R]]
    since_s: float


class Batcher(Generic[T, R]):
    """Computes in one thread, in the order of arrival, as many requests together as fit in a batch."""

    def __init__(
        self, compute: Callable[[list[T]], list[R]], max_batch_size: int, thread: ThreadPoolExecutor | None = None
    ) -> None:
        """``compute``: inputs -> as many results. ``thread``: which computes; None for one of its own."""
        self.compute, self.max_batch_size = compute, max_batch_size
        self.thread = thread or ThreadPoolExecutor(1, thread_name_prefix="predict")
        self.waiting: deque[_Waiting[T, R]] = deque()
        self.worker: asyncio.Task[None] | None = None

    async def submit(self, inputs: Sequence[T]) -> Batched[R]:
        """A request larger than ``max_batch_size`` is a batch of its own. Raises what ``compute`` raises."""
        future: asyncio.Future[Batched[R]] = asyncio.get_running_loop().create_future()
        self.waiting.append(_Waiting(inputs, future, time.monotonic()))
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Lives as long as anything waits."""
        while batch := self._gather():
            inputs, began_s = [value for request in batch for value in request.inputs], time.monotonic()
            try:
                results = await asyncio.get_running_loop().run_in_executor(self.thread, self.compute, inputs)
            except Exception as error:  # noqa: BLE001  (each waiting request gets it)
                _fail(batch, error)
            else:
                _deliver(batch, results, began_s)

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


def _deliver(batch: Sequence[_Waiting[T, R]], results: list[R], began_s: float) -> None:
    start = 0
    for request in batch:
        end = start + len(request.inputs)
        if not request.result.done():
            request.result.set_result(Batched(results[start:end], len(results), began_s - request.since_s))
        start = end


def _fail(batch: Sequence[_Waiting[T, R]], error: Exception) -> None:
    for request in batch:
        if not request.result.done():
            request.result.set_exception(error)
