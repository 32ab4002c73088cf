"""Which models are loaded when, within a budget: with models that are names, and loads that a test holds up."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import IntegrityError
from orchestrator.serving.shelf import CannotLoad, Shelf


class Store:
    """Models of given sizes. ``gate``: loads wait for it."""

    def __init__(self, sizes: dict[str, int], files: dict[str, int] | None = None) -> None:
        self.sizes, self.files = sizes, files or sizes
        self.broken: set[str] = set()
        self.loads, self.live, self.now = Counter[str](), set[str](), 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.told: list[list[str]] = []

    def shelf(self, budget: int) -> Shelf[str, str]:
        return Shelf(budget, self.fetch, self.load, lambda: None, self.told.append, clock=lambda: self.now)

    def fetch(self, key: str) -> int:
        return self.files[key]

    def load(self, key: str, least: int) -> tuple[str, int]:
        assert self.gate.wait(10)
        self.loads[key] += 1
        if key in self.broken:
            raise IntegrityError(f"{key} is damaged", "restore it")
        return key.upper(), self.sizes[key]


async def use(shelf: Shelf[str, str], key: str) -> str:
    async with shelf.using(key) as model:
        return model


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def run(work: Awaitable[None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await work

    asyncio.run(limited())


def test_the_least_recently_used_model_makes_room() -> None:
    async def work() -> None:
        store = Store(dict.fromkeys("abcd", 10))
        shelf = store.shelf(30)
        for key in "abcabad":
            assert await use(shelf, key) == key.upper()
        assert shelf.stats().loaded == ("b", "a", "d"), "c was asked longest ago"
        assert store.loads == Counter("abcd")
        assert (shelf.used_bytes, shelf.unloads) == (30, 1)

    run(work())


def test_a_model_is_loaded_once_however_many_wait_for_it() -> None:
    async def work() -> None:
        store = Store({"a": 10})
        shelf = store.shelf(10)
        store.gate.clear()
        waiting = [asyncio.create_task(use(shelf, "a")) for _ in range(20)]
        await until(lambda: shelf.busy_since is not None)
        store.gate.set()
        assert await asyncio.gather(*waiting) == ["A"] * 20
        assert store.loads["a"] == 1

    run(work())


def test_a_model_in_use_is_not_unloaded_until_its_user_has_finished() -> None:
    async def work() -> None:
        store = Store(dict.fromkeys("ab", 10))
        shelf = store.shelf(10)
        async with shelf.using("a"):
            other = asyncio.create_task(use(shelf, "b"))
            await until(lambda: "a" not in shelf.places)
            again = asyncio.create_task(use(shelf, "a"))
            await asyncio.sleep(0.01)
            assert not other.done() and not again.done()
            assert store.loads == Counter("a"), "nothing else is loaded beside it"
        assert (await other, await again) == ("B", "A")

    run(work())


def test_what_nobody_uses_goes_before_what_is_in_use() -> None:
    async def work() -> None:
        shelf = Store(dict.fromkeys("abc", 10)).shelf(20)
        async with shelf.using("a"):
            await use(shelf, "b")
            assert await use(shelf, "c") == "C"
            assert shelf.stats().loaded == ("a", "c")

    run(work())


@pytest.mark.parametrize("budget", [10, 20])
def test_models_that_are_asked_all_the_time_let_each_other_answer(budget: int) -> None:
    async def work() -> None:
        store = Store(dict.fromkeys("abcd", 10))
        shelf, answers = store.shelf(budget), Counter[str]()

        async def client(key: str) -> None:
            while min(answers[k] for k in "abcd") < 5:
                async with shelf.using(key):
                    await asyncio.sleep(0.001)
                answers[key] += 1

        await asyncio.gather(*(client(key) for key in "abcd" for _ in range(3)))

    run(work())


@pytest.mark.parametrize("known_before", [True, False], ids=["by its files", "by what it grew to"])
def test_a_model_larger_than_the_budget_is_refused_and_the_others_stay(known_before: bool) -> None:
    async def work() -> None:
        store = Store({"a": 10, "large": 31}, files={"a": 10, "large": 31 if known_before else 5})
        shelf = store.shelf(30)
        await use(shelf, "a")
        for _ in range(2):
            store.now += 1000.0
            with pytest.raises(CannotLoad, match="raise serving.shelf.bytes"):
                await use(shelf, "large")
        assert shelf.stats().loaded == ("a",)
        assert store.loads["large"] == (0 if known_before else 1), "what it grew to is remembered"
        await shelf.resize(41)
        assert await use(shelf, "large") == "LARGE"

    run(work())


def test_a_model_that_grew_more_than_expected_makes_room_afterwards() -> None:
    async def work() -> None:
        shelf = Store({"a": 10, "b": 10, "c": 25}, files={"a": 10, "b": 10, "c": 5}).shelf(30)
        for key in "abc":
            await use(shelf, key)
        assert (shelf.stats().loaded, shelf.used_bytes) == (("c",), 25)

    run(work())


def test_a_failed_load_is_told_to_all_who_wait_and_tried_again_after_a_pause_that_grows() -> None:
    async def work() -> None:
        store = Store(dict.fromkeys("ab", 10))
        store.broken.add("a")
        shelf = store.shelf(20)
        store.gate.clear()
        waiting = [asyncio.create_task(use(shelf, "a")) for _ in range(5)]
        await until(lambda: shelf.busy_since is not None)
        store.gate.set()
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert {getattr(error, "reason", None) for error in errors} == {"IntegrityError: a is damaged: restore it"}
        assert await use(shelf, "b") == "B", "others are none the worse"
        for later, loads in ((0.5, 1), (0.6, 2), (1.9, 2), (0.2, 3)):
            store.now += later
            with pytest.raises(CannotLoad):
                await use(shelf, "a")
            assert store.loads["a"] == loads
        assert shelf.known() == ["b", "a"], "asked elsewhere, it would fail once more"
        store.broken.clear()
        store.now += 100.0
        assert await use(shelf, "a") == "A"
        assert not shelf.failures

    run(work())


def test_a_model_that_nobody_waits_for_any_more_is_not_loaded() -> None:
    async def work() -> None:
        store = Store(dict.fromkeys("ab", 10))
        shelf = store.shelf(20)
        store.gate.clear()
        first, gone = asyncio.create_task(use(shelf, "a")), asyncio.create_task(use(shelf, "b"))
        await until(lambda: shelf.busy_since is not None)
        gone.cancel()
        await asyncio.wait([gone])
        store.gate.set()
        await first
        await until(lambda: not shelf.turn.locked())
        assert store.loads == Counter("a")
        assert await use(shelf, "b") == "B"

    run(work())


def test_a_client_that_leaves_does_not_end_the_load_for_the_others() -> None:
    async def work() -> None:
        store = Store({"a": 10})
        shelf = store.shelf(10)
        store.gate.clear()
        gone, stays = asyncio.create_task(use(shelf, "a")), asyncio.create_task(use(shelf, "a"))
        await until(lambda: shelf.busy_since is not None)
        gone.cancel()
        store.gate.set()
        assert await stays == "A"

    run(work())


def test_a_dropped_model_answers_those_who_use_it_and_goes() -> None:
    async def work() -> None:
        store = Store(dict.fromkeys("ab", 10))
        shelf = store.shelf(10)
        async with shelf.using("a") as model:
            dropping = asyncio.create_task(shelf.drop("a"))
            other = asyncio.create_task(use(shelf, "b"))
            await asyncio.sleep(0.01)
            assert model == "A" and not dropping.done() and not other.done()
        await dropping
        assert await other == "B"
        assert shelf.stats().loaded == ("b",)
        await shelf.drop("never there")

    run(work())


def test_a_smaller_budget_unloads_what_no_longer_fits() -> None:
    async def work() -> None:
        shelf = Store(dict.fromkeys("abc", 10)).shelf(30)
        for key in "abc":
            await use(shelf, key)
        await shelf.resize(15)
        assert shelf.stats().loaded == ("c",)

    run(work())


def test_where_a_model_is_asked_best_is_told_before_it_is_loaded() -> None:
    async def work() -> None:
        store = Store(dict.fromkeys("ab", 10))
        shelf = store.shelf(10)
        store.gate.clear()
        first = asyncio.create_task(use(shelf, "a"))
        await until(lambda: bool(store.told))
        assert store.told == [["a"]]
        store.gate.set()
        await first
        await use(shelf, "b")
        assert store.told[-1] == ["b"]

    run(work())


@settings(max_examples=60)
@given(
    models=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 20), st.booleans()), min_size=2, max_size=6),
    budget=st.integers(20, 60),
    seed=st.integers(0, 10_000),
)
def test_whatever_is_asked_in_whatever_order_the_budget_holds_and_everybody_is_answered(
    models: list[tuple[int, int, bool]], budget: int, seed: int
) -> None:
    """``models``: bytes of the files, bytes by which each is larger when it is loaded, whether it is damaged."""
    keys = [str(number) for number in range(len(models))]
    sizes = {key: files + more for key, (files, more, _) in zip(keys, models, strict=True)}
    store = Store(sizes, {key: files for key, (files, _, _) in zip(keys, models, strict=True)})
    store.broken = {key for key, (_, _, damaged) in zip(keys, models, strict=True) if damaged}
    largest_surprise, generator = max(more for _, more, _ in models), random.Random(seed)

    async def client(shelf: Shelf[str, str]) -> None:
        for _ in range(10):
            key = generator.choice(keys)
            try:
                async with shelf.using(key) as model:
                    for _ in range(generator.randrange(4)):
                        await asyncio.sleep(0)
                    assert model == key.upper()
                    assert key in {place.key for place in shelf.resident}, "what is in use stays"
                    assert shelf.used_bytes <= budget + largest_surprise
            except CannotLoad:
                assert key in store.broken or sizes[key] > budget
            if generator.random() < 0.1:
                await shelf.drop(generator.choice(keys))
            store.now += generator.random()

    async def work() -> None:
        shelf = store.shelf(budget)
        clients = [asyncio.create_task(client(shelf)) for _ in range(6)]
        await asyncio.sleep(0)
        clients[0].cancel()
        results = await asyncio.gather(*clients, return_exceptions=True)
        assert [r for r in results[1:] if r is not None] == []
        await until(lambda: not shelf.turn.locked() and all(place.leaving is None for place in shelf.resident))
        assert shelf.used_bytes <= budget
        assert shelf.loads - shelf.unloads == len(shelf.resident) == len(shelf.stats().loaded)

    run(work())
