"""The page in a headless Chromium, with a fake in place of the replicas: two versions at once, and keys."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Page, browser
from ports import free_port
from test_gateway import Fake

from orchestrator.recipe_serving import Listen
from orchestrator.serving.access import Keys, create_key
from orchestrator.serving.contract import Answers, Caller, Explained, ExplainRequest, Input, Limits, ModelInfo
from orchestrator.serving.door import Door
from orchestrator.serving.gateway import build_app
from orchestrator.storage import Storage

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
LIMITS = Limits(max_instances=3, max_body_bytes=2_000, request_timeout_s=60)


class TwoVersions(Fake):
    """Version 4, whose labels come in another order, answers; version 3 is the stable one."""

    answering = "4"

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        stable = self.infos["reviews"].model_copy(update={"limits": LIMITS})
        self.infos = {"reviews": stable}
        self.candidate = stable.model_copy(update={"model_version": "4", "labels": stable.labels[::-1]})
        self.rollouts["reviews"] = {"candidate_version": "4"}

    async def describe(self, name: str, version: str | None = None) -> ModelInfo | None:
        return self.candidate if version == "4" else self.infos.get(name)

    async def predict(self, name: str, version: str | None, inputs: Sequence[Input], caller: Caller) -> Answers:
        scores = {"bad": 0.75, "good": 0.25} if version == "3" else {"good": 0.9, "bad": 0.1}
        best = max(scores, key=lambda label: scores[label])
        return Answers(version=version or self.answering, outputs=[{"label": best, "scores": scores}], batch_size=1)

    async def explain(self, name: str, value: Input, asked: ExplainRequest) -> Explained:
        told = {"label": asked.label, "score": 0.25, "baseline_score": 0.5, "method": "occlusion", "heatmap": None,
                "parts": [{"text": "rich", "start": 0, "end": 4, "weight": 0.5}]}  # fmt: skip
        return Explained(version="3", explanation=told)


@contextmanager
def opened(fake: Fake) -> Iterator[str]:
    """Its address."""
    listen, loop = Listen(port=free_port()), asyncio.new_event_loop()
    door = Door(build_app(fake), listen)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(door.open(), loop).result(60)
        yield f"http://{listen.host}:{listen.port}"
        asyncio.run_coroutine_threadsafe(door.close(1.0), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)


@pytest.fixture
def fake(tmp_path: Path) -> TwoVersions:
    return TwoVersions(Storage(str(tmp_path / "storage")))


@pytest.fixture
def address(fake: TwoVersions) -> Iterator[str]:
    with opened(fake) as address:
        yield address


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path / "profile") as page:
        yield page


def rows(page: Page, name: str) -> Any:
    return page.evaluate(f"[...document.querySelectorAll('#{name} li')].map((row) => row.textContent)")


def test_each_version_has_its_own_labels(page: Page, address: str, fake: TwoVersions) -> None:
    for answering, other, first, second in (
        ("4", "3", ["good90.0 %", "bad10.0 %"], ["bad75.0 %", "good25.0 %"]),
        ("3", "4", ["bad75.0 %", "good25.0 %"], ["good90.0 %", "bad10.0 %"]),
    ):
        fake.answering = answering
        page.open(f"{address}/?text=rich")
        page.wait(page.is_shown("other"))
        assert f"version {other}" in page.text("other-facts")
        assert rows(page, "other-scores") == second
        assert page.text("other-label") == second[0][: -len("75.0 %")]
        if answering == "4":
            assert rows(page, "scores") == first


def test_it_says_which_version_explains(page: Page, address: str, fake: TwoVersions) -> None:
    page.open(f"{address}/?text=rich")
    page.wait(page.is_shown("result"))
    page.evaluate("document.getElementById('why').click()")
    page.wait(page.is_shown("reasons"))
    assert "(version 3, occlusion)" in page.text("reasons-hint")
    assert "The answer is version 4's, but only the stable version explains." in page.text("reasons-hint")
    fake.answering = "3"
    page.open(f"{address}/?text=rich&again")
    page.wait(page.is_shown("result"))
    page.evaluate("document.getElementById('why').click()")
    page.wait(page.is_shown("reasons"))
    assert "only the stable version" not in page.text("reasons-hint")


def test_the_metrics_are_fetched_with_the_key(page: Page, address: str, fake: TwoVersions) -> None:
    text = create_key(fake.storage, "shop", ("predict", "admin"))[1]
    fake.locks["reviews"] = keys = Keys(fake.storage)
    keys.refresh()
    page.open(f"{address}/")
    page.wait(page.is_shown("key-form"))
    page.evaluate("document.getElementById('metrics').click()")
    page.wait("document.getElementById('error-text').textContent.includes('take a key. Next: enter one')")
    page.evaluate(f"document.getElementById('key').value = {text!r}")
    page.evaluate("document.getElementById('key-form').requestSubmit()")
    page.wait("document.getElementById('model').value === 'reviews'")
    page.evaluate("document.getElementById('metrics').click()")
    page.wait("document.body.textContent.includes('orchestrator_requests')")
