"""The HTTP face, with a fake in place of the replicas."""

from __future__ import annotations

import asyncio
import base64
import html.parser
import json
import re
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.types import Message

from orchestrator.serving.access import Keys, create_key
from orchestrator.serving.contract import Answers, Caller, Explained, ExplainRequest, Input, Limits, ModelInfo
from orchestrator.serving.feedback import append_feedback
from orchestrator.serving.gateway import build_app, overloaded
from orchestrator.storage import Storage

LIMITS = Limits(max_instances=3, max_body_bytes=2_000, request_timeout_s=10.0)
LABELS = ("bad", "good")


class Fake:
    """Answers "good" with certainty to every text, but does what some texts say."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.seen: list[Input] = []
        self.callers: list[Caller] = []
        self.rollouts: dict[str, dict[str, Any]] = {}
        self.locks: dict[str, Keys] = {}
        self.dead: set[str] = set()
        kinds = (("reviews", "text_classification", "text"), ("digits", "image_classification", "image"))
        self.infos = {
            name: ModelInfo(
                model_name=name, model_version="3", task=task, input_kind=kind, labels=LABELS, limits=LIMITS
            )
            for name, task, kind in kinds
        }

    async def names(self) -> list[str]:
        return sorted(self.infos)

    async def describe(self, name: str, version: str | None = None) -> ModelInfo | None:
        return self.infos.get(name)

    async def explain(self, name: str, value: Input, asked: ExplainRequest) -> Explained:
        return Explained(version="3", explanation={"label": asked.label or "good", "method": "occlusion"})

    async def rollout(self, name: str) -> dict[str, Any] | None:
        return self.rollouts.get(name)

    async def predict(self, name: str, version: str | None, inputs: Sequence[Input], caller: Caller) -> Answers:
        self.seen += inputs
        self.callers.append(caller)
        if "fail" in inputs:
            raise RuntimeError("a secret path: /srv/models")
        if "overload" in inputs:
            raise overloaded("busy")
        if "hang" in inputs:
            await asyncio.sleep(60)
        broken = {index: "is no image" for index, value in enumerate(inputs) if value == b"broken"}
        outputs = [{"label": "good", "scores": {"bad": 0.0, "good": 1.0}} for _ in inputs]
        return Answers(version="3", outputs=outputs, unreadable=broken, batch_size=len(inputs))

    def keys(self, name: str) -> Keys | None:
        return self.locks.get(name)

    def is_ready(self, name: str) -> bool:
        return name not in self.dead

    async def feedback(self, name: str, entry: dict[str, Any]) -> None:
        append_feedback(self.storage, name, entry)


class Client:
    """Synchronous calls to one app; each with its own event loop."""

    def __init__(self, fake: Fake, **options: Any) -> None:
        """``options``: of ``build_app``."""
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


@pytest.fixture
def impatient(fake: Fake) -> None:
    """For what hangs: a request is given up soon."""
    limits = LIMITS.model_copy(update={"request_timeout_s": 0.3})
    fake.infos = {name: info.model_copy(update={"limits": limits}) for name, info in fake.infos.items()}


def error_of(response: httpx.Response) -> dict[str, str]:
    if response.request.url.path.startswith("/v2"):  # the Open Inference Protocol has a text there
        assert set(response.json()) == {"error", "code"} and isinstance(response.json()["error"], str)
        return dict(response.json())
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


def test_tensors_come_and_go_as_bytes_behind_the_json(client: Client, fake: Fake) -> None:
    assert client("GET", "/v2").json()["extensions"] == ["binary_tensor_data"]
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 6}}
    asked = {"inputs": [tensor], "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}]}
    head = json.dumps(asked).encode()
    length = "inference-header-content-length"
    answer = client(
        "POST", "/v2/models/digits/infer", content=head + b"\2\0\0\0\xff\xd8", headers={length: str(len(head))}
    )
    assert fake.seen == [b"\xff\xd8"]
    assert answer.headers["content-type"] == "application/octet-stream"
    told, following = answer.content[: int(answer.headers[length])], answer.content[int(answer.headers[length]) :]
    assert json.loads(told)["outputs"][0]["parameters"] == {"binary_data_size": 8}
    assert following == struct.pack("<2f", 0.0, 1.0)
    refused = client("POST", "/v2/models/digits/infer", content=head, headers={length: "9999"})
    assert (refused.status_code, error_of(refused)["code"]) == (400, "invalid_binary_data")


def test_a_version_that_is_rolled_out_can_be_asked_by_its_number(client: Client, fake: Fake, monkeypatch: Any) -> None:
    candidate = fake.infos["reviews"].model_copy(update={"model_version": "4"})

    async def describe(name: str, version: str | None = None) -> ModelInfo | None:
        return candidate if version == "4" else fake.infos[name]

    monkeypatch.setattr(fake, "describe", describe)
    assert client("GET", "/v2/models/reviews").json()["versions"] == ["3"]
    fake.rollouts["reviews"] = {"candidate_version": "4"}
    assert client("GET", "/v2/models/reviews").json()["versions"] == ["3", "4"]


def test_health(client: Client, fake: Fake) -> None:
    assert client("GET", "/v2/health/live").status_code == client("GET", "/v2/health/ready").status_code == 200
    assert client("GET", "/v2").json()["name"] == "ray-orchestrator"
    fake.dead.add("reviews")
    for path in ("/v2/health/ready", "/v2/models/reviews/ready", "/v2/models/reviews/versions/3/ready"):
        response = client("GET", path)
        assert (response.status_code, error_of(response)["code"]) == (503, "not_ready"), path
    assert client("GET", "/v2/models/digits/ready").status_code == 200
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
        ("PUT", "/v1/models/reviews:predict", 405, "method_not_allowed"),
        ("PUT", "/v2/models/reviews/infer", 405, "method_not_allowed"),
    ],
)
def test_what_is_not_there_is_said_in_json(client: Client, method: str, path: str, status: int, code: str) -> None:
    response = client(method, path)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert response.headers["x-request-id"]
    if path.endswith(":predict") and status == 405:
        assert response.headers["allow"] == "POST"


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
def test_a_model_that_cannot_answer_is_503_with_retry_after(
    client: Client, impatient: None, text: str, code: str
) -> None:
    response = client.predict([text])
    assert (response.status_code, error_of(response)["code"]) == (503, code)
    assert response.headers["retry-after"] == "1"


def test_a_client_cannot_lift_the_time_limit(client: Client, impatient: None) -> None:
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
    assert 'orchestrator_instances_total{arm="stable",model="reviews",version="3"} 3.0' in text
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
    assert all(link.startswith(("/", "#")) or link == "data:," for link in Links(response.text).links)
    assert not re.search(r"https?://|@import|url\(", response.text)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_allow_only_their_own_scripts(client: Client, path: str) -> None:
    response = client("GET", path)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy
    assert policy.count("'sha256-") == response.text.count("<script>") + response.text.count("<style>")
    assert not re.search(r" on\w+=| style=", response.text), "inline handlers and styles would be blocked"
    assert response.headers["x-content-type-options"] == "nosniff"


def test_an_explanation_is_of_one_input_and_one_label(client: Client, fake: Fake) -> None:
    def explain(body: dict[str, Any], **options: Any) -> httpx.Response:
        return client("POST", "/v1/models/reviews:explain", json=body, **options)

    answer = explain({"instance": "a", "label": "bad"})
    assert answer.status_code == 200
    assert answer.json().items() >= {"label": "bad", "model_name": "reviews", "model_version": "3"}.items()
    for wrong in ({}, {"instance": 1}, {"instance": "a", "label": "nice"}, {"instance": "a", "method": "guess"},
                  {"instances": ["a"]}):  # fmt: skip
        assert explain(wrong).status_code == 422, wrong
    keys = locked(fake, "reviews")
    _, key = create_key(fake.storage, "little", per_day=100)
    keys.refresh()
    header = {"authorization": f"Bearer {key}"}
    assert [explain({"instance": "a"}, headers=header).status_code for _ in range(2)] == [200, 429], "64 inputs each"


def test_a_refused_explanation_says_why(client: Client, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(name: str, value: Input, asked: ExplainRequest) -> Explained:
        return Explained(version="3", refused=("it has no gradients", "ask for occlusion"))

    monkeypatch.setattr(fake, "explain", refuse)
    error = client("POST", "/v1/models/reviews:explain", json={"instance": "a"}).json()["error"]
    assert error == {
        "code": "explanation_refused", "message": "it has no gradients", "next_step": "ask for occlusion",
    }  # fmt: skip


def test_an_explanation_that_would_have_to_wait_is_503_and_costs_nothing(
    client: Client, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def busy(name: str, value: Input, asked: ExplainRequest) -> Explained:
        return Explained(version="3", busy=True)

    monkeypatch.setattr(fake, "explain", busy)
    keys = locked(fake, "reviews")
    _, key = create_key(fake.storage, "little", per_day=100)
    keys.refresh()
    for _ in range(3):
        answer = client("POST", "/v1/models/reviews:explain", json={"instance": "a"}, **shown(key))
        assert (answer.status_code, error_of(answer)["code"], answer.headers["retry-after"]) == (503, "overloaded", "1")
    assert keys.used() == {}


def test_who_hangs_up_before_the_request_is_whole_is_no_fault_of_ours(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    app, sent = build_app(fake), list[Message]()
    messages: list[Message] = [
        {"type": "http.request", "body": b'{"inst', "more_body": True},
        {"type": "http.disconnect"},
    ]
    path = "/v1/models/reviews:predict"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [],
             "http_version": "1.1", "scheme": "http", "server": ("endpoint", 80), "client": ("127.0.0.1", 1)}  # fmt: skip

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    text = Client.__call__(SimpleNamespace(app=app), "GET", "/metrics").text  # type: ignore[arg-type]
    assert 'orchestrator_requests_total{model="reviews",route="predict",status="aborted"} 1.0' in text
    assert sent == [] and "failed" not in caplog.text


def test_a_rollout_is_told_where_there_is_one(client: Client, fake: Fake) -> None:
    answer = client("GET", "/v1/models/reviews/rollout")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_rollout")
    fake.rollouts["reviews"] = {"mode": "canary"}
    assert client("GET", "/v1/models/reviews/rollout").json() == {"mode": "canary"}


def test_a_client_is_known_by_its_key_or_header_or_else_by_what_it_sends(client: Client, fake: Fake) -> None:
    for headers in ({}, {"x-client-id": "shop"}):
        client.predict(["a"], headers=headers)
    key, text = create_key(fake.storage, "shop")
    locked(fake, "reviews").refresh()
    for headers in ({}, {"x-client-id": "other"}):
        client.predict(["a"], headers=headers | {"authorization": f"Bearer {text}"})
    body, header, by_key, behind_the_key = (caller.identity for caller in fake.callers)
    assert isinstance(body, bytes) and b"instances" in body
    assert (header, by_key, behind_the_key) == ("shop", key.id, f"{key.id}/other")


def test_whether_a_request_is_in_a_sample_is_not_the_clients_choice(client: Client, fake: Fake) -> None:
    for _ in range(3):
        client.predict(["a"], headers={"x-request-id": "mine"})
    chances = [caller.chance for caller in fake.callers]
    assert len(set(chances)) == 3 and all(0.0 <= chance < 1.0 for chance in chances)


def locked(fake: Fake, *names: str) -> Keys:
    keys = Keys(fake.storage)
    fake.locks |= dict.fromkeys(names, keys)
    return keys


def shown(key: str) -> dict[str, dict[str, str]]:
    return {"headers": {"authorization": f"Bearer {key}"}}


def test_a_model_with_keys_answers_nobody_else(client: Client, fake: Fake) -> None:
    keys = locked(fake, "reviews")
    _, key = create_key(fake.storage, "shop", ("predict",))
    keys.refresh()
    ask = {"POST": ["/v1/models/reviews:predict", "/v1/models/reviews:feedback", "/v2/models/reviews/infer",
                    "/v2/models/reviews/versions/3/infer"],
           "GET": ["/v1/models/reviews", "/v2/models/reviews", "/metrics"]}  # fmt: skip
    for method, paths in ask.items():
        for path in paths:
            response = client(method, path, json={"instances": ["a"]} if method == "POST" else None)
            assert (response.status_code, error_of(response)["code"]) == (401, "no_key"), path
            assert response.headers["www-authenticate"] == "Bearer"
    assert fake.seen == []
    assert client.predict(["a"], **shown(key)).status_code == 200
    assert client.predict(["a"], headers={"x-api-key": key}).status_code == 200
    assert client.predict([{"b64": "YQ=="}], "digits").status_code == 200, "the other model is open"
    assert client("GET", "/v1/models/reviews", **shown(key)).json()["model_name"] == "reviews"
    feedback = client("POST", "/v1/models/reviews:feedback", json={"request_id": "a", "label": "good"}, **shown(key))
    assert (feedback.status_code, error_of(feedback)["code"]) == (403, "forbidden")


def test_health_needs_no_key_and_metrics_an_administrators(client: Client, fake: Fake) -> None:
    keys = locked(fake, "reviews", "digits")
    _, key = create_key(fake.storage, "shop")
    _, admin = create_key(fake.storage, "prometheus", ("admin",))
    keys.refresh()
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/reviews/ready"):
        assert client("GET", path).status_code == 200
    for version in ("3", "999"):
        response = client("GET", f"/v2/models/reviews/versions/{version}/ready")
        assert response.status_code == 401 and "version 3" not in response.text
    assert client("GET", "/v2/models/reviews/versions/3/ready", **shown(key)).status_code == 200
    _, limited = create_key(fake.storage, "team", ("admin",), models=("reviews",))
    _, hasty = create_key(fake.storage, "hasty", ("admin",), per_second=0.001)
    keys.refresh()
    assert client("GET", "/metrics", **shown(limited)).status_code == 403, "they are of all models"
    assert [client("GET", "/metrics", **shown(hasty)).status_code for _ in range(2)] == [200, 429]
    assert client("GET", "/metrics", **shown(key)).status_code == 403
    assert client("GET", "/metrics", **shown(admin)).status_code == 200
    assert key not in client("GET", "/metrics", **shown(admin)).text


def test_models_are_named_to_those_alone_who_may_ask_them(client: Client, fake: Fake) -> None:
    keys = locked(fake, "reviews", "digits")
    _, key = create_key(fake.storage, "shop", models=("reviews",))
    keys.refresh()

    def names(**options: Any) -> list[str]:
        return [model["model_name"] for model in client("GET", "/v1/models", **options).json()["models"]]

    assert (names(), names(**shown(key))) == ([], ["reviews"])
    assert "reviews" not in error_of(client("GET", "/v1/models/other"))["next_step"]
    assert client.predict([{"b64": "YQ=="}], "digits", **shown(key)).status_code == 403


def test_a_key_that_asks_too_often_or_too_much_is_429_with_retry_after(client: Client, fake: Fake) -> None:
    keys = locked(fake, "reviews")
    (_, hasty), (much, key) = (create_key(fake.storage, "hasty", per_second=0.001),
                               create_key(fake.storage, "much", per_day=3))  # fmt: skip
    keys.refresh()
    assert client.predict(["a"], **shown(hasty)).status_code == 200
    response = client.predict(["a"], **shown(hasty))
    assert (response.status_code, response.headers["retry-after"]) == (429, "1000")
    assert client.predict(["a", "b"], **shown(key)).status_code == 200
    assert error_of(client.predict(["a", "b"], **shown(key)))["code"] == "quota_used_up"
    assert client.predict(["a"], **shown(key)).status_code == 200, "what was refused was not counted"
    assert keys.used()[much.id] == 3 and len(fake.seen) == 4
