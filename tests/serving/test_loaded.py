"""Models of real networks on a shelf: what each takes of the machine's memory, and that it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from served_models import LABELS, png, publish_image_model, publish_text_model

from orchestrator.data.images import ImageEncoder
from orchestrator.errors import IntegrityError
from orchestrator.recipe_serving import Serving
from orchestrator.serving.contract import ExplainRequest
from orchestrator.serving.explain import ExplanationRefused
from orchestrator.serving.loaded import LoadedModel, described
from orchestrator.serving.memory import give_back, measured, resident_bytes
from orchestrator.serving.served import Served
from orchestrator.serving.shelf import Shelf
from orchestrator.storage import Storage, folder_bytes

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident")
_MB = 1e6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Served]:
    storage = Storage(str(tmp_path_factory.mktemp("models")))
    settings = Serving(precision="fp32", max_batch_size=4)
    return [Served(name, 1, storage.url, publish_image_model(storage, name, 1), settings) for name in ("a", "b", "c")]


@linux
def test_what_is_made_is_measured_and_what_is_let_go_of_is_given_back() -> None:
    made, size = measured(partial(np.ones, 10_000_000))
    assert size == pytest.approx(80 * _MB, rel=0.1)
    before = resident_bytes() or 0
    del made
    give_back()
    assert before - (resident_bytes() or 0) > 70 * _MB
    assert measured(lambda: None, at_least=5_000_000)[1] == pytest.approx(5 * _MB, rel=0.2), "at least its files"


@linux
@pytest.mark.parametrize("cycles", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_memory_stays_within_the_budget_over_many_loads(models: list[Served], cycles: int) -> None:
    """Three models of 45 MB where two have room, each answering before the next one comes."""
    compute, files = ThreadPoolExecutor(1), folder_bytes(Storage(models[0].storage).path(models[0].location))

    def load(served: Served, at_least: int) -> tuple[LoadedModel, int]:
        return measured(partial(LoadedModel, served, "cpu", compute), at_least)

    async def work() -> tuple[list[int], Shelf[Served, LoadedModel]]:
        shelf: Shelf[Served, LoadedModel] = Shelf(int(2.6 * files), lambda served: files, load, give_back)
        for served in models:  # after which libraries and buffers are there
            async with shelf.using(served) as model:
                await model.predict(None, [png(0)] * 4)
        rss = []
        for _ in range(cycles):
            for served in models:
                async with shelf.using(served) as model:
                    await model.predict(None, [png(0)] * 4)
                rss.append(resident_bytes() or 0)
                assert shelf.used_bytes <= shelf.budget_bytes
        return rss, shelf

    rss, shelf = asyncio.run(work())
    assert shelf.loads == 3 * (cycles + 1), "the least recently used is always the one that is asked next"
    assert max(rss) - min(rss) < files, "less than one model more: none of those that went stayed"
    assert max(rss[-3:]) - max(rss[:3]) < 20 * _MB, "no leak"


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_model_is_described_without_loading_it_as_it_describes_itself(
    kind: str, tmp_path: Path, tiny_backbone: Path
) -> None:
    storage = Storage(str(tmp_path))
    location = (
        publish_text_model(storage, "m", 3, tiny_backbone) if kind == "text" else publish_image_model(storage, "m", 3)
    )
    served = Served("m", 3, storage.url, location, Serving(precision="fp32", max_instances=7))
    assert described(served) == LoadedModel(served).describe()
    assert (described(served).labels, described(served).limits.max_instances) == (LABELS, 7)


def test_a_model_without_readable_labels_is_an_error_that_names_it(models: list[Served]) -> None:
    nowhere = Served("gone", 1, models[0].storage, "models/gone/1", Serving())
    with pytest.raises(IntegrityError, match=r"models/gone/1 cannot be read"):
        described(nowhere)


def test_who_hangs_up_does_not_make_room_for_another_explanation(
    models: list[Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        begun.set()
        go_on.wait(60.0)
        raise ExplanationRefused("it was only a test", "")

    monkeypatch.setattr("orchestrator.serving.explain.explain", slow)
    thread = ThreadPoolExecutor(1)
    model = LoadedModel(models[0], thread=thread)
    assert model.batcher.thread is thread

    async def ask() -> tuple[bool, bool, tuple[str, str] | None]:
        first = asyncio.create_task(model.explain(png(0), ExplainRequest(instance="")))
        await asyncio.to_thread(begun.wait, 60.0)
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        while_it_computes = await model.explain(png(1), ExplainRequest(instance=""))
        go_on.set()
        await asyncio.wrap_future(thread.submit(lambda: None))  # after it
        afterwards = await model.explain(png(1), ExplainRequest(instance=""))
        return while_it_computes.busy, afterwards.busy, afterwards.refused

    assert asyncio.run(ask()) == (True, False, ("it was only a test", ""))


def test_images_are_decoded_by_as_many_threads_as_compute(models: list[Served]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        encoder = LoadedModel(models[0]).predictor.model.encoder
    finally:
        torch.set_num_threads(before)
    assert isinstance(encoder, ImageEncoder) and encoder._threads._max_workers == 3
