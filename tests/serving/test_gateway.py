"""The HTTP face, with a fake in place of the replicas."""

from __future__ import annotations

import asyncio
import base64
import html.parser
import json
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.serving.contract import Answers, Input, Limits, ModelInfo
from orchestrator.serving.feedback import append_feedback
from orchestrator.serving.gateway import build_app, overloaded
from orchestrator.storage import Storage

LIMITS = Limits(max_instances=3, max_body_bytes=2_000, request_timeout_s=0.3)
LABELS = ("bad", "good")


class Fake:
    """Answers "good" with certainty to every text, but does what some texts say."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.seen: list[Input] = []
        kinds = (("reviews", "text_classification", "text"), ("digits", "image_classification", "image"))
        self.infos = {
            name: ModelInfo(
                model_name=name, model_version="3", task=task, input_kind=kind, labels=LABELS, limits=LIMITS
            )
            for name, task, kind in kinds
        }

    async def names(self) -> list[str]:
        return sorted(self.infos)

    async def describe(self, name: str) -> ModelInfo | None:
        return self.infos.get(name)

    async def predict(self, name: str, version: str | None, inputs: Sequence[Input]) -> Answers:
        self.seen += inputs
        if "fail" in inputs:
            raise RuntimeError("a secret path: /srv/models")
        if "overload" in inputs:
            raise overloaded("busy")
        if "hang" in inputs:
            await asyncio.sleep(30)
        broken = {index: "is no image" for index, value in enumerate(inputs) if value == b"broken"}
        outputs = [{"label": "good", "scores": {"bad": 0.0, "good": 1.0}} for _ in inputs]
        return Answers(version="3", outputs=outputs, unreadable=broken, batch_size=len(inputs))

    async def feedback(self, name: str, entry: dict[str, Any]) -> None:
        append_feedback(self.storage, name, entry)


class Client:
    """Synchronous calls to one app; each with its own event loop."""

    def __init__(self, fake: Fake, **options: Any) -> None:
        self.app = build_app(fake, **options)

    def __call__(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(send())

    def predict(self, instances: Any, name: str = "reviews", **kwargs: Any) -> httpx.Response:
        return self("POST", f"/v1/models/{name}:predict", json={"instances": instances}, **kwargs)


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(Storage(str(tmp_path)))


@pytest.fixture
def client(fake: Fake) -> Client:
    return Client(fake)


def error_of(response: httpx.Response) -> dict[str, str]:
    assert set(response.json()) == {"error"}
    error: dict[str, str] = response.json()["error"]
    assert set(error) == {"code", "message", "next_step"}
    return error


def test_predict_answers_label_scores_version_and_id(client: Client) -> None:
    response = client.predict(["a", "b"], headers={"x-request-id": "mine-1"})
    assert response.status_code == 200
    assert response.json() == {
        "predictions": [{"label": "good", "scores": {"bad": 0.0, "good": 1.0}}] * 2,
        "model_name": "reviews",
        "model_version": "3",
        "request_id": "mine-1",
    }
    assert response.headers["x-request-id"] == "mine-1"


def test_images_reach_the_model_as_bytes(client: Client, fake: Fake) -> None:
    assert client.predict([{"b64": base64.b64encode(b"pixels").decode()}], "digits").status_code == 200
    assert fake.seen == [b"pixels"]


def test_an_unreadable_image_is_422_with_its_index(client: Client) -> None:
    response = client.predict([{"b64": base64.b64encode(b).decode()} for b in (b"fine", b"broken")], "digits")
    assert (response.status_code, error_of(response)["message"]) == (422, "instances[1] is no image")


@pytest.mark.parametrize("version", ["", "/versions/3"])
def test_the_open_inference_protocol(client: Client, version: str) -> None:
    path = f"/v2/models/reviews{version}"
    metadata = client("GET", path).json()
    assert (metadata["name"], metadata["versions"]) == ("reviews", ["3"])
    assert client("GET", f"{path}/ready").json() == {"name": "reviews", "ready": True}
    tensor = {"name": metadata["inputs"][0]["name"], "shape": [2], "datatype": "BYTES", "data": ["a", "b"]}
    answer = client("POST", f"{path}/infer", json={"id": "7", "inputs": [tensor]}).json()
    assert answer["id"] == "7"
    assert {o["name"]: (o["datatype"], o["shape"], o["data"]) for o in answer["outputs"]} == {
        "label": ("BYTES", [2], ["good", "good"]),
        "probabilities": ("FP32", [2, 2], [0.0, 1.0, 0.0, 1.0]),
    }


def test_health(client: Client, fake: Fake) -> None:
    assert client("GET", "/v2/health/live").status_code == client("GET", "/v2/health/ready").status_code == 200
    assert client("GET", "/v2").json()["name"] == "ray-orchestrator"
    fake.infos.clear()
    response = client("GET", "/v2/health/ready")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert client("GET", "/v2/health/live").status_code == 200


def test_models_say_what_they_take(client: Client) -> None:
    digits, _ = client("GET", "/v1/models").json()["models"]
    assert client("GET", "/v1/models/digits").json() == digits
    assert (digits["input_kind"], digits["labels"], digits["limits"]["max_instances"]) == ("image", ["bad", "good"], 3)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("POST", "/v1/models/none:predict", 404, "model_not_found"),
        ("POST", "/v2/models/none/infer", 404, "model_not_found"),
        ("GET", "/v2/models/reviews/versions/2", 404, "version_not_found"),
        ("POST", "/v2/models/reviews/versions/2/infer", 404, "version_not_found"),
        ("GET", "/v1/models/..%2f..%2fetc", 404, "not_found"),
        ("DELETE", "/v1/models/reviews", 405, "method_not_allowed"),
        ("GET", "/v1/models/reviews:predict", 405, "method_not_allowed"),
        ("PUT", "/v2/models/reviews/infer", 405, "method_not_allowed"),
    ],
)
def test_what_is_not_there_is_said_in_json(client: Client, method: str, path: str, status: int, code: str) -> None:
    response = client(method, path)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert response.headers["x-request-id"]


def test_a_missing_model_names_those_there_are(client: Client) -> None:
    assert error_of(client.predict(["a"], "review"))["next_step"] == "models here: digits, reviews"


def test_bad_json_is_400_and_a_bad_shape_422(client: Client) -> None:
    response = client("POST", "/v1/models/reviews:predict", content=b'{"instances": [')
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_json")
    response = client.predict([1])
    assert (response.status_code, error_of(response)["code"]) == (422, "invalid_request")


def test_a_large_body_is_413_before_it_is_read(client: Client) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 500
            yield b" " * 500

    response = client("POST", "/v1/models/reviews:predict", content=endless())
    assert (response.status_code, error_of(response)["code"]) == (413, "too_large")
    assert sent <= 3_000
    told = client("POST", "/v1/models/reviews:predict", content=b" ", headers={"content-length": "999999"})
    assert told.status_code == 413


def test_compressed_bodies_are_415(client: Client) -> None:
    response = client("POST", "/v1/models/reviews:predict", content=b"x", headers={"content-encoding": "gzip"})
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_encoding")


def test_many_large_bodies_at_once_are_503(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.serving.gateway._MAX_BYTES_IN_FLIGHT", 100)
    client = Client(fake)
    assert client.predict(["x" * 200]).status_code == 503
    assert client.predict(["x"]).status_code == 200, "what was refused no longer counts"


@pytest.mark.parametrize(("text", "code"), [("hang", "timeout"), ("overload", "overloaded")])
def test_a_model_that_cannot_answer_is_503_with_retry_after(client: Client, text: str, code: str) -> None:
    response = client.predict([text])
    assert (response.status_code, error_of(response)["code"]) == (503, code)
    assert response.headers["retry-after"] == "1"


def test_a_client_cannot_lift_the_time_limit(client: Client) -> None:
    assert client.predict(["hang"], headers={"x-request-timeout-seconds": "0"}).status_code == 503


def test_our_own_fault_is_500_without_a_word_about_our_inside(client: Client) -> None:
    response = client.predict(["fail"])
    assert (response.status_code, error_of(response)["code"]) == (500, "internal")
    assert "secret" not in response.text and "Traceback" not in response.text
    assert response.headers["x-request-id"] in response.text


@pytest.mark.parametrize("told", ["", "with space", "x" * 129, "naïve", "a;b", "<script>"])
def test_a_request_id_that_is_no_plain_token_is_replaced(client: Client, told: str) -> None:
    answered = client("GET", "/v2/health/live", headers={"x-request-id": told.encode()}).headers["x-request-id"]
    assert answered != told
    assert re.fullmatch("[0-9a-f]{32}", answered)


def test_a_page_of_another_site_cannot_post(client: Client) -> None:
    response = client.predict(["a"], headers={"sec-fetch-site": "cross-site"})
    assert (response.status_code, error_of(response)["code"]) == (403, "cross_site")
    assert client.predict(["a"], headers={"sec-fetch-site": "same-origin"}).status_code == 200


def test_feedback_is_kept_as_json_lines(client: Client, fake: Fake) -> None:
    for label in ("bad", "good"):
        body = {"request_id": "r-1", "label": label}
        assert client("POST", "/v1/models/reviews:feedback", json=body).json() == {"stored": True, "request_id": "r-1"}
    lines = fake.storage.path("serve/feedback/reviews.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [(e["request_id"], e["label"], e["index"], e["model_version"]) for e in entries] == [
        ("r-1", "bad", 0, "3"),
        ("r-1", "good", 0, "3"),
    ]
    assert client("POST", "/v1/models/reviews:feedback", json=body | {"label": "none"}).status_code == 422


def test_metrics_count_requests_instances_and_batches(client: Client) -> None:
    client.predict(["a", "b"])
    client.predict(["a"])
    client.predict([1])
    client.predict(["a"], "no-such-model")
    text = client("GET", "/metrics").text
    assert 'orchestrator_requests_total{model="reviews",route="predict",status="200"} 2.0' in text
    assert 'orchestrator_requests_total{model="reviews",route="predict",status="422"} 1.0' in text
    assert 'orchestrator_instances_total{model="reviews",version="3"} 3.0' in text
    assert 'orchestrator_batch_size_sum{model="reviews"} 3.0' in text
    assert 'orchestrator_request_seconds_count{model="reviews",route="predict"} 3.0' in text
    assert "no-such-model" not in text, "a stranger's names must not grow the metrics"


def test_openapi_names_every_route_of_the_contract(client: Client) -> None:
    api = client("GET", "/openapi.json").json()
    assert {
        "/v1/models/{name}",
        "/v1/models/{name}:predict",
        "/v1/models/{name}:feedback",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/{name}",
        "/v2/models/{name}/ready",
        "/v2/models/{name}/infer",
        "/v2/models/{name}/versions/{version}/infer",
        "/metrics",
    } <= set(api["paths"])
    references = re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(api))
    for reference in references:
        found = api
        for part in reference.split("/"):
            found = found[part]
    assert references


class Links(html.parser.HTMLParser):
    """Everything a page would load or link to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if name in {"src", "href", "action"} and value]


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_load_nothing_from_elsewhere(client: Client, path: str) -> None:
    response = client("GET", path)
    assert response.headers["content-type"].startswith("text/html")
    assert all(link.startswith("/") or link == "data:," for link in Links(response.text).links)
    assert not re.search(r"https?://|@import|url\(", response.text)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_allow_only_their_own_scripts(client: Client, path: str) -> None:
    response = client("GET", path)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy
    assert policy.count("'sha256-") == response.text.count("<script>") + response.text.count("<style>")
    assert not re.search(r" on\w+=| style=", response.text), "inline handlers and styles would be blocked"
    assert response.headers["x-content-type-options"] == "nosniff"


def test_behind_a_proxy_the_id_is_left_to_the_proxy(fake: Fake) -> None:
    response = Client(fake, answers_request_id=False).predict(["a"], headers={"x-request-id": "mine"})
    assert "x-request-id" not in response.headers
    assert response.json()["request_id"] == "mine"
