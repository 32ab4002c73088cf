"""Answers in memory: whose they are, and how much of it they take."""

from __future__ import annotations

import asyncio
from collections import ChainMap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.recipe_serving import Recording, Serving
from orchestrator.serving.cache import AnswerCache
from orchestrator.serving.contract import Answers, Caller, Input, Limits, ModelInfo
from orchestrator.serving.envelope import Metrics
from orchestrator.serving.gateway_on_ray import RayModels, _Known
from orchestrator.serving.recorded import read_predictions
from orchestrator.serving.served import Served
from orchestrator.storage import Storage

LIMITS = Limits(max_instances=9, max_body_bytes=10_000, request_timeout_s=5.0)
YOU = Caller("you", "r-1")


def answer(word: str) -> dict[str, Any]:
    return {"label": word, "scores": {word: 0.75, "other": 0.25}}


def test_what_was_kept_is_known_and_nothing_else() -> None:
    cache = AnswerCache(10_000)
    cache.keep("größe", answer("good"))
    cache.keep(b"gr", answer("bad"))
    assert cache.known(["gr", "größe", b"gr", "größe "]) == {1: answer("good"), 2: answer("bad")}


def test_the_least_recently_used_goes_first() -> None:
    cache = AnswerCache(1_000)
    for word in ("one", "two", "three"):
        cache.keep(word, answer(word))
    assert len(cache) == 3
    cache.known(["one"])
    cache.keep("four", answer("four"))
    assert set(cache.known(["one", "two", "three", "four"])) == {0, 2, 3}


@given(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=300)), max_size=60), st.integers(0, 3_000))
def test_memory_stays_within_its_bound(kept: list[tuple[str, str]], max_bytes: int) -> None:
    cache = AnswerCache(max_bytes)
    for value, label in kept:
        cache.keep(value, answer(label))
        assert 0 <= cache.held_bytes <= max_bytes
        assert cache.known([value]) in ({}, {0: answer(label)}), "what was said last"
    while len(cache):
        cache._forget(next(iter(cache._answers)))
    assert cache.held_bytes == 0


class Replica:
    """Answers a text with its first word; knows how often it was asked."""

    def __init__(self, version: str = "3") -> None:
        self.version, self.asked = version, list[list[Input]]()
        self.predict = SimpleNamespace(remote=self._predict)

    async def _predict(self, version: str | None, inputs: Sequence[Input]) -> Answers:
        self.asked.append(list(inputs))
        broken = {index: "is no image" for index, value in enumerate(inputs) if value == "broken"}
        outputs = [{} if index in broken else answer(str(value).split()[0]) for index, value in enumerate(inputs)]
        return Answers(version=self.version, outputs=outputs, unreadable=broken, batch_size=len(inputs))


def models(replica: Replica, cache_bytes: int = 100_000) -> RayModels:
    served = Served("reviews", 3, "/nowhere", "m", Serving(cache_bytes=cache_bytes))
    info = ModelInfo(model_name="reviews", model_version="3", task="text_classification", input_kind="text",
                     labels=("bad", "good"), limits=LIMITS)  # fmt: skip
    known = _Known(replica, served, info, AnswerCache(cache_bytes))
    return RayModels(Metrics(), known=ChainMap({}, {"model-reviews": known}))


def asked(there: RayModels, *inputs: str) -> Answers:
    return asyncio.run(there.predict("reviews", None, inputs, YOU))


def test_only_what_is_new_is_computed_and_all_come_in_order() -> None:
    replica = Replica()
    there = models(replica)
    asked(there, "b text", "c text")
    answers = asked(there, "a text", "b text", "d text", "c text")
    assert [output["label"] for output in answers.outputs] == ["a", "b", "d", "c"]
    assert replica.asked == [["b text", "c text"], ["a text", "d text"]]
    assert (answers.cached, answers.batch_size) == (2, 2)
    again = asked(there, "c text", "a text")
    assert [output["label"] for output in again.outputs] == ["c", "a"] and len(replica.asked) == 2
    assert (again.cached, again.batch_size, again.version) == (2, 0, "3")


def test_what_cannot_be_read_keeps_its_place_and_is_not_kept() -> None:
    replica = Replica()
    there = models(replica)
    asked(there, "a text")
    for _ in range(2):
        answers = asked(there, "a text", "broken", "b text")
        assert answers.unreadable == {1: "is no image"}
        assert [output.get("label") for output in answers.outputs] == ["a", None, "b"]
    assert replica.asked == [["a text"], ["broken", "b text"], ["broken"]]


def test_a_version_that_has_just_come_answers_the_whole_request() -> None:
    replica = Replica()
    there = models(replica)
    asked(there, "a text")
    replica.version = "4"
    answers = asked(there, "a text", "b text")
    assert (answers.version, len(answers.outputs), answers.cached) == ("4", 2, 0)
    assert replica.asked[-1] == ["a text", "b text"]
    assert asked(there, "a text").version == "3", (
        "until the gateway has seen it; nothing of the new one is kept for the old"
    )


def test_nothing_is_kept_unless_it_is_asked_for() -> None:
    replica = Replica()
    there = models(replica, cache_bytes=0)
    asked(there, "a text")
    assert asked(there, "a text").cached == 0 and len(replica.asked) == 2


def test_what_a_deployment_asks_is_not_recorded(tmp_path: Path) -> None:
    there = models(Replica())
    known = there.known["model-reviews"]
    known.served = replace(known.served, storage=str(tmp_path), settings=Serving(recording=Recording()))
    there.own_requests.append("known-answers-1")
    for request_id in ("known-answers-1", "known-answers", "r-1"):
        asyncio.run(there.predict("reviews", None, ["a text"], Caller("you", request_id)))
    there.recorders.write_all()
    assert read_predictions(Storage(str(tmp_path)), "reviews")["request_id"].to_pylist() == ["known-answers", "r-1"]
