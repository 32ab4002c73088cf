"""One real endpoint, asked by what others wrote (Triton's client, a browser) and by our own client: an open text model, and an
image model that asks for a key."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from browser import CHROMIUM, browser
from ports import free_port
from served_models import LABELS, png, publish_image_model, publish_text_model
from tritonclient.utils import InferenceServerException

from orchestrator.client import AsyncClient, Client, EndpointError
from orchestrator.recipe_serving import Serving
from orchestrator.serving.access import create_key
from orchestrator.serving.predictor import Predictor
from orchestrator.serving.served import Served
from orchestrator.storage import Storage, version_location

pytestmark = pytest.mark.ray
TEXTS = ["the coffee was great", "stale 🙂 and dull", ""]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Storage:
    storage = Storage(str(tmp_path_factory.mktemp("third_party")))
    publish_text_model(storage, "reviews", 1, tiny_backbone)
    publish_image_model(storage, "shapes", 1)
    return storage


@pytest.fixture(scope="module")
def endpoint(ray_session: object, storage: Storage) -> Iterator[str]:
    from orchestrator.serving.on_ray import deploy, shutdown

    port = free_port()
    for name, keys in (("reviews", False), ("shapes", True)):
        settings = Serving(port=port, max_replicas=1, cpus_per_replica=0.5, precision="fp32", keys=keys)
        url = deploy(Served(name, 1, storage.url, version_location(name, 1), settings))
    yield url
    shutdown()


@pytest.fixture(scope="module")
def key(endpoint: str, storage: Storage) -> str:
    """Of a client that may ask, once the endpoint knows it."""
    text = create_key(storage, "shop", ("predict",))[1]
    with Client(endpoint, text) as client:
        end = time.monotonic() + 60
        while "shapes" not in [model.name for model in client.models()]:
            assert time.monotonic() < end, "the endpoint does not come to know the key"
            time.sleep(0.2)
    return text


def expected(storage: Storage, name: str, inputs: list[Any]) -> list[list[float]]:
    predictions = Predictor.from_folder(storage.path(version_location(name, 1))).predict(inputs)
    return [prediction.probabilities or [] for prediction in predictions]


# ------------------------------------------------------------------------------------------------------ Triton's client


@pytest.fixture(scope="module")
def server(endpoint: str) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(endpoint.removeprefix("http://"))
    yield client
    client.close()


def tensor(name: str, values: list[Any], is_binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(np.array(values, dtype=object), binary_data=is_binary)
    return tensor


def test_triton_sees_a_server_and_its_models(server: triton.InferenceServerClient) -> None:
    assert server.is_server_live() and server.is_server_ready()
    assert server.is_model_ready("reviews") and server.is_model_ready("reviews", "1")
    assert not server.is_model_ready("reviews", "9") and not server.is_model_ready("none")
    assert server.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = server.get_model_metadata("reviews", "1")
    assert (metadata["versions"], metadata["inputs"][0]["datatype"]) == (["1"], "BYTES")


@pytest.mark.parametrize("is_binary", [True, False], ids=["binary", "json"])
def test_triton_infers(server: triton.InferenceServerClient, storage: Storage, is_binary: bool) -> None:
    wanted = [triton.InferRequestedOutput(name, binary_data=is_binary) for name in ("label", "probabilities")]
    answer = server.infer("reviews", [tensor("text", TEXTS, is_binary)], "1", outputs=wanted, request_id="mine-7")
    rows = expected(storage, "reviews", TEXTS)
    assert answer.as_numpy("probabilities") == pytest.approx(np.array(rows), abs=1e-6)
    labels = [LABELS[int(np.argmax(row))] for row in rows]
    assert [v.decode() if isinstance(v, bytes) else v for v in answer.as_numpy("label")] == labels
    told = answer.get_response()
    assert (told["id"], told["model_version"]) == ("mine-7", "1")
    one = server.infer("reviews", [tensor("text", TEXTS, is_binary)], outputs=wanted[:1])
    assert one.as_numpy("probabilities") is None and one.as_numpy("label") is not None


def test_triton_sends_image_files_as_they_are(server: triton.InferenceServerClient, storage: Storage, key: str) -> None:
    images = [png(seed) for seed in range(3)]
    header = {"authorization": f"Bearer {key}"}
    answer = server.infer("shapes", [tensor("image", images)], headers=header)  # its default: both ways in binary form
    assert answer.as_numpy("probabilities") == pytest.approx(np.array(expected(storage, "shapes", images)), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "inputs", "options", "status", "message"),
    [
        ("none", [("text", ["a"])], {}, "404", "there is no model 'none' here"),
        ("reviews", [("texts", ["a"])], {}, "422", "must be 'text', but is 'texts'"),
        ("reviews", [("text", ["a"]), ("text", ["a"])], {}, "422", "must hold the one tensor 'text', but holds 2"),
        ("reviews", [("text", [b"\xff"])], {}, "422", "is not UTF-8"),
        (
            "reviews",
            [("text", ["a"])],
            {"request_compression_algorithm": "gzip"},
            "415",
            "compressed bodies are not taken",
        ),
        ("shapes", [("image", [b"x"])], {}, "401", "a key is needed here"),
    ],
)
def test_triton_says_what_was_wrong(
    server: triton.InferenceServerClient, name: str, inputs: Any, options: Any, status: str, message: str
) -> None:
    with pytest.raises(InferenceServerException) as refused:
        server.infer(name, [tensor(*given) for given in inputs], **options)
    assert refused.value.status() == status
    assert message in str(refused.value)


# ----------------------------------------------------------------------------------------------------------- our client


def test_the_client(endpoint: str, storage: Storage) -> None:
    with Client(endpoint) as client:
        assert [(model.name, model.input_kind) for model in client.models()] == [("reviews", "text")]
        assert client.model("reviews").labels == LABELS
        answer = client.predict("reviews", TEXTS)
        assert [list(p.scores.values()) for p in answer.predictions] == [
            pytest.approx(row, abs=1e-6) for row in expected(storage, "reviews", TEXTS)
        ]
        found = client.explain("reviews", TEXTS[0], "good")
        assert (found.label, [part.text for part in found.parts or ()]) == ("good", TEXTS[0].split())
        client.feedback("reviews", answer.request_id, "so-so", 1)
        assert feedback(storage)[-1].items() >= {"request_id": answer.request_id, "label": "so-so", "index": 1}.items()
        with pytest.raises(EndpointError, match="label must be one of") as refused:
            client.feedback("reviews", answer.request_id, "nice")
        assert refused.value.status == 422


def test_the_client_with_asyncio_and_keys(endpoint: str, storage: Storage, key: str) -> None:
    async def ask() -> None:
        images = [png(seed) for seed in range(8)]
        async with AsyncClient(endpoint, key) as client, AsyncClient(endpoint, "orc_wrong_key") as stranger:
            assert [model.name for model in await client.models()] == ["reviews", "shapes"]
            answers = await asyncio.gather(*(client.predict("shapes", [image]) for image in images))
            got = [list(answer.predictions[0].scores.values()) for answer in answers]
            assert got == [pytest.approx(row, abs=1e-5) for row in expected(storage, "shapes", list(images))]
            found = await client.explain("shapes", images[0])
            assert found.parts is None and found.heatmap
            with pytest.raises(EndpointError) as forbidden:
                await client.feedback("shapes", answers[0].request_id, "good")
            with pytest.raises(EndpointError) as unknown:
                await stranger.predict("shapes", [images[0]])
            assert (forbidden.value.status, unknown.value.status, unknown.value.code) == (403, 401, "wrong_key")

    asyncio.run(ask())


def feedback(storage: Storage) -> list[dict[str, Any]]:
    lines = storage.path("serve/feedback/reviews.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------------------------------- the page


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_the_page_with_the_keyboard_alone(endpoint: str, storage: Storage, tmp_path: Path) -> None:
    with browser(tmp_path) as page:
        page.open(f"{endpoint}/")
        page.wait("document.getElementById('model').value === 'reviews'")
        assert page.focused() == "text", "one can type at once"
        page.type(TEXTS[0])
        page.press("Tab")
        assert page.focused() == "go"
        page.press("Enter")
        page.wait(page.is_shown("label"))
        (row,) = expected(storage, "reviews", [TEXTS[0]])
        best = LABELS[int(np.argmax(row))]
        shown = page.evaluate("[...document.querySelectorAll('#scores li')].map((row) => row.textContent)")
        assert page.text("label") == best
        assert set(shown) == {f"{label}{100 * score:.1f} %" for label, score in zip(LABELS, row, strict=True)}

        page.press("Tab")
        assert page.focused() == "why"
        page.press("Enter")
        page.wait(page.is_shown("reasons"))
        words = page.evaluate("[...document.querySelectorAll('#words mark')].map((word) => word.textContent)")
        assert words == TEXTS[0].split()

        page.press("Tab")
        assert page.focused() == "right"
        page.type("so")  # the list jumps to what is typed
        page.press("Tab")
        page.press("Enter")
        page.wait("document.getElementById('told').textContent === 'Thank you, it is noted.'")
        request_id = page.evaluate("last.answer.request_id")
        assert feedback(storage)[-1].items() >= {"request_id": request_id, "label": "so-so", "index": 0}.items()

        page.open(f"{endpoint}/docs")
        page.wait("document.querySelectorAll('#routes details').length > 10")
        page.wait("document.getElementById('examples').textContent.includes('reviews:predict')")
    assert page.complaints == []
    assert [url for url in page.asked if not url.startswith((f"{endpoint}/", "data:,"))] == []
    assert f"{endpoint}/v1/models/reviews:explain" in page.asked
