"""The endpoint on a real Ray Serve: two models behind one gateway, changed while they are asked."""

from __future__ import annotations

import base64
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ports import free_port
from served_models import LABELS, png, publish_image_model, publish_text_model

from orchestrator.data.encoders import load_encoder
from orchestrator.errors import ServingFailed
from orchestrator.models.checkpoint import save_mixture
from orchestrator.models.ensemble import Mixture
from orchestrator.recipe_serving import Recording, Serving
from orchestrator.serving.predictor import Predictor
from orchestrator.serving.recorded import with_feedback
from orchestrator.storage import Storage, version_location

pytestmark = pytest.mark.ray
Answer = tuple[int, dict[str, Any], dict[str, str]]


def ask(url: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer), {k.lower(): v for k, v in answer.headers.items()}
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), {k.lower(): v for k, v in error.headers.items()}


TEXTS = [f"the coffee was {word} and we bought this" for word in ("great", "stale", "awful", "rich", "dull")] * 6


def served(storage: Storage, settings: Serving, name: str, version: int) -> Any:
    from orchestrator.serving.served import Served

    return Served(name, version, storage.url, version_location(name, version), settings)


def offline(storage: Storage, name: str, version: int, inputs: list[Any]) -> list[list[float]]:
    predictions = Predictor.from_folder(storage.path(version_location(name, version))).predict(inputs)
    return [prediction.probabilities or [] for prediction in predictions]


def scores(answer: Answer) -> list[list[float]]:
    assert answer[0] == 200, answer
    return [list(prediction["scores"].values()) for prediction in answer[1]["predictions"]]


def wait_until(fact: Callable[[], bool], patience_s: float = 90.0) -> None:
    deadline = time.monotonic() + patience_s
    while not fact():
        assert time.monotonic() < deadline, f"not within {patience_s:g} s"
        time.sleep(0.05)


class Load:
    """Two clients that ask again and again until the block ends."""

    body: dict[str, Any] = {"instances": TEXTS[:2]}

    def __init__(self, url: str) -> None:
        self.url, self.answers, self.stopped = url, list[Answer](), threading.Event()
        self.threads = [threading.Thread(target=self._ask) for _ in range(2)]

    def _ask(self) -> None:
        while not self.stopped.is_set():
            try:
                self.answers.append(ask(self.url, self.body))
            except OSError as error:  # no answer at all: a failure as well
                self.answers.append((0, {"error": repr(error)}, {}))
            time.sleep(0.02)  # leaves the cores to the replica that starts

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def wait_for_answers(self, number: int) -> None:
        """Until there are so many more."""
        there = len(self.answers)
        wait_until(lambda: len(self.answers) >= there + number)

    def wait_for_version(self, number: int) -> None:
        """Until it alone answers."""
        wait_until(lambda: {answer[1].get("model_version") for answer in self.answers[-6:]} == {str(number)})

    def failed(self) -> list[Answer]:
        return [answer for answer in self.answers if answer[0] != 200]


@pytest.fixture(scope="module")
def request_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs") / "requests.jsonl"


@pytest.fixture(scope="module")
def settings(request_log: Path) -> Serving:
    # Half a CPU each: room for two models and a new version of one of them beside it.
    return Serving(
        port=free_port(),
        max_replicas=1,
        cpus_per_replica=0.5,
        max_body_bytes=50_000,
        max_instances=64,
        precision="fp32",
        request_log=str(request_log),
        recording=Recording(keep_inputs=True),
    )


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Storage:
    storage = Storage(str(tmp_path_factory.mktemp("served")))
    publish_image_model(storage, "shapes", 1)
    for version in (1, 2, 3):
        publish_text_model(storage, "reviews", version, tiny_backbone)
    return storage


@pytest.fixture(scope="module")
def endpoint(ray_session: object, settings: Serving, storage: Storage) -> Iterator[str]:
    from orchestrator.serving.on_ray import deploy, shutdown

    for name, cache_bytes in (("reviews", 0), ("shapes", 1_000_000)):
        url = deploy(served(storage, settings.model_copy(update={"cache_bytes": cache_bytes}), name, 1))
    yield url
    shutdown()


def test_answers_are_the_offline_predictors(endpoint: str, storage: Storage) -> None:
    url = f"{endpoint}/v1/models/reviews:predict"
    expected = offline(storage, "reviews", answering(endpoint), TEXTS)
    with ThreadPoolExecutor(8) as clients:
        single = list(clients.map(lambda text: scores(ask(url, {"instances": [text]}))[0], TEXTS))
    for got in (scores(ask(url, {"instances": TEXTS})), single):
        assert got == [pytest.approx(row, abs=1e-6) for row in expected]


def test_two_kinds_of_models_share_the_gateway(endpoint: str, storage: Storage) -> None:
    images = [png(seed) for seed in range(3)]
    instances = [{"b64": base64.b64encode(image).decode()} for image in images]
    got = scores(ask(f"{endpoint}/v1/models/shapes:predict", {"instances": instances}))
    assert got == [pytest.approx(row, abs=1e-6) for row in offline(storage, "shapes", 1, list(images))]
    status, answer, _ = ask(f"{endpoint}/v1/models/shapes:predict", {"instances": [*instances, {"b64": "AAAA"}]})
    assert (status, answer["error"]["code"]) == (422, "unreadable_input")
    assert [model["model_name"] for model in ask(f"{endpoint}/v1/models")[1]["models"]] == ["reviews", "shapes"]


def test_answers_are_explained(endpoint: str) -> None:
    status, told, _ = ask(f"{endpoint}/v1/models/reviews:explain", {"instance": TEXTS[0], "method": "occlusion"})
    assert (status, told["method"], told["model_version"]) == (200, "occlusion", str(answering(endpoint)))
    assert " ".join(part["text"] for part in told["parts"]) == TEXTS[0]
    status, told, _ = ask(f"{endpoint}/v1/models/shapes:explain",
                          {"instance": {"b64": base64.b64encode(png(0)).decode()}, "label": "so-so"})  # fmt: skip
    assert (status, told["label"], told["method"]) == (200, "so-so", "integrated_gradients")
    assert len(told["heatmap"]) > 2
    assert told["score"] - told["baseline_score"] == pytest.approx(sum(map(sum, told["heatmap"])), abs=0.02)
    status, told, _ = ask(f"{endpoint}/v1/models/shapes:explain", {"instance": {"b64": "AAAA"}})
    assert (status, told["error"]["code"]) == (422, "explanation_refused")


def test_the_open_inference_protocol_on_the_wire(endpoint: str, storage: Storage) -> None:
    body = {"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": TEXTS[:2]}]}
    version = answering(endpoint)
    expected = [value for row in offline(storage, "reviews", version, TEXTS[:2]) for value in row]
    for path in ("reviews", f"reviews/versions/{version}"):
        status, answer, _ = ask(f"{endpoint}/v2/models/{path}/infer", body)
        assert (status, answer["outputs"][1]["data"]) == (200, pytest.approx(expected, abs=1e-6))
    assert ask(f"{endpoint}/v2/models/reviews/versions/9/infer", body)[0] == 404


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/models/none:predict", {"instances": ["a"]}, 404),
        ("/nothing", None, 404),
        ("/v1/models/reviews:predict", b"{", 400),
        ("/v1/models/reviews:predict", {"instances": [1]}, 422),
        ("/v1/models/reviews:predict", {"instances": ["x" * 60_000]}, 413),
        ("/v1/models/reviews:predict", b"[" * 40_000, 400),
    ],
)
def test_errors_are_json(endpoint: str, path: str, body: Any, status: int) -> None:
    got, answer, headers = ask(endpoint + path, body)
    assert (got, set(answer["error"])) == (status, {"code", "message", "next_step"})
    assert headers["x-request-id"]


@pytest.mark.parametrize("name", ["x-request-timeout-seconds", "x-request-id", "x-request-disconnect-disabled",
                                  "serve_multiplexed_model_id", "x-session-id"])  # fmt: skip
def test_no_header_of_a_client_disturbs_the_answer(endpoint: str, name: str) -> None:
    """Ray Serve's own proxy, which is not used here, would obey some of them."""
    for value in ("0", "0.000001", "\xff", "x" * 300):
        status, answer, headers = ask(f"{endpoint}/v1/models/reviews:predict", {"instances": ["a"]}, {name: value})
        assert status == 200, value
        assert headers["x-request-id"] == answer["request_id"], "one id, the same in the head and in the body"


def answering(endpoint: str) -> int:
    """The version of reviews that answers now: 1 or 2."""
    return int(ask(f"{endpoint}/v1/models/reviews:predict", {"instances": ["a"]})[1]["model_version"])


def test_a_new_version_takes_over_without_a_failed_request(endpoint: str, storage: Storage, settings: Serving) -> None:
    from orchestrator.serving.on_ray import deploy, serving_status

    old = answering(endpoint)
    new = 3 - old
    with Load(f"{endpoint}/v1/models/reviews:predict") as load:
        load.wait_for_answers(10)
        deploy(served(storage, settings, "reviews", new))
        load.wait_for_version(new)
    assert load.failed() == []
    versions = [answer[1]["model_version"] for answer in load.answers]
    assert versions[0] == str(old) and versions[-1] == str(new)
    by_version = {str(v): offline(storage, "reviews", v, TEXTS[:2]) for v in (old, new)}
    for answer in (*load.answers[:5], *load.answers[-5:]):
        assert scores(answer) == [pytest.approx(row, abs=1e-6) for row in by_version[answer[1]["model_version"]]]
    status = serving_status()["reviews"]
    assert (status["version"], status["status"], status["replicas"]) == (new, "RUNNING", 1)


def test_a_version_with_a_flipped_bit_never_answers(endpoint: str, storage: Storage, settings: Serving) -> None:
    from orchestrator.serving.on_ray import deploy, serving_status

    weights, sound = storage.path(version_location("reviews", 3)) / "model.safetensors", answering(endpoint)
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with Load(f"{endpoint}/v1/models/reviews:predict") as load:
        with pytest.raises(ServingFailed, match=r"IntegrityError: .*model\.safetensors is not the file"):
            deploy(served(storage, settings, "reviews", 3))
        load.wait_for_answers(10)
    assert load.failed() == []
    assert {answer[1]["model_version"] for answer in load.answers} == {str(sound)}
    assert (serving_status()["reviews"]["version"], serving_status()["reviews"]["status"]) == (sound, "RUNNING")


def test_a_version_that_does_not_answer_as_evaluated_is_taken_back(
    endpoint: str, storage: Storage, settings: Serving
) -> None:
    from orchestrator.serving.on_ray import deploy, serving_status

    sound = answering(endpoint)
    rows = offline(storage, "reviews", 3 - sound, TEXTS)
    others = [{"input": text, "scores": dict(zip(LABELS, row[1:] + row[:1], strict=True))}
              for text, row in zip(TEXTS, rows, strict=True)]  # fmt: skip
    with pytest.raises(ServingFailed, match=r"does not answer as it did when it was evaluated"):
        deploy(served(storage, settings, "reviews", 3 - sound), known=others)
    assert serving_status()["reviews"]["version"] == answering(endpoint) == sound, "the one before answers again"


def test_versions_joined_to_an_ensemble_answer_as_one(endpoint: str, storage: Storage, settings: Serving) -> None:
    from orchestrator.serving.on_ray import deploy, undeploy

    same = tuple(range(len(LABELS)))
    members = [storage.path(version_location("reviews", version)) for version in (1, 2)]
    with storage.publish(version_location("joined", 3)) as folder:
        mixture = Mixture(weights=(0.75, 0.25), orders=(same, same), encoders=(0, 0))
        save_mixture(folder, members, mixture, load_encoder(members[0]), LABELS, {})
    deploy(served(storage, settings, "joined", 3))
    answer = ask(f"{endpoint}/v1/models/joined:predict", {"instances": TEXTS})
    told = ask(f"{endpoint}/v1/models/joined:explain", {"instance": TEXTS[0], "method": "occlusion"})
    one, other = (np.array(offline(storage, "reviews", version, TEXTS)) for version in (1, 2))
    assert np.abs(one - other).max() > 1e-3, "they differ"
    assert np.array(scores(answer)) == pytest.approx(0.75 * one + 0.25 * other, abs=1e-6)
    assert answer[1]["model_version"] == told[1]["model_version"] == "3" and told[0] == 200
    undeploy("joined")


def test_a_model_leaves_and_comes_back(endpoint: str, storage: Storage, settings: Serving) -> None:
    from orchestrator.serving.on_ray import deploy, undeploy

    version = answering(endpoint)
    assert undeploy("reviews") and not undeploy("reviews")
    wait_until(lambda: ask(f"{endpoint}/v1/models/reviews")[0] == 404)
    assert ask(f"{endpoint}/v2/health/ready")[0] == 200, "the other model still answers"
    deploy(served(storage, settings, "reviews", version))
    assert len(scores(ask(f"{endpoint}/v1/models/reviews:predict", {"instances": TEXTS}))) == len(TEXTS)


def metrics_of(endpoint: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{endpoint}/metrics", timeout=60) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_an_image_that_comes_again_is_not_computed_again(endpoint: str) -> None:
    body = {"instances": [{"b64": base64.b64encode(png(seed)).decode()} for seed in (7, 8)]}
    first = ask(f"{endpoint}/v1/models/shapes:predict", body)
    hits, batches = 'orchestrator_cache_hits_total{model="shapes"}', 'orchestrator_batch_size_count{model="shapes"}'
    before = metrics_of(endpoint)
    assert scores(ask(f"{endpoint}/v1/models/shapes:predict", body)) == scores(first)
    after = metrics_of(endpoint)
    assert (after[hits] - before.get(hits, 0.0), after[batches] - before[batches]) == (2.0, 0.0)


def test_the_metrics_say_what_runs_and_what_it_computed(endpoint: str) -> None:
    ask(f"{endpoint}/v1/models/reviews:predict", {"instances": TEXTS[:3]})
    replicas = 'orchestrator_replicas{model="reviews"}'
    wait_until(lambda: metrics_of(endpoint).get(replicas) == 1.0)  # the gateway looks now and then
    told = metrics_of(endpoint)
    assert told[f'orchestrator_version_info{{arm="stable",model="reviews",version="{answering(endpoint)}"}}'] == 1.0
    assert told['orchestrator_tokens_total{model="reviews"}'] >= 3 * 5
    assert told['orchestrator_queue_seconds_count{model="reviews"}'] > 0


def test_what_was_answered_is_told_and_kept(endpoint: str, storage: Storage, request_log: Path) -> None:
    """The last test of this file: what waits is written when the endpoint ends."""
    from orchestrator.serving.on_ray import shutdown

    status, answer, _ = ask(
        f"{endpoint}/v1/models/reviews:predict", {"instances": TEXTS[:2]}, {"x-request-id": "kept-1"}
    )
    wrong = next(label for label in answer["predictions"][0]["scores"] if label != answer["predictions"][0]["label"])
    remark = {"request_id": "kept-1", "index": 1, "label": wrong}
    assert (status, ask(f"{endpoint}/v1/models/reviews:feedback", remark)[0]) == (200, 200)
    shutdown()
    rows = {row["index"]: row for row in with_feedback(storage, "reviews").to_pylist() if row["request_id"] == "kept-1"}
    assert [rows[index]["input"] for index in (0, 1)] == TEXTS[:2]
    assert [rows[index]["label"] for index in (0, 1)] == [told["label"] for told in answer["predictions"]]
    assert [rows[index]["told_label"] for index in (0, 1)] == [None, wrong]
    (line,) = [line for line in map(json.loads, request_log.read_text().splitlines()) if line.get("request_id") == "kept-1"
               and line["route"] == "predict"]  # fmt: skip
    assert (line["status"], line["model"], line["version"], line["instances"]) == (
        200, "reviews", answer["model_version"], 2,
    )  # fmt: skip
    assert TEXTS[0] not in request_log.read_text()
