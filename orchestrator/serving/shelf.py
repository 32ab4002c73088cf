"""Many models in one process within a budget of memory: loaded when first asked, the least recently used unloaded.

In: functions that fetch, load and tidy up, which may take their time. Out: a model, for as long as a block uses it. What is
in use is never unloaded, and no model waits for ever for its turn: the least recently used one lets its users finish, and
those who come after them wait until it is loaded again. Knows neither Ray nor what a model is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar, cast

from orchestrator.errors import StageError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
log = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0


@dataclass(frozen=True)
class Refusal:
    """Why a shelf has no answer, as a value that crosses processes."""

    message: str
    next_step: str
    reason: str = ""
    """What was raised, if that says more: for the log and for those who put it there, not for clients."""
    absent: bool = False
    """It does not stand here, or no longer."""


class CannotLoad(StageError, RuntimeError):
    """For those who wait for a model."""

    def __init__(self, message: str, next_step: str, reason: str) -> None:
        super().__init__(message, next_step)
        self.args = (message, next_step, reason)
        self.reason = reason


@dataclass(frozen=True)
class Stats:
    loaded: tuple[str, ...]
    """The least recently used first."""
    used_bytes: int
    budget_bytes: int
    loads: int
    unloads: int
    failures: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"loaded": list(self.loaded)}


@dataclass(eq=False)
class _Place(Generic[K, T]):
    """Of a model that is loaded or being loaded."""

    key: K
    size_bytes: int = 0
    """Expected, until it is loaded."""
    model: T | None = None
    users: int = 0
    """Who use it or wait for it."""
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    loading: asyncio.Task[None] | None = None
    leaving: asyncio.Task[None] | None = None


@dataclass
class _Failure:
    error: CannotLoad
    until: float
    pause_s: float


class Shelf(Generic[K, T]):
    """Lives in one event loop."""

    def __init__(
        self,
        budget_bytes: int,
        fetch: Callable[[K], int],
        load: Callable[[K, int], tuple[T, int]],
        tidy: Callable[[], None],
        changed: Callable[[list[K]], None] = lambda keys: None,
        name: Callable[[K], str] = str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``fetch``: makes a model's files local, and returns their bytes. ``load``: the model, and the bytes it takes, at
        least those of its files, which it is told. ``tidy``: called after a model was let go of. The three are called in one
        thread of the shelf's own. ``changed``: told which models are asked here best, as soon as they are being loaded.
        ``name``: of a model, for people."""
        self.budget_bytes, self.name, self.clock = budget_bytes, name, clock
        self.fetch, self.load, self.tidy, self.changed = fetch, load, tidy, changed
        self.places: OrderedDict[K, _Place[K, T]] = OrderedDict()
        """The least recently used first. Without those that leave."""
        self.resident: set[_Place[K, T]] = set()
        """All that take memory; also those that leave."""
        self.sizes: dict[K, int] = {}
        """As they were measured last."""
        self.failures: dict[K, _Failure] = {}
        self.loads = self.unloads = self.failed = 0
        self.busy_since: float | None = None
        # One after the other: two that grow at a time cannot be told apart. And libraries keep threads for each caller.
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="load")
        self.turn = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def using(self, key: K) -> AsyncIterator[T]:
        """The model, loaded first if need be; it stays for as long as the block takes.

        Raises CannotLoad: it could not be loaded, now or a moment ago; or it is larger than the whole budget.
        """
        place = self._place(key)
        place.users += 1
        place.idle.clear()
        try:
            if place.loading is not None:
                await asyncio.shield(place.loading)  # others may wait for it, too
            yield cast(T, place.model)
        finally:
            place.users -= 1
            if not place.users:
                place.idle.set()

    async def drop(self, key: K) -> None:
        """Let go of a model that is not going to be asked any more, once its users have finished."""
        self.sizes.pop(key, None)
        self.failures.pop(key, None)
        place = self.places.pop(key, None)
        if place is None:
            return
        self._tell()
        if place.loading is not None:
            await asyncio.wait([place.loading])
        await self._unload(place)

    async def resize(self, budget_bytes: int) -> None:
        """Another budget; what no longer fits is unloaded, and what did not fit may be tried at once."""
        self.budget_bytes = budget_bytes
        self.failures.clear()
        async with self.turn:
            await self._make_room(0)

    @property
    def used_bytes(self) -> int:
        return sum(place.size_bytes for place in self.resident)

    def holds(self, key: K) -> bool:
        """Whether it is loaded."""
        return key in self.places and self.places[key] in self.resident

    def known(self) -> list[K]:
        """Where asking again goes without a load: what is loaded, being loaded, or known to fail."""
        return [*self.places, *(key for key in self.failures if key not in self.places)]

    def busy_s(self) -> float:
        """For how long the load that is under way has taken."""
        return 0.0 if self.busy_since is None else self.clock() - self.busy_since

    def stats(self) -> Stats:
        loaded = tuple(self.name(key) for key, place in self.places.items() if place in self.resident)
        return Stats(loaded, self.used_bytes, self.budget_bytes, self.loads, self.unloads, self.failed)

    # ---------------------------------------------------------------------------------------------------------- loading

    def _place(self, key: K) -> _Place[K, T]:
        """Where the model is or is going to be; the most recently used one now."""
        if key in self.places:
            self.places.move_to_end(key)
            return self.places[key]
        failure = self.failures.get(key)
        if failure is not None and self.clock() < failure.until:
            raise CannotLoad(*failure.error.args)  # a new one: each raise adds to an error's traceback
        place = self.places[key] = _Place[K, T](key)
        place.loading = asyncio.create_task(self._fill(place))
        place.loading.add_done_callback(_retrieved)
        self._tell()
        return place

    async def _fill(self, place: _Place[K, T]) -> None:
        try:
            async with self.turn:
                if not place.users:  # all who wanted it have gone while others were loaded
                    self._forget(place)
                    return
                self.busy_since = self.clock()
                try:
                    await self._load(place)
                finally:
                    self.busy_since = None
        except Exception as error:  # noqa: BLE001  (whoever waits for the model gets it)
            failure = self._note(place.key, error)
            self._forget(place)
            raise failure from None
        finally:
            place.loading = None

    async def _load(self, place: _Place[K, T]) -> None:
        least = await self._in_thread(self.fetch, place.key)
        place.size_bytes = max(least, self.sizes.get(place.key, 0))
        self._check_fits(place)
        await self._make_room(place.size_bytes)
        place.model, place.size_bytes = await self._in_thread(self.load, place.key, least)
        self.resident.add(place)
        self.loads += 1
        self.sizes[place.key] = place.size_bytes
        self.failures.pop(place.key, None)
        try:
            self._check_fits(place)
        except CannotLoad:
            await self._clear(place)
            raise
        await self._make_room(0, place)  # it may have taken more than was expected

    def _check_fits(self, place: _Place[K, T]) -> None:
        if place.size_bytes > self.budget_bytes:
            told = f"{place.size_bytes / 1e6:.0f} MB, and the shelf has {self.budget_bytes / 1e6:.0f} MB in all"
            raise CannotLoad(f"the model takes {told}", "raise serving.shelf.bytes, or serve it with shared: false", "")

    def _note(self, key: K, error: Exception) -> CannotLoad:
        """Tried again after a pause that doubles from failure to failure."""
        before = self.failures.get(key)
        pause_s = _FIRST_PAUSE_S if before is None else min(2 * before.pause_s, _LONGEST_PAUSE_S)
        traceback = None if isinstance(error, CannotLoad) else error
        log.warning(
            "%s cannot be loaded (%s); tried again after %g s", self.name(key), error, pause_s, exc_info=traceback
        )
        if not isinstance(error, CannotLoad):
            reason = f"{type(error).__name__}: {error}"
            error = CannotLoad("the model cannot be loaded", "the log of the shelf's replicas says why", reason)
        self.failed += 1
        self.failures[key] = _Failure(error, self.clock() + pause_s, pause_s)
        return error

    def _forget(self, place: _Place[K, T]) -> None:
        if self.places.get(place.key) is place:
            del self.places[place.key]
        self._tell()

    # -------------------------------------------------------------------------------------------------------- unloading

    async def _make_room(self, needed_bytes: int, kept: _Place[K, T] | None = None) -> None:
        """Unload, the least recently used first, and those that nobody uses before all, until so much is free."""
        while self.used_bytes + needed_bytes > self.budget_bytes:
            loaded = [place for place in self.places.values() if place in self.resident and place is not kept]
            # those that were dropped leave by themselves, once their users have finished
            leaving = [place for place in self.resident if place.leaving is not None]
            if not loaded and not leaving:
                return
            if loaded:
                victim = next((place for place in loaded if not place.users), loaded[0])
                del self.places[victim.key]
                self._tell()
            else:
                victim = leaving[0]
            await self._unload(victim)

    async def _unload(self, place: _Place[K, T]) -> None:
        """``place`` is not among ``places`` any more, so that nobody comes to it."""
        if place.leaving is None:
            place.leaving = asyncio.create_task(self._leave(place))
        await asyncio.shield(place.leaving)

    async def _leave(self, place: _Place[K, T]) -> None:
        if place.users:
            await place.idle.wait()
        if place in self.resident:
            await self._clear(place)

    async def _clear(self, place: _Place[K, T]) -> None:
        place.model = None
        await self._in_thread(self.tidy)
        self.resident.discard(place)
        self.unloads += 1

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *arguments)

    def _tell(self) -> None:
        self.changed(self.known())


def _retrieved(task: asyncio.Task[None]) -> None:
    """An error that nobody waits for any more is no news: it was logged."""
    if not task.cancelled():
        task.exception()
